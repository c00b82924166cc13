"""Layers: drop-in `nn.Module`s, one file each, under their family."""

from layerzoo.nn.ssm.bigs import BiGS
from layerzoo.nn.ssm.hgrn import HGRN, hgrn_lower_bounds
from layerzoo.nn.ssm.local_mamba import LocalMamba
from layerzoo.nn.ssm.mamba import Mamba
from layerzoo.nn.ssm.mamba2 import Mamba2
from layerzoo.nn.ssm.rglru import RGLRU
from layerzoo.nn.ssm.s4d import S4D
from layerzoo.nn.ssm.ss2d import SS2D
from layerzoo.nn.ssm.vision_mamba import VisionMamba

__all__ = [
    "HGRN",
    "RGLRU",
    "S4D",
    "SS2D",
    "BiGS",
    "LocalMamba",
    "Mamba",
    "Mamba2",
    "VisionMamba",
    "hgrn_lower_bounds",
]
