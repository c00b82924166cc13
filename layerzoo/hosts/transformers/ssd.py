"""The mixers of Mamba-2's kind: step size, B and C come from the first projection; a decay for each head.

Dao and Gu, "Transformers are SSMs" (2024), arXiv 2405.21060.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from layerzoo.hosts.transformers.mixer import Mixer
from layerzoo.hosts.transformers.selective import decay
from layerzoo.nn.ssm.heads_update import heads_update
from layerzoo.ops import ssd_chunk_scan


class SSDMixer(Mixer):
    """A mixer of Mamba-2's kind on our kernels.

    `time_step_limit` bounds the step sizes as in the host: not those of one token after a cached start.
    """

    op = "ssd_chunk_scan"
    parameters_used = ("dt_bias",)

    def _split(self: Any, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, x, dt = projected.split_with_sizes([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        return x, gate, dt

    def _heads(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., c) -> x (..., h, p), B and C (..., g, n)."""
        both = self.n_groups * self.ssm_state_size
        x, B, C = x.split_with_sizes([self.intermediate_size, both, both], dim=-1)
        groups = (self.n_groups, self.ssm_state_size)
        return x.unflatten(-1, (self.num_heads, self.head_dim)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _gate_in_scan(self: Any, gate: Tensor) -> Tensor | None:
        """The gate (..., d) as (..., h, p) where the scan applies it, None where the norm does."""
        return None

    def _normed(self: Any, y: Tensor, gate: Tensor) -> Tensor:
        normed: Tensor = self.norm(y, gate)
        return normed

    def _sequence(
        self: Any, x: Tensor, gate: Tensor, dt: Any, state: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        one_more = state is not None and x.shape[1] == 1
        x, B, C = self._heads(x)
        y, last = ssd_chunk_scan(
            x,
            dt,
            decay(self.A_log),
            B,
            C,
            self.chunk_size,
            D=self.D,
            z=self._gate_in_scan(gate),
            dt_bias=self.dt_bias,
            initial_states=state,
            seq_idx=seq_idx,
            dt_softplus=True,
            dt_limit=(0.0, math.inf) if one_more else tuple(self.time_step_limit),
            return_final_states=True,
        )
        return self._normed(y.flatten(2), gate), last

    def _token(self: Any, x: Tensor, gate: Tensor, dt: Any, state: Tensor) -> Tensor:
        x, B, C = self._heads(x)
        y = heads_update(
            state, x, dt, decay(self.A_log), B, C, self.D, self._gate_in_scan(gate), self.dt_bias, dt_softplus=True
        )
        normed: Tensor = self._normed(y.flatten(1), gate)
        return normed
