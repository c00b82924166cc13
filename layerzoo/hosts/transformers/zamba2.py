"""Zamba2 (Glorioso et al., 2024, arXiv 2411.15242): Mamba-2 mixers between shared attention blocks."""

from transformers.models.zamba2 import modeling_zamba2

from layerzoo.hosts.transformers.ssd import SSDMixer


class Zamba2MambaMixer(SSDMixer, modeling_zamba2.Zamba2MambaMixer):
    host = modeling_zamba2.Zamba2MambaMixer
