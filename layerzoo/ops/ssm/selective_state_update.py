"""One step of the scans of Mamba and Mamba-2, in place on a state."""

from typing import Any

import torch
from torch import Tensor

from layerzoo import env
from layerzoo.ops._checks import INTEGER, check_no_gradient, check_positive, check_rank, check_tensor, check_writable
from layerzoo.ops._define import define
from layerzoo.reference import ssm as reference


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
