"""Bamba (IBM and others, 2024): Mamba-2 mixers between attention layers."""

from transformers.models.bamba import modeling_bamba

from layerzoo.hosts.transformers.ssd import SSDMixer


class BambaMixer(SSDMixer, modeling_bamba.BambaMixer):
    host = modeling_bamba.BambaMixer
