"""Mamba-2: state-space layer with one decay for each head.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality"
(2024), arXiv 2405.21060. Constructor, parameter names and state_dict are those of mamba-ssm's `Mamba2`, so that its
checkpoints load; the step size, the decay and the state are float32 whatever the type of the layer.
"""

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn.linear import Linear
from layerzoo.nn.ssm.cache import Cache, cache_of, check_cache, each_sequence, marks_of, move_on, zero_cache
from layerzoo.nn.ssm.gated_rms_norm import GatedRMSNorm
from layerzoo.nn.ssm.heads_update import heads_update
from layerzoo.ops import causal_conv1d, causal_conv1d_update, ssd_chunk_scan


class _Projected(NamedTuple):
    """The parts of in_proj's output, (batch, length, ...) each, in their order."""

    mlp_gate: Tensor
    mlp: Tensor
    z: Tensor
    xBC: Tensor
    dt: Tensor


def _check_sizes(sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"Mamba2: {name} must be at least 1, got {size}")
    most, inside, width = sizes["expand"] * sizes["d_model"], sizes["d_ssm"], sizes["headdim"]
    if inside % width or inside > most:
        raise ValueError(
            f"Mamba2: d_ssm must be a multiple of headdim = {width}, at most expand * d_model = {most}, got {inside}"
        )
    if inside // width % sizes["ngroups"]:
        raise ValueError(f"Mamba2: ngroups must divide the number of heads, {inside // width}, got {sizes['ngroups']}")


