"""The scan of Mamba, forward and backward."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from layerzoo import env
from layerzoo.ops._checks import INTEGER, check_positive, check_rank, check_tensor
from layerzoo.ops._define import define
from layerzoo.ops.ssm._results import laid_out, new, or_empty
from layerzoo.reference import accumulate_dtype
from layerzoo.reference import ssm as reference
from layerzoo.reference.ssm import CHUNK


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


def _scan_backward_reference(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _states = args
    u, delta, A, B, C, _, z = inputs[2:9]
    acc = accumulate_dtype(u)
    grads = list(reference.selective_scan_backward(*inputs))
    for i, like in ((0, u), (1, delta), (3, B), (4, C), (6, z)):
        grads[i] = laid_out(like, grads[i])
    initial = u.new_empty((0, *A.shape), dtype=acc) if grads[8] is None else grads[8]
    grads[8] = initial.clone(memory_format=torch.contiguous_format)
    return or_empty(u, acc, tuple(grads))


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

    return or_empty(
        u,
        acc,
        (
            torch.empty_like(u),
            torch.empty_like(delta),
            plain(A),
            new(B),
            new(C),
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
