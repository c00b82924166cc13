"""Mamba: selective state-space layer.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), arXiv 2312.00752. Constructor,
parameter names and state_dict are those of mamba-ssm's `Mamba`, so that its checkpoints load; the step size, the decay
and the state are float32 whatever the type of the layer.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerzoo.nn.linear import Linear
from layerzoo.nn.ssm.cache import Cache, cache_of, check_cache, each_sequence, marks_of, move_on, zero_cache
from layerzoo.nn.ssm.selection import StepInit, check_sizes, decay, rank_of, reset_scan, scan_arguments, select
from layerzoo.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update


class Mamba(nn.Module):
    """Maps (batch, length, d_model) to the same shape, causally, in time and memory linear in length.

    Args:
        d_model: width of input and output. d_state: states per channel. d_conv: width of the causal convolution.
        expand: inner channels = expand * d_model. dt_rank: rank of the step-size projection; "auto" is d_model / 16.
        dt_min, dt_max, dt_init_floor: range in which the initial step sizes are drawn, log-uniformly.
        dt_init, dt_scale: initial weight of the step-size projection: "random" (uniform) or "constant".
        conv_bias, bias: whether the convolution and the two outer projections have a bias.
        layer_idx: key of this layer in `inference_params.key_value_memory_dict`.
        use_fast_path: accepted for compatibility; there is one path.

    Raises:
        ValueError: a size that is not positive or an unknown `dt_init`; an input whose width is not d_model.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rank = rank_of(dt_rank, d_model)
        check_sizes("Mamba", d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=rank)
        self._dt_init = StepInit(dt_init, dt_scale, dt_min, dt_max, dt_init_floor)
        self._dt_init.check("Mamba")
        self.d_model, self.d_state, self.d_conv, self.expand, self.dt_rank = d_model, d_state, d_conv, expand, rank
        self.d_inner = expand * d_model
        self.layer_idx = layer_idx
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        full: dict[str, Any] = {"device": device, "dtype": torch.float32}

        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias, **like)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **like
        )
        self.x_proj = Linear(self.d_inner, rank + 2 * d_state, bias=False, **like)
        self.dt_proj = Linear(rank, self.d_inner, bias=True, **like)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, **full))
        self.D = nn.Parameter(torch.empty(self.d_inner, **full))
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **like)
        # Marks that training code written for mamba-ssm looks for.
        self.A_log._no_weight_decay = self.D._no_weight_decay = True  # type: ignore[attr-defined]
        self.dt_proj.bias._no_reinit = True  # type: ignore[attr-defined]
        reset_scan(self._dt_init, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D)

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for layer in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            layer.reset_parameters()
        reset_scan(self._dt_init, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """hidden_states (batch, length, d_model) -> the same shape.

        Args:
            inference_params: mamba-ssm's object (`key_value_memory_dict`, `seqlen_offset`): its cache of `layer_idx` is
                used, and allocated at first.
            seq_idx: (batch, length), packed sequences and padding (below 0), as in `selective_scan`.
            cu_seqlens: (sequences + 1,), packed sequences in other words, for a batch of 1, as in
                `seq_idx_from_cu_seqlens`.
            cache: (conv_state, ssm_state) of `allocate_inference_cache`, a row for each of the batch: read by the first
                sequence of the row, and moved on in place behind its last. With `cu_seqlens` a row for each sequence.
                It needs `torch.no_grad()`.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.d_model:
            raise ValueError(
                f"Mamba: hidden_states must have shape (batch, length, d_model = {self.d_model}), "
                f"got {tuple(hidden_states.shape)}"
            )
        rows = hidden_states.shape[0]
        if cu_seqlens is not None:
            seq_idx, rows = marks_of(self, cu_seqlens, seq_idx, hidden_states), cu_seqlens.shape[0] - 1
        if inference_params is not None:
            cache = cache_of(self, inference_params, rows)
        if cache is not None and hidden_states.shape[1] == 1 and seq_idx is None:
            return self.step(hidden_states, *cache)[0]
        if cache is not None:
            check_cache(self, *cache, rows)
        xz = self.in_proj(hidden_states)
        if cache is None or cu_seqlens is None:
            y = self._mix(xz, cache, seq_idx)
        else:
            y = xz.new_zeros(*xz.shape[:2], self.d_inner)
            for where, row in each_sequence(cu_seqlens, cache):
                y[:, where] = self._mix(xz[:, where], row, None)
        out: Tensor = self.out_proj(y)
        return out

    def _mix(self, xz: Tensor, cache: Cache | None, seq_idx: Tensor | None) -> Tensor:
        """in_proj's output (batch, length, 2 d_inner) -> out_proj's input; the cache is moved on."""
        inputs, z = xz.chunk(2, dim=2)  # b l d each
        weight = self.conv1d.weight.squeeze(1)
        left = None if cache is None else cache[0][:, :, 1:]
        x = causal_conv1d(inputs.transpose(1, 2), weight, self.conv1d.bias, seq_idx, left, activation="silu")  # b d l
        y, state = selective_scan(
            **self._scan_arguments(x, z),
            return_last_state=True,
            initial_state=None if cache is None else cache[1],
            seq_idx=seq_idx,
        )
        if cache is not None:
            move_on(cache, inputs, state, seq_idx)
        return y.transpose(1, 2)

    def _scan_arguments(self, x: Tensor, z: Tensor) -> dict[str, Any]:
        """Of selective_scan: x (b, d, l) out of the convolution, and the gate z (b, l, d)."""
        dt_proj = self.dt_proj
        return scan_arguments(x, self.x_proj(x.mT), dt_proj.weight, dt_proj.bias, self.A_log, self.D, z.mT)

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor, state_batch_indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (batch, 1, d_model), with the states (changed in place, and returned).

        With `state_batch_indices` (batch,) these are pools: the row of each row of the batch, below 0 for padding, as
        in `selective_state_update`.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"Mamba.step: hidden_states must hold one token, got length {hidden_states.shape[1]}")
        check_cache(self, conv_state, ssm_state, hidden_states.shape[0] if state_batch_indices is None else None)
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=1)  # b d each
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        x = causal_conv1d_update(x, conv_state, weight, bias, "silu", None, state_batch_indices)
        delta, B, C = select(self.x_proj(x), self.dt_proj.weight, self.d_state)
        y = selective_state_update(
            ssm_state, x, delta, decay(self.A_log), B, C, self.D, z, self.dt_proj.bias, True, state_batch_indices
        )
        return self.out_proj(y).unsqueeze(1), conv_state, ssm_state

    @property
    def cache_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a row of each state: (d_inner, d_conv) and (d_inner, d_state)."""
        return (self.d_inner, self.d_conv), (self.d_inner, self.d_state)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Cache:
        """Zero states: (batch_size, d_inner, d_conv), and (batch_size, d_inner, d_state) in float32 or wider.

        Their size does not depend on `max_seqlen`, which is accepted for compatibility.
        """
        return zero_cache(self, batch_size, dtype)
