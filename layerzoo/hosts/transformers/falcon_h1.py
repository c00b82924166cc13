"""Falcon-H1 (Zuo et al., 2025, arXiv 2507.22448): Mamba-2 beside attention, with multipliers, the norm optional."""

from typing import Any

from torch import Tensor
from transformers.models.falcon_h1 import modeling_falcon_h1

from layerzoo.hosts.transformers.ssd import SSDMixer


class FalconH1Mixer(SSDMixer, modeling_falcon_h1.FalconH1Mixer):
    host = modeling_falcon_h1.FalconH1Mixer

    def _project(self: Any, hidden_states: Tensor) -> Tensor:
        projected: Tensor = self.in_proj(hidden_states * self.ssm_in_multiplier) * self.mup_vector
        return projected

    def _gate_in_scan(self: Any, gate: Tensor) -> Tensor | None:
        return None if self.mamba_rms_norm else gate.unflatten(-1, (self.num_heads, self.head_dim))

    def _normed(self: Any, y: Tensor, gate: Tensor) -> Tensor:
        normed: Tensor = self.norm(y, gate) if self.mamba_rms_norm else y
        return normed
