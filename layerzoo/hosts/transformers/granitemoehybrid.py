"""Granite 4 (IBM, 2025): Mamba-2 mixers in a mixture of experts."""

from transformers.models.granitemoehybrid import modeling_granitemoehybrid

from layerzoo.hosts.transformers.ssd import SSDMixer


class GraniteMoeHybridMambaLayer(SSDMixer, modeling_granitemoehybrid.GraniteMoeHybridMambaLayer):
    host = modeling_granitemoehybrid.GraniteMoeHybridMambaLayer