class Mamba2(nn.Module):
    """Maps (batch, length, d_model) to the same shape, causally, in time and memory linear in length.

    Args:
        d_model: width of input and output. d_state: states per channel. d_conv: width of the causal convolution.
        conv_init: the convolution's weights are drawn from (-conv_init, conv_init); None: torch's default.
        expand: inner channels = expand * d_model. headdim: channels of a head.
        d_ssm: inner channels that go through the scan, a multiple of headdim; the rest is a gated MLP beside it. None:
            all of them.
        ngroups: groups of heads that share B and C. A_init_range: range of the initial -A, drawn uniformly.
        D_has_hdim: whether D has a value for each channel, rather than for each head.
        rmsnorm, norm_before_gate: whether the output of the scan is normalised, and whether before it is gated.
        dt_min, dt_max, dt_init_floor: range in which the initial step sizes are drawn, log-uniformly.
        dt_limit: bounds of the step sizes. bias, conv_bias: whether the projections and the convolution have a bias.
        chunk_size: of mamba-ssm's algorithm; results do not depend on it.
        layer_idx: key of this layer in `inference_params.key_value_memory_dict`.
        use_mem_eff_path, sequence_parallel: accepted for compatibility; there is one path, in one process.
        process_group: must be None.

    Raises:
        ValueError: a size that is not positive, sizes that do not divide, a range that is not in order, a process
            group; an input whose width is not d_model.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if process_group is not None:
            raise ValueError(f"Mamba2: process_group must be None, got {process_group!r}: there is one process")
        d_inner = expand * d_model
        inside = d_inner if d_ssm is None else d_ssm
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand, "headdim": headdim}
        _check_sizes(sizes | {"d_ssm": inside, "ngroups": ngroups, "chunk_size": chunk_size})
        for name, low, high in (("dt_min and dt_max", dt_min, dt_max), ("A_init_range", *A_init_range)):
            if not 0 < low <= high:
                raise ValueError(f"Mamba2: {name} must satisfy 0 < low <= high, got {low} and {high}")
        if not dt_limit[0] <= dt_limit[1]:
            raise ValueError(f"Mamba2: dt_limit must be (low, high) with low <= high, got {dt_limit}")
        self.d_model, self.d_state, self.d_conv, self.expand, self.headdim = d_model, d_state, d_conv, expand, headdim
        self.d_inner, self.d_ssm, self.ngroups, self.nheads = d_inner, inside, ngroups, inside // headdim
        self.D_has_hdim, self.rmsnorm, self.chunk_size, self.layer_idx = D_has_hdim, rmsnorm, chunk_size, layer_idx
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
        self.conv_init, self.A_init_range, self._dt_init = conv_init, A_init_range, (dt_min, dt_max, dt_init_floor)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        full: dict[str, Any] = {"device": device, "dtype": torch.float32}

        conv_dim = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = Linear(d_model, 2 * d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **like)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1, bias=conv_bias, **like)
        self.dt_bias = nn.Parameter(torch.empty(self.nheads, **full))
        self.A_log = nn.Parameter(torch.empty(self.nheads, **full))
        self.D = nn.Parameter(torch.empty(self.d_ssm if D_has_hdim else self.nheads, **full))
        if rmsnorm:
            self.norm = GatedRMSNorm(self.d_ssm, ngroups, norm_before_gate, **like)
        self.out_proj = Linear(d_inner, d_model, bias=bias, **like)
        # Marks that training code written for mamba-ssm looks for.
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self._reset_scan_parameters()

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for layer in (self.in_proj, self.conv1d, self.out_proj):
            layer.reset_parameters()
        if self.rmsnorm:
            self.norm.reset_parameters()
        self._reset_scan_parameters()

    @torch.no_grad()
    def _reset_scan_parameters(self) -> None:
        low, high, floor = self._dt_init
        if self.conv_init is not None:
            self.conv1d.weight.uniform_(-self.conv_init, self.conv_init)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(low), math.log(high)).exp().clamp(min=floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.uniform_(*self.A_init_range).log_()
        self.D.fill_(1.0)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}, "
            f"headdim={self.headdim}, ngroups={self.ngroups}"
        )

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """u (batch, length, d_model) -> the same shape.

        Args:
            seqlen: u and the result are (batch * seqlen, d_model) instead.
            seq_idx: (batch, length), packed sequences and padding (below 0), as in `ssd_chunk_scan`.
            cu_seqlens: (sequences + 1,), packed sequences in other words, for a batch of 1, as in
                `seq_idx_from_cu_seqlens`.
            inference_params: mamba-ssm's object (`key_value_memory_dict`, `seqlen_offset`): its cache of `layer_idx` is
                used, and allocated at first.
            cache: (conv_state, ssm_state) of `allocate_inference_cache`, a row for each of the batch: read by the first
                sequence of the row, and moved on in place behind its last. With `cu_seqlens` a row for each sequence.
                It needs `torch.no_grad()`.
        """
        shape = u.shape
        if seqlen is not None:
            if u.dim() != 2 or seqlen < 1 or u.shape[0] % seqlen:
                raise ValueError(
                    f"Mamba2: with seqlen = {seqlen}, u must have shape (batch * seqlen, d_model = {self.d_model}), "
                    f"got {tuple(shape)}"
                )
            u = u.unflatten(0, (-1, seqlen))
        if u.dim() != 3 or u.shape[2] != self.d_model:
            raise ValueError(f"Mamba2: u must have shape (batch, length, d_model = {self.d_model}), got {tuple(shape)}")
        rows = u.shape[0]
        if cu_seqlens is not None:
            seq_idx, rows = marks_of(self, cu_seqlens, seq_idx, u), cu_seqlens.shape[0] - 1
        if inference_params is not None:
            cache = cache_of(self, inference_params, rows)
        if cache is not None and u.shape[1] == 1 and seq_idx is None:
            return self.step(u, *cache)[0].view(shape)
        if cache is not None:
            check_cache(self, *cache, rows)
        part = self._project(u)
        if cache is None or cu_seqlens is None:
            y = self._mix(part, cache, seq_idx)
        else:
            y = part.z.new_zeros(part.z.shape)
            for where, row in each_sequence(cu_seqlens, cache):
                y[:, where] = self._mix(_Projected(*(x[:, where] for x in part)), row, None)
        return self._finish(y, part).view(shape)

    def _mix(self, part: _Projected, cache: Cache | None, seq_idx: Tensor | None) -> Tensor:
        """The output of the scan, (batch, length, d_ssm); the cache is moved on."""
        left = None if cache is None else cache[0][:, :, 1:]
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        xBC = causal_conv1d(part.xBC.transpose(1, 2), weight, bias, seq_idx, left, activation="silu").transpose(1, 2)
        x, B, C = self._split(xBC)
        y, state = ssd_chunk_scan(
            x,
            part.dt,
            self._decay(),
            B,
            C,
            self.chunk_size,
            self._skip(),
            None if self.rmsnorm else part.z.unflatten(2, (self.nheads, -1)),
            self.dt_bias,
            None if cache is None else cache[1],
            seq_idx,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            return_final_states=True,
        )
        if cache is not None:
            move_on(cache, part.xBC, state, seq_idx)
        return y.flatten(2)

    def _project(self, u: Tensor) -> _Projected:
        mlp = self.d_inner - self.d_ssm
        conv_dim = self.d_ssm + 2 * self.ngroups * self.d_state
        return _Projected(*self.in_proj(u).split([mlp, mlp, self.d_ssm, conv_dim, self.nheads], dim=-1))

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """xBC (..., channels) -> x (..., heads, headdim), B and C (..., groups, d_state)."""
        both = self.ngroups * self.d_state
        x, B, C = xBC.split([self.d_ssm, both, both], dim=-1)
        groups = (self.ngroups, self.d_state)
        return x.unflatten(-1, (self.nheads, -1)), B.unflatten(-1, groups), C.unflatten(-1, groups)

    def _decay(self) -> Tensor:
        """A (heads,), in float32 or wider."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _skip(self) -> Tensor:
        """D (heads,) or (heads, headdim)."""
        return self.D.view(self.nheads, -1) if self.D_has_hdim else self.D

    def _finish(self, y: Tensor, part: _Projected) -> Tensor:
        """The output from that of the scan, (..., d_ssm)."""
        if self.rmsnorm:
            y = self.norm(y, part.z)
        if self.d_ssm < self.d_inner:
            y = torch.cat([F.silu(part.mlp_gate) * part.mlp, y], -1)
        out: Tensor = self.out_proj(y)
        return out

    def step(
        self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor, state_batch_indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token, (batch, 1, d_model), with the states (changed in place, and returned).

        With `state_batch_indices` (batch,) these are pools: the row of each row of the batch, below 0 for padding, as
        in `selective_state_update`.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f"Mamba2.step: hidden_states must hold one token, got length {hidden_states.shape[1]}")
        check_cache(self, conv_state, ssm_state, hidden_states.shape[0] if state_batch_indices is None else None)
        part = self._project(hidden_states.squeeze(1))
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        xBC = causal_conv1d_update(part.xBC, conv_state, weight, bias, "silu", None, state_batch_indices)
        x, B, C = self._split(xBC)
        z = None if self.rmsnorm else part.z.unflatten(1, (self.nheads, -1))
        dt, dt_bias, softplus = part.dt, cast("Tensor | None", self.dt_bias), True
        if self.dt_limit != (0.0, math.inf):  # which the step of mamba-ssm forgets
            wide = dt.to(self.dt_bias.dtype) + self.dt_bias
            dt, dt_bias, softplus = F.softplus(wide).clamp(*self.dt_limit), None, False
        y = heads_update(ssm_state, x, dt, self._decay(), B, C, self._skip(), z, dt_bias, softplus, state_batch_indices)
        return self._finish(y.flatten(1), part).unsqueeze(1), conv_state, ssm_state

    @property
    def cache_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a row of each state: (d_ssm + 2 ngroups d_state, d_conv) and (heads, headdim, d_state)."""
        return (self.conv1d.weight.shape[0], self.d_conv), (self.nheads, self.headdim, self.d_state)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Cache:
        """Zero states: (batch_size, d_ssm + 2 ngroups d_state, d_conv), and (batch_size, heads, headdim, d_state) in
        float32 or wider.

        Their size does not depend on `max_seqlen`, which is accepted for compatibility.
        """
        return zero_cache(self, batch_size, dtype)
