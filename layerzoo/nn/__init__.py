"""Layers: drop-in `nn.Module`s, one file each, under their family."""

from layerzoo.nn.ssm.hgrn import HGRN, hgrn_lower_bounds
from layerzoo.nn.ssm.mamba import Mamba
from layerzoo.nn.ssm.rglru import RGLRU

__all__ = ["HGRN", "RGLRU", "Mamba", "hgrn_lower_bounds"]
