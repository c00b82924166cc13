"""The scan of Mamba-2, forward and backward."""

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from layerzoo import env
from layerzoo.ops._checks import INTEGER, check_positive, check_rank, check_tensor
from layerzoo.ops._define import define
from layerzoo.ops.ssm._results import or_empty
from layerzoo.reference import accumulate_dtype
from layerzoo.reference import ssm as reference
from layerzoo.reference.ssm import CHUNK

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
    return or_empty(x, acc, tuple(grads))


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

    return or_empty(
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
