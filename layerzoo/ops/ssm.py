"""State-space ops: selective scan and causal convolution, whole sequences and step by step.

Letters: batch b, channels d, length l, state n, groups g (channels that share B and C), kernel width w. Floating-point
arguments may be float32, bfloat16, float16 or float64 and need not agree: everything is computed in float32, in float64
where the first argument is, and results have the type of the first argument (states: the type computed in). Any strides
are read as they are.
"""

import itertools
import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from layerzoo import env
from layerzoo.ops._checks import (
    FLOATING,
    INTEGER,
    check_no_gradient,
    check_positive,
    check_rank,
    check_tensor,
    check_writable,
)
from layerzoo.ops._define import define
from layerzoo.reference import ssm as reference
from layerzoo.reference.ssm import CHUNK, accumulate_dtype

# ---- packed sequences ----


def seq_idx_from_cu_seqlens(cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """The `seq_idx` of one row in which sequences stand one after the other.

    Reads the values: under torch.compile that breaks the graph, and on CUDA it waits for the device. Call it once for
    all layers.

    Args:
        cu_seqlens: (sequences + 1,) int32 or int64: where each sequence begins, from 0, and where the last one ends. A
            sequence may be empty.
        length: of the row, at least the last offset; the steps from there on are padding (-1). None: the last offset.

    Returns:
        (1, length) int32 ids, counted from 0.

    Raises:
        TypeError, ValueError: offsets of the wrong type, dtype or rank, that do not begin at 0, that decrease, or that
            go beyond the length.
    """
    op = "seq_idx_from_cu_seqlens"
    check_rank(op, "cu_seqlens", cu_seqlens, ("(sequences + 1)",), INTEGER)
    check_positive(op, "cu_seqlens", "offset", cu_seqlens.shape[0])
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must begin with 0, got {offsets[0]}")
    for left, right in itertools.pairwise(offsets):
        if left > right:
            raise ValueError(f"{op}: cu_seqlens must not decrease, got {right} after {left}")
    length = offsets[-1] if length is None else length
    if length < offsets[-1]:
        raise ValueError(f"{op}: cu_seqlens must end at or before length = {length}, got {offsets[-1]}")
    steps = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ids = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True, out_int32=True)
    return ids.where(steps < offsets[-1], -1).unsqueeze(0)


# ---- selective_scan ----


def _scan_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, chunk = args
    out, last, states = reference.selective_scan(*inputs)
    last = last.clone(memory_format=torch.contiguous_format)
    return torch.empty_like(inputs[0]).copy_(out), last, states.contiguous() if chunk else states[:, :0].clone()


def _scan_fake(u: Tensor, delta: Tensor, A: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, channels, length), chunk, acc = u.shape, args[-1], accumulate_dtype(u)
    chunks = (length + chunk - 1) // chunk if chunk else 0
    return (
        torch.empty_like(u),
        u.new_empty((batch, channels, A.shape[1]), dtype=acc),
        u.new_empty((batch, chunks, A.shape[1], channels), dtype=acc),
    )


def _new(like: Tensor) -> Tensor:
    """New memory as the kernels lay out a result: parameters contiguous, sequences in the order of their strides."""
    return like.new_empty(like.shape) if like.dim() == 2 else torch.empty_like(like)


def _laid_out(like: Tensor | None, value: Tensor | None) -> Tensor | None:
    return None if like is None or value is None else _new(like).copy_(value)


