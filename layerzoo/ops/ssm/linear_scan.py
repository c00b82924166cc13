"""The linear recurrence, real or complex, forward and backward."""

from typing import Any

import torch
from torch import Tensor

from layerzoo.ops._checks import COMPLEX, FLOATING, check_rank, check_tensor
from layerzoo.ops._define import define
from layerzoo.ops.ssm._results import or_empty
from layerzoo.reference import ssm as reference


def _recurrence_backward_reference(
    grad: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, ...]:
    grad_a, grad_x, grad_initial = reference.linear_scan_backward(grad, a, h, initial_state, reverse)
    initial = None if grad_initial is None else grad_initial.clone(memory_format=torch.contiguous_format)
    return or_empty(h, h.dtype, (torch.empty_like(a).copy_(grad_a), torch.empty_like(h).copy_(grad_x), initial))


def _recurrence_backward_fake(
    grad: Tensor, a: Tensor, h: Tensor, initial_state: Tensor | None, reverse: bool
) -> tuple[Tensor, ...]:
    initial = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    return or_empty(h, h.dtype, (torch.empty_like(a), torch.empty_like(h), initial))


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
    check_rank(op, "x", x, ("(batch, length, channels)",), FLOATING + COMPLEX)
    (batch, length, channels), device = x.shape, x.device
    dtypes = FLOATING + COMPLEX if x.is_complex() else FLOATING
    check_tensor(op, "a", a, "(batch, length, channels)", (batch, length, channels), device, dtypes)
    if initial_state is not None:
        check_tensor(op, "initial_state", initial_state, "(batch, channels)", (batch, channels), device, dtypes)
    if x.is_complex():
        a = a.to(x.dtype)
        initial_state = None if initial_state is None else initial_state.to(x.dtype)
    h: Tensor = _recurrence(a, x, initial_state, reverse)
    return h
