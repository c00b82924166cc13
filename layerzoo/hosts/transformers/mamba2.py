"""Mamba-2 (Dao and Gu, 2024, arXiv 2405.21060)."""

from transformers.models.mamba2 import modeling_mamba2

from layerzoo.hosts.transformers.ssd import SSDMixer


class Mamba2Mixer(SSDMixer, modeling_mamba2.Mamba2Mixer):
    host = modeling_mamba2.Mamba2Mixer
