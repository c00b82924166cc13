"""Layers: drop-in `nn.Module`s, one file each, under their family."""

from layerzoo.nn.ssm.mamba import Mamba

__all__ = ["Mamba"]