def _or_empty(like: Tensor, dtype: torch.dtype, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """An op returns tensors only: nothing in place of None."""
    return tuple(like.new_empty((0,), dtype=dtype) if grad is None else grad for grad in grads)


def _scan_backward_reference(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _states = args
    u, delta, A, B, C, _, z = inputs[2:9]
    acc = accumulate_dtype(u)
    grads = list(reference.selective_scan_backward(*inputs))
    for i, like in ((0, u), (1, delta), (3, B), (4, C), (6, z)):
        grads[i] = _laid_out(like, grads[i])
    initial = u.new_empty((0, *A.shape), dtype=acc) if grads[8] is None else grads[8]
    grads[8] = initial.clone(memory_format=torch.contiguous_format)
    return _or_empty(u, acc, tuple(grads))


def _scan_backward_fake(
    grad_out: Tensor,
    grad_last: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    initial: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    acc = accumulate_dtype(u)

    def plain(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.new_empty(x.shape)

    return _or_empty(
        u,
        acc,
        (
            torch.empty_like(u),
            torch.empty_like(delta),
            plain(A),
            _new(B),
            _new(C),
            plain(D),
            None if z is None else torch.empty_like(z),
            plain(bias),
            u.new_empty((0, *A.shape), dtype=acc) if initial is None else plain(initial),
        ),
    )


_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? initial_state, Tensor? seq_idx, bool reverse"
)

_scan_backward = define(
    f"selective_scan_backward(Tensor grad_out, Tensor? grad_last_state, {_INPUTS}, Tensor states)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_scan_backward_reference,
    fake=_scan_backward_fake,
)


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, delta, A, B, C, D, z, bias, ctx.softplus, initial, seq_idx, ctx.reverse, _ = inputs
    ctx.save_for_backward(u, delta, A, B, C, D, z, bias, initial, seq_idx, output[2])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _scan_gradient(ctx: Any, grad_out: Tensor | None, grad_last: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    u, delta, A, B, C, D, z, bias, initial, seq_idx, states = ctx.saved_tensors
    inputs = (u, delta, A, B, C, D, z, bias, ctx.softplus, initial, seq_idx, ctx.reverse)
    if grad_out is None and grad_last is None:
        return (None,) * 13
    if states.shape[1] == 0:  # the op was called without keeping states
        states = _scan(*inputs, CHUNK)[2]
    if grad_out is None:
        grad_out = torch.zeros_like(u)
    grads = _scan_backward(grad_out, grad_last, *inputs, states)
    gu, gdelta, gA, gB, gC, gD, gz, gbias, ginitial = (
        grad if x is not None else None for grad, x in zip(grads, (u, delta, A, B, C, D, z, bias, initial), strict=True)
    )
    return gu, gdelta, gA, gB, gC, gD, gz, gbias, None, ginitial, None, None, None


_scan = define(
    f"selective_scan({_INPUTS}, int chunk) -> (Tensor, Tensor, Tensor)",
    reference=_scan_reference,
    fake=_scan_fake,
    setup_context=_scan_setup,
    backward=_scan_gradient,
    autocast=(0, 3, 4, 6),
)


def _check_coefficient(op: str, name: str, x: Tensor, u: Tensor, state: int) -> int:
    """Checks B or C and returns its number of groups, 0 where it is constant."""
    batch, channels, length = u.shape
    check_rank(op, name, x, ("(channels, state)", "(batch, state, length)", "(batch, groups, state, length)"))
    if x.dim() == 2:
        check_tensor(op, name, x, "(channels, state)", (channels, state), u.device)
        return 0
    if x.dim() == 3:
        check_tensor(op, name, x, "(batch, state, length)", (batch, state, length), u.device)
        return 1
    groups = x.shape[1]
    check_tensor(op, name, x, "(batch, groups, state, length)", (batch, groups, state, length), u.device)
    if groups < 1 or channels % groups:
        raise ValueError(f"{op}: {name} has {groups} groups, which must divide the {channels} channels of u")
    return groups


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    return_last_state: Literal[False] = ...,
    *,
    initial_state: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    reverse: bool = ...,
) -> Tensor: ...
@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    *,
    return_last_state: Literal[True],
    initial_state: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    reverse: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state-space scan of Mamba (Gu and Dao, 2023, arXiv 2312.00752).

    For every batch, channel and state n: `dt = softplus(delta + delta_bias)` (or without softplus),
    `x_t = exp(dt_t A_n) x_{t-1} + dt_t u_t B_{t,n}`, `out_t = (sum_n C_{t,n} x_{t,n} + D u_t) silu(z_t)`.

    Args:
        u, delta, z: (batch, channels, length). Channel-last memory is as fast as time-last, and is kept in the output.
        A: (channels, state), real; negative where the state shall decay.
        B, C: constant (channels, state), or (batch, state, length), or (batch, groups, state, length), where
            channel c belongs to group c // (channels // groups).
        D, delta_bias: (channels,).
        delta_softplus: whether dt is the softplus of delta + delta_bias.
        return_last_state: whether to return the state after the last step too.
        initial_state: (batch, channels, state), the state before the first step; zero if None.
        seq_idx: (batch, length) int32 or int64: which sequence of the row each step belongs to. The state starts at
            zero with each new id; it must not decrease along a row; steps with a negative id are padding: output 0,
            state untouched, no gradient. The first sequence goes on from `initial_state`.
        reverse: scan from the last step to the first; the last state is then that of step 0.

    Returns:
        out (batch, channels, length) in u's dtype and stride order; with `return_last_state` also the last state
        (batch, channels, state) in float32 (float64 for float64 u). Both are differentiable, once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: NaN in A, or ids in seq_idx that decrease (kernels on CUDA do not look: set LAYERZOO_CHECK=1).
    """
    op = "selective_scan"
    check_rank(op, "u", u, ("(batch, channels, length)",))
    shape, device = u.shape, u.device
    check_positive(op, "u", "channel", shape[1])
    check_tensor(op, "delta", delta, "(batch, channels, length)", shape, device)
    check_rank(op, "A", A, ("(channels, state)",))
    check_tensor(op, "A", A, "(channels, state)", (shape[1], A.shape[1]), device)
    state = A.shape[1]
    check_positive(op, "A", "state", state)
    groups = {_check_coefficient(op, "B", B, u, state), _check_coefficient(op, "C", C, u, state)} - {0}
    if len(groups) > 1:
        raise ValueError(f"{op}: B and C must have equal numbers of groups, got {tuple(B.shape)} and {tuple(C.shape)}")
    for name, row in (("D", D), ("delta_bias", delta_bias)):
        if row is not None:
            check_tensor(op, name, row, "(channels,)", (shape[1],), device)
    if z is not None:
        check_tensor(op, "z", z, "(batch, channels, length)", shape, device)
    if initial_state is not None:
        dims = (shape[0], shape[1], state)
        check_tensor(op, "initial_state", initial_state, "(batch, channels, state)", dims, device)
    if seq_idx is not None:
        check_tensor(op, "seq_idx", seq_idx, "(batch, length)", (shape[0], shape[2]), device, INTEGER)
    if device.type == "cuda" and env.check():
        reference.check_values(op, A, seq_idx)
    needs_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    chunk = CHUNK if needs_gradient else 0
    out, last, _ = _scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, seq_idx, reverse, chunk)
    return (out, last) if return_last_state else out


# ---- selective_state_update ----


def _update_fake(state: Tensor, x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x)


_update = define(
    "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices=None) -> Tensor",
    reference=lambda state, x, *args: torch.empty_like(x).copy_(reference.selective_state_update(state, x, *args)),
    fake=_update_fake,
    inference=True,
)


def _check_groups(op: str, B: Tensor, heads: int) -> int:
    """Returns the number of groups of B in the heads form, after the check that it divides the heads."""
    check_rank(op, "B", B, ("(batch, groups, state)",))
    groups = B.shape[1]
    if groups < 1 or heads % groups:
        raise ValueError(f"{op}: B has {groups} groups, which must divide the {heads} heads of x")
    return groups


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One step of a selective scan, in place on `state`: what decoding token by token calls.

    Either one step of `selective_scan` (Gu and Dao, Mamba, 2023), or one in heads (Dao and Gu, Mamba-2, 2024).

    Args:
        state: (batch, channels, state), or in heads (batch, heads, channels, state), changed in place; any floating
            type, best float32. With `state_batch_indices` a pool of any number of rows, not of `batch` ones.
        x, dt, z: (batch, channels), or (batch, heads, channels).
        A: (channels, state), or (heads, channels, state). Where its last stride is 0, as in views that Mamba-2 expands,
            one exponential does for all states of a channel.
        B, C: (batch, state), or (batch, groups, state): head k is in group k // (heads / groups).
        D, dt_bias: (channels,), or (heads, channels).
        dt_softplus: whether the step size is the softplus of dt + dt_bias.
        state_batch_indices: (batch,) int32 or int64, the row of `state` that each row of the batch has. Below 0 it is
            padding: the output is 0, and no state is read or written.

    Returns:
        The output in x's shape and dtype. It has no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or one that needs a gradient.
        RuntimeError: an index that is no row of `state`, or a row that has two (the kernel on CUDA does not look: set
            LAYERZOO_CHECK=1; there an index that is no row gives NaN).
    """
    op = "selective_state_update"
    check_rank(op, "x", x, ("(batch, channels)", "(batch, heads, channels)"))
    batch, device = x.shape[0], x.device
    if heads := x.dim() == 3:
        check_positive(op, "x", "head", x.shape[1])
    inner = tuple(x.shape[1:])
    middle = "heads, channels" if heads else "channels"
    check_positive(op, "x", "channel", inner[-1])
    check_rank(op, "A", A, (f"({middle}, state)",))
    n = A.shape[-1]
    check_positive(op, "A", "state", n)
    first, rows = "batch", batch
    if state_batch_indices is not None:
        check_tensor(op, "state_batch_indices", state_batch_indices, "(batch,)", (batch,), device, INTEGER)
        check_rank(op, "state", state, (f"(rows, {middle}, state)",))
        first, rows = "rows", state.shape[0]
    check_tensor(op, "state", state, f"({first}, {middle}, state)", (rows, *inner, n), device)
    check_tensor(op, "dt", dt, f"(batch, {middle})", (batch, *inner), device)
    check_tensor(op, "A", A, f"({middle}, state)", (*inner, n), device)
    groups: tuple[int, ...] = (_check_groups(op, B, inner[0]),) if heads else ()
    for name, coefficient in (("B", B), ("C", C)):
        dims = "(batch, groups, state)" if heads else "(batch, state)"
        check_tensor(op, name, coefficient, dims, (batch, *groups, n), device)
    if z is not None:
        check_tensor(op, "z", z, f"(batch, {middle})", (batch, *inner), device)
    for name, row in (("D", D), ("dt_bias", dt_bias)):
        if row is not None:
            check_tensor(op, name, row, f"({middle})" if heads else "(channels,)", inner, device)
    check_writable(op, "state", state)
    check_no_gradient(op, state, x, dt, A, B, C, D, z, dt_bias)
    if x.is_cuda and env.check():
        reference.check_rows(op, "state_batch_indices", state_batch_indices, rows)
    out: Tensor = _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)
    return out


# ---- causal_conv1d ----

_ACTIVATIONS = (None, "silu", "swish")


def _silu(op: str, activation: str | None) -> bool:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{op}: activation must be None, 'silu' or 'swish', got {activation!r}")
    return activation is not None


def _conv_reference(*args: Any) -> tuple[Tensor, Tensor]:
    out, final = reference.causal_conv1d(*args)
    return torch.empty_like(args[0]).copy_(out), final


def _conv_fake(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.shape[0], x.shape[1], weight.shape[1] - 1))


def _conv_backward_reference(*args: Any) -> tuple[Tensor, ...]:
    x, initial = args[2], args[6]
    grads = list(reference.causal_conv1d_backward(*args))
    grads[0] = _laid_out(x, grads[0])
    grads[3] = _laid_out(initial, grads[3])
    return _or_empty(x, x.dtype, tuple(grads))


def _conv_backward_fake(
    grad_out: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial: Tensor | None,
    silu: bool,
) -> tuple[Tensor, ...]:
    return _or_empty(
        x,
        x.dtype,
        (
            torch.empty_like(x),
            weight.new_empty(weight.shape),
            None if bias is None else bias.new_empty(bias.shape),
            None if initial is None else torch.empty_like(initial),
        ),
    )


_CONV_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, bool silu"

_conv_backward = define(
    f"causal_conv1d_backward(Tensor grad_out, Tensor? grad_final_states, {_CONV_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_conv_backward_reference,
    fake=_conv_backward_fake,
)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _conv_gradient(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, seq_idx, initial = ctx.saved_tensors
    if grad_out is None and grad_final is None:
        return (None,) * 6
    if grad_out is None:
        grad_out = torch.zeros_like(x)
    gx, gweight, gbias, ginitial = _conv_backward(grad_out, grad_final, x, weight, bias, seq_idx, initial, ctx.silu)
    return gx, gweight, None if bias is None else gbias, None, None if initial is None else ginitial, None


_conv = define(
    f"causal_conv1d({_CONV_INPUTS}) -> (Tensor, Tensor)",
    reference=_conv_reference,
    fake=_conv_fake,
    setup_context=_conv_setup,
    backward=_conv_gradient,
    autocast=(0,),
)


def _check_weight(op: str, weight: Tensor, bias: Tensor | None, x: Tensor) -> int:
    check_rank(op, "weight", weight, ("(channels, width)",))
    width = weight.shape[1]
    check_tensor(op, "weight", weight, "(channels, width)", (x.shape[1], width), x.device)
    check_positive(op, "weight", "tap", width)
    if bias is not None:
        check_tensor(op, "bias", bias, "(channels,)", (x.shape[1],), x.device)
    return width


@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    return_final_states: Literal[False] = ...,
    activation: str | None = ...,
) -> Tensor: ...
@overload
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    *,
    return_final_states: Literal[True],
    activation: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution: `out_t = act(bias + sum_k weight_k x_{t - width + 1 + k})`.

    Args:
        x: (batch, channels, length), any strides; the output keeps their order.
        weight: (channels, width), any width; 2, 3 and 4 are the fast ones. bias: (channels,).
        seq_idx: (batch, length) int32 or int64, not decreasing along a row: a tap counts only within the sequence of
            its step; where the id is negative the output is 0.
        initial_states: (batch, channels, width - 1), what stands left of the first step (and belongs to its sequence);
            zeros if None.
        return_final_states: whether to return the last width - 1 inputs too, (batch, channels, width - 1) in x's dtype.
        activation: None, "silu" or "swish" (the same).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or an unknown activation.
        RuntimeError: ids in seq_idx that decrease (kernels on CUDA do not look: set LAYERZOO_CHECK=1).
    """
    op = "causal_conv1d"
    check_rank(op, "x", x, ("(batch, channels, length)",))
    check_positive(op, "x", "channel", x.shape[1])
    width = _check_weight(op, weight, bias, x)
    if seq_idx is not None:
        check_tensor(op, "seq_idx", seq_idx, "(batch, length)", (x.shape[0], x.shape[2]), x.device, INTEGER)
        if x.is_cuda and env.check():
            reference.check_values(op, None, seq_idx)
    if initial_states is not None:
        shape = (x.shape[0], x.shape[1], width - 1)
        check_tensor(op, "initial_states", initial_states, "(batch, channels, width - 1)", shape, x.device)
    out, final = _conv(x, weight, bias, seq_idx, initial_states, _silu(op, activation))
    return (out, final) if return_final_states else out


_conv_update = define(
    "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? cache_seqlens=None, Tensor? conv_state_indices=None) -> Tensor",
    reference=lambda x, *args: torch.empty_like(x).copy_(reference.causal_conv1d_update(x, *args)),
    fake=lambda x, *args: torch.empty_like(x),
    inference=True,
)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d` of the next inputs, with those before them in `conv_state`, which is brought up to date in place.

    Args:
        x: (batch, channels) or (batch, channels, length), usually one step.
        conv_state: (batch, channels, kept) with kept >= width - 1: the last inputs, newest last; moved on in place.
            With `conv_state_indices` a pool of any number of rows, not of `batch` ones.
        weight: (channels, width). bias: (channels,). activation: None, "silu" or "swish".
        cache_seqlens: (batch,) int32 or int64, how many inputs each row has had. `conv_state` is then a ring that is
            not moved: input i stands at i % kept, and x is written from cache_seqlens % kept on.
        conv_state_indices: (batch,) int32 or int64, the row of `conv_state` that each row of the batch has. Below 0 it
            is padding: the output is 0, and no state is read or written.

    Returns:
        The output in x's shape and dtype. It has no gradient.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or one that needs a gradient.
        RuntimeError: a negative length, an index that is no row of `conv_state`, or a row that has two (the kernel on
            CUDA does not look: set LAYERZOO_CHECK=1; there an index that is no row gives NaN).
    """
    op = "causal_conv1d_update"
    check_rank(op, "x", x, ("(batch, channels)", "(batch, channels, length)"))
    (batch, channels), device = x.shape[:2], x.device
    check_positive(op, "x", "channel", channels)
    width = _check_weight(op, weight, bias, x)
    check_rank(op, "conv_state", conv_state, ("(batch, channels, kept)",))
    kept = conv_state.shape[2]
    first, rows = "batch", batch
    if conv_state_indices is not None:
        check_tensor(op, "conv_state_indices", conv_state_indices, "(batch,)", (batch,), device, INTEGER)
        first, rows = "rows", conv_state.shape[0]
    check_tensor(op, "conv_state", conv_state, f"({first}, channels, kept)", (rows, channels, kept), device)
    if kept < width - 1:
        raise ValueError(f"{op}: conv_state must keep at least width - 1 = {width - 1} inputs, got {kept}")
    if cache_seqlens is not None:
        check_tensor(op, "cache_seqlens", cache_seqlens, "(batch,)", (batch,), device, INTEGER)
    silu = _silu(op, activation)
    check_writable(op, "conv_state", conv_state)
    check_no_gradient(op, x, conv_state, weight, bias)
    if x.is_cuda and env.check():
        reference.check_rows(op, "conv_state_indices", conv_state_indices, rows)
        reference.check_lengths(op, cache_seqlens, conv_state_indices)
    out: Tensor = _conv_update(x, conv_state, weight, bias, silu, cache_seqlens, conv_state_indices)
    return out


# ---- ssd_chunk_scan ----


_SSD_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, bool dt_softplus, float dt_low, float dt_high"
)


