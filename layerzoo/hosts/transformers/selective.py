"""The mixers of Mamba's kind: step size, B and C come from the convolution's output; a state for each channel.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), arXiv 2312.00752.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerzoo.hosts.transformers.mixer import Mixer
from layerzoo.ops import selective_scan, selective_state_update
from layerzoo.ops.linear import linear

LOG2_E = math.log2(math.e)


class SelectiveMixer(Mixer):
    """A mixer of Mamba's kind on our kernels.

    Several tokens at once after a cached start (chunked prefill) go on from the cached state. The host, and the kernel
    of mamba_ssm that it would use, start from a zero state there, so its logits are wrong from there on.
    """

    op = "selective_scan"
    uncalled = (*Mixer.uncalled, ("dt_proj", nn.Linear))
    parameters_used: ClassVar[tuple[str, ...]] = ("dt_proj.weight",)
    norms: ClassVar[tuple[str, ...]] = ()  # children that normalise the step size before its projection, B and C

    def _split(self, projected: Tensor) -> tuple[Tensor, Tensor, Any]:
        x, gate = projected.chunk(2, dim=-1)
        return x, gate, None

    def _select(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., d) -> step sizes before bias and softplus (..., d), B and C (..., n)."""
        sizes = [self.time_step_rank, self.ssm_state_size, self.ssm_state_size]
        parts = self.x_proj(x).split_with_sizes(sizes, dim=-1)
        if self.norms:
            parts = [getattr(self, name)(part) for name, part in zip(self.norms, parts, strict=True)]
        dt, B, C = parts
        return linear(dt, self.dt_proj.weight), B, C

    def _sequence(
        self: Any, x: Tensor, gate: Tensor, dt: Any, state: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        delta, B, C = self._select(x)
        y, last = selective_scan(
            x.transpose(1, 2),
            delta.transpose(1, 2),
            decay(self.A_log),
            B.transpose(1, 2),
            C.transpose(1, 2),
            D=self.D,
            z=gate.transpose(1, 2),
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
            return_last_state=True,
            initial_state=state,
            seq_idx=seq_idx,
        )
        return y.transpose(1, 2), last

    def _token(self: Any, x: Tensor, gate: Tensor, dt: Any, state: Tensor) -> Tensor:
        delta, B, C = self._select(x)
        return selective_state_update(
            state, x, delta, decay(self.A_log), B, C, self.D, gate, self.dt_proj.bias, dt_softplus=True
        )


def decay(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) in fp32.

    By exp2, since torch.exp goes to threads of MKL's own, which on a busy machine wait for each other for milliseconds.
    """
    scaled = A_log.float() * LOG2_E
    return -scaled.exp2() if torch.is_grad_enabled() else scaled.exp2_().neg_()
