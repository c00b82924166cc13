"""Layers: drop-in `nn.Module`s, one file each, under their family."""

from layerzoo.nn.ssm.mamba import Mamba
from layerzoo.nn.ssm.mamba2 import Mamba2

__all__ = ["Mamba", "Mamba2"]
