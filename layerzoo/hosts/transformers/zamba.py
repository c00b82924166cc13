"""Zamba (Glorioso et al., 2024, arXiv 2405.16712): Mamba with a few heads, each with projections of its own."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.zamba import modeling_zamba

from layerzoo.hosts.transformers.mixer import Mixer
from layerzoo.hosts.transformers.selective import SelectiveMixer, decay
from layerzoo.ops import selective_scan, selective_state_update


class ZambaMambaMixer(SelectiveMixer, modeling_zamba.ZambaMambaMixer):
    """The heads are groups of channels to the scan, which takes all of them at once."""

    host = modeling_zamba.ZambaMambaMixer
    uncalled = Mixer.uncalled
    parameters_used = ("x_proj_weight", "dt_proj_weight", "dt_proj_bias")

    def _split(self: Any, projected: Tensor) -> tuple[Tensor, Tensor, Any]:
        # Channels of x and gate alternate; apart in memory, since the kernels are slow at every second number.
        x, gate = projected.unflatten(-1, (self.intermediate_size, 2)).movedim(-1, 0).contiguous()
        return x, gate, None

    def _select(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (..., d) -> step sizes before bias and softplus (..., d), B and C (..., h, n)."""
        heads = x.unflatten(-1, (self.n_mamba_heads, self.mamba_head_dim))
        low, B, C = torch.einsum("...hp,hkp->...hk", heads, self.x_proj_weight).split_with_sizes(
            [self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1
        )
        return torch.einsum("...hr,hpr->...hp", low, self.dt_proj_weight).flatten(-2), B, C

    def _sequence(
        self: Any, x: Tensor, gate: Tensor, dt: Any, state: Tensor | None, seq_idx: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        delta, B, C = self._select(x)
        y, last = selective_scan(
            x.transpose(1, 2),
            delta.transpose(1, 2),
            decay(self.A_log).flatten(0, 1),
            B.permute(0, 2, 3, 1),
            C.permute(0, 2, 3, 1),
            D=self.D.flatten(),
            z=gate.transpose(1, 2),
            delta_bias=self.dt_proj_bias.flatten(),
            delta_softplus=True,
            return_last_state=True,
            initial_state=None if state is None else state.flatten(1, 2),
            seq_idx=seq_idx,
        )
        return y.transpose(1, 2), last.unflatten(1, (self.n_mamba_heads, self.mamba_head_dim))

    def _token(self: Any, x: Tensor, gate: Tensor, dt: Any, state: Tensor) -> Tensor:
        delta, B, C = self._select(x)
        x, delta, gate = (t.unflatten(-1, (self.n_mamba_heads, self.mamba_head_dim)) for t in (x, delta, gate))
        y = selective_state_update(
            state, x, delta, decay(self.A_log), B, C, self.D, gate, self.dt_proj_bias, dt_softplus=True
        )
        return y.flatten(1)