def _ssd_reference(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *inputs, chunk = args
    out, last, states = reference.ssd_chunk_scan(*inputs)
    last = last.clone(memory_format=torch.contiguous_format)
    return torch.empty_like(inputs[0]).copy_(out), last, states.contiguous() if chunk else states[:, :0].clone()


def _ssd_fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    (batch, length, heads, width), state, chunk, acc = x.shape, B.shape[3], args[-1], accumulate_dtype(x)
    chunks = (length + chunk - 1) // chunk if chunk else 0
    return (
        torch.empty_like(x),
        x.new_empty((batch, heads, width, state), dtype=acc),
        x.new_empty((batch, chunks, heads, state, width), dtype=acc),
    )


def _ssd_backward_reference(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _states = args
    x, dt, _, B, C, _, z = inputs[2:9]
    grads = list(reference.ssd_chunk_scan_backward(*inputs))
    for i, like in ((0, x), (1, dt), (3, B), (4, C), (6, z)):
        grad = grads[i]
        grads[i] = None if like is None or grad is None else torch.empty_like(like).copy_(grad)
    acc, (_, _, heads, width), state = accumulate_dtype(x), x.shape, B.shape[3]
    initial = x.new_empty((0, heads, width, state), dtype=acc) if grads[8] is None else grads[8]
    grads[8] = initial.clone(memory_format=torch.contiguous_format)
    return _or_empty(x, acc, tuple(grads))


def _ssd_backward_fake(
    grad_out: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    acc = accumulate_dtype(x)

    def plain(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.new_empty(value.shape)

    return _or_empty(
        x,
        acc,
        (
            torch.empty_like(x),
            torch.empty_like(dt),
            plain(A),
            torch.empty_like(B),
            torch.empty_like(C),
            plain(D),
            None if z is None else torch.empty_like(z),
            plain(bias),
            x.new_empty((0, *x.shape[2:], B.shape[3]), dtype=acc) if initial is None else plain(initial),
        ),
    )


_ssd_backward = define(
    f"ssd_chunk_scan_backward(Tensor grad_out, Tensor? grad_final_states, {_SSD_INPUTS}, Tensor states)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_ssd_backward_reference,
    fake=_ssd_backward_fake,
)


def _ssd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.low, ctx.high, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])


def _ssd_gradient(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    inputs = (*tensors, ctx.softplus, ctx.low, ctx.high)
    if grad_out is None and grad_final is None:
        return (None,) * 14
    if states.shape[1] == 0:  # the op was called without keeping states
        states = _ssd(*inputs, CHUNK)[2]
    if grad_out is None:
        grad_out = torch.zeros_like(tensors[0])
    grads = _ssd_backward(grad_out, grad_final, *inputs, states)
    given = (grad if value is not None else None for grad, value in zip(grads, tensors[:9], strict=True))
    return (*given, None, None, None, None, None)


_ssd = define(
    f"ssd_chunk_scan({_SSD_INPUTS}, int chunk) -> (Tensor, Tensor, Tensor)",
    reference=_ssd_reference,
    fake=_ssd_fake,
    setup_context=_ssd_setup,
    backward=_ssd_gradient,
    autocast=(0, 3, 4, 6),
)


def _check_skip(op: str, D: Tensor, heads: int, width: int, device: torch.device) -> None:
    check_rank(op, "D", D, ("(heads)", "(heads, width)"))
    if D.dim() == 1:
        check_tensor(op, "D", D, "(heads,)", (heads,), device)
    else:
        check_tensor(op, "D", D, "(heads, width)", (heads, width), device)


@overload
def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    dt_bias: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ...,
    return_final_states: Literal[False] = ...,
) -> Tensor: ...
@overload
def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    dt_bias: Tensor | None = ...,
    initial_states: Tensor | None = ...,
    seq_idx: Tensor | None = ...,
    dt_softplus: bool = ...,
    dt_limit: tuple[float, float] = ...,
    *,
    return_final_states: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan of Mamba-2, "Transformers are SSMs" (Dao and Gu, 2024, arXiv 2405.21060): one decay for each head and step.

    With `dt = clamp(softplus(dt + dt_bias), *dt_limit)` (or without softplus), for every head and width p:
    `h_t = exp(dt_t A) h_{t-1} + dt_t x_{t,p} B_t`, `out_{t,p} = (C_t . h_t + D x_{t,p}) silu(z_{t,p})`.

    Args:
        x, z: (batch, length, heads, width). dt: (batch, length, heads). A: (heads,), real.
        B, C: (batch, length, groups, state); head k belongs to group k // (heads // groups).
        chunk_size: of the algorithm in mamba-ssm. Here it is accepted and checked; results do not depend on it.
        D: (heads,) or (heads, width). dt_bias: (heads,).
        initial_states: (batch, heads, width, state), the state before the first step; zero if None.
        seq_idx: (batch, length) int32 or int64, as in `selective_scan`.
        dt_softplus: whether dt is the softplus of dt + dt_bias. dt_limit: bounds of dt, applied last.
        return_final_states: whether to return the state after the last step too.

    Returns:
        out (batch, length, heads, width) in x's dtype; with `return_final_states` also (batch, heads, width, state) in
        float32 (float64 for float64 x). Both are differentiable, once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a chunk_size that is not positive,
            a dt_limit whose bounds are not in order.
        RuntimeError: as `selective_scan`.
    """
    op = "ssd_chunk_scan"
    check_rank(op, "x", x, ("(batch, length, heads, width)",))
    (batch, length, heads, width), device = x.shape, x.device
    for what, size in (("head", heads), ("channel of a head", width)):
        check_positive(op, "x", what, size)
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be a positive integer, got {chunk_size!r}")
    low, high = dt_limit
    if not low <= high:
        raise ValueError(f"{op}: dt_limit must be (low, high) with low <= high, got {dt_limit}")
    check_tensor(op, "dt", dt, "(batch, length, heads)", (batch, length, heads), device)
    check_tensor(op, "A", A, "(heads,)", (heads,), device)
    check_rank(op, "B", B, ("(batch, length, groups, state)",))
    groups, state = B.shape[2:]
    check_positive(op, "B", "state", state)
    for name, value in (("B", B), ("C", C)):
        dims = (batch, length, groups, state)
        check_tensor(op, name, value, "(batch, length, groups, state)", dims, device)
    if groups < 1 or heads % groups:
        raise ValueError(f"{op}: B has {groups} groups, which must divide the {heads} heads of x")
    if D is not None:
        _check_skip(op, D, heads, width, device)
    if z is not None:
        check_tensor(op, "z", z, "(batch, length, heads, width)", x.shape, device)
    if dt_bias is not None:
        check_tensor(op, "dt_bias", dt_bias, "(heads,)", (heads,), device)
    if initial_states is not None:
        dims = (batch, heads, width, state)
        check_tensor(op, "initial_states", initial_states, "(batch, heads, width, state)", dims, device)
    if seq_idx is not None:
        check_tensor(op, "seq_idx", seq_idx, "(batch, length)", (batch, length), device, INTEGER)
    if device.type == "cuda" and env.check():
        reference.check_values(op, A, seq_idx)
    needs_gradient = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, dt, A, B, C, D, z, dt_bias, initial_states)
    )
    chunk = CHUNK if needs_gradient else 0
    out, last, _ = _ssd(
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, dt_softplus, float(low), float(high), chunk
    )
    return (out, last) if return_final_states else out


# ---- linear_scan ----

_COMPLEX = (torch.complex64, torch.complex128)


def _recurrence_backward_reference(
    grad: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, ...]:
    grad_a, grad_x, grad_initial = reference.linear_scan_backward(grad, a, h, initial_state, reverse)
    initial = None if grad_initial is None else grad_initial.clone(memory_format=torch.contiguous_format)
    return _or_empty(h, h.dtype, (torch.empty_like(a).copy_(grad_a), torch.empty_like(h).copy_(grad_x), initial))


def _recurrence_backward_fake(
    grad: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, ...]:
    initial = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    return _or_empty(h, h.dtype, (torch.empty_like(a), torch.empty_like(h), initial))


_recurrence_backward = define(
    "linear_scan_backward(Tensor grad, Tensor a, Tensor h, Tensor? initial_state, bool reverse)"
    " -> (Tensor, Tensor, Tensor)",
    reference=_recurrence_backward_reference,
    fake=_recurrence_backward_fake,
)


def _recurrence_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, initial_state, ctx.reverse = inputs
    ctx.save_for_backward(a, initial_state, output)


def _recurrence_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, initial_state, h = ctx.saved_tensors
    grad_a, grad_x, grad_initial = _recurrence_backward(grad, a, h, initial_state, ctx.reverse)
    return grad_a, grad_x, None if initial_state is None else grad_initial, None


# Autocast leaves it alone: a decay near 1 would lose what it says, and a sum over all time its digits.
_recurrence = define(
    "linear_scan(Tensor a, Tensor x, Tensor? initial_state, bool reverse) -> Tensor",
    reference=lambda a, x, *args: torch.empty_like(x).copy_(reference.linear_scan(a, x, *args)),
    fake=lambda a, x, *args: torch.empty_like(x),
    setup_context=_recurrence_setup,
    backward=_recurrence_gradient,
)


def linear_scan(a: Tensor, x: Tensor, initial_state: Tensor | None = None, reverse: bool = False) -> Tensor:
    """Linear recurrence `h_t = a_t h_{t-1} + x_t`, each channel on its own: the core of HGRN, RG-LRU, LRU, minGRU, S4D.

    The scan of Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length" (2018), run step by
    step over many channels at once.

    Args:
        a, x: (batch, length, channels), real or complex64/complex128; a may be real where x is complex. Any strides;
            fast where channels or steps lie together; an expanded a is read as it is.
        initial_state: (batch, channels), the state before the first step; zero if None.
        reverse: from the last step to the first, `h_t = a_t h_{t+1} + x_t`.

    Returns:
        h (batch, length, channels) in x's dtype and stride order, computed in float32 (float64 for float64 x, complex
        as x). Differentiable, once; the gradients of complex arguments are torch's, with conjugates.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; complex a or initial_state where x
            is real.
    """
    op = "linear_scan"
    check_rank(op, "x", x, ("(batch, length, channels)",), FLOATING + _COMPLEX)
    (batch, length, channels), device = x.shape, x.device
    dtypes = FLOATING + _COMPLEX if x.is_complex() else FLOATING
    check_tensor(op, "a", a, "(batch, length, channels)", (batch, length, channels), device, dtypes)
    if initial_state is not None:
        check_tensor(op, "initial_state", initial_state, "(batch, channels)", (batch, channels), device, dtypes)
    if x.is_complex():
        a = a.to(x.dtype)
        initial_state = None if initial_state is None else initial_state.to(x.dtype)
    h: Tensor = _recurrence(a, x, initial_state, reverse)
    return h


# ---- s4d_kernel ----

_BLOCK = 64  # steps of the second factor of a Vandermonde matrix: as many as the first has at length 4096


def s4d_kernel(dt: Tensor, A: Tensor, C: Tensor, length: int) -> Tensor:
    """Convolution kernel of diagonal state spaces under zero-order hold, S4D (Gu et al., 2022, arXiv 2206.11893).

    `K_t = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(t dt A_n)`, for t from 0: what `h_t = exp(dt A) h_{t-1} +
    (exp(dt A) - 1) / A u_t`, `y_t = 2 Re sum_n C_n h_tn` make of a unit impulse.

    The Vandermonde matrix exp(t dt A_n) is never made: with t = 64 i + j it is a product of two small ones.

    Args:
        dt: (channels,), step sizes; float32 or float64. A, C: (channels, state), complex of the same precision; of each
            conjugate pair one. A must not be 0.
        length: number of steps.

    Returns:
        (channels, length) in dt's dtype, differentiable as often as wanted: it is made of torch's own operators.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; a negative length.
    """
    op = "s4d_kernel"
    check_rank(op, "dt", dt, ("(channels)",), (torch.float32, torch.float64))
    check_rank(op, "A", A, ("(channels, state)",), _COMPLEX)
    shape = (dt.shape[0], A.shape[1])
    for name, value in (("A", A), ("C", C)):
        check_tensor(
            op, name, value, "(channels, state)", shape, dt.device, (torch.promote_types(dt.dtype, torch.cfloat),)
        )
    if length < 0:
        raise ValueError(f"{op}: length must be at least 0, got {length}")
    step = dt.unsqueeze(1) * A  # d n
    weight = 2 * C * torch.expm1(step) / A
    blocks = torch.arange((length + _BLOCK - 1) // _BLOCK, device=dt.device, dtype=dt.dtype) * _BLOCK
    within = torch.arange(_BLOCK, device=dt.device, dtype=dt.dtype)
    first = weight.unsqueeze(1) * torch.exp(step.unsqueeze(1) * blocks[:, None])  # d i n
    second = torch.exp(step.unsqueeze(2) * within)  # d n j
    real = torch.cat([first.real, -first.imag], 2) @ torch.cat([second.real, second.imag], 1)
    return real.flatten(1)[:, :length]
