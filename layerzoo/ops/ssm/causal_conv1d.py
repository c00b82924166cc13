"""Depthwise causal convolution of whole sequences, and of the next inputs, in place on those before them."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from layerzoo import env
from layerzoo.ops._checks import INTEGER, check_no_gradient, check_positive, check_rank, check_tensor, check_writable
from layerzoo.ops._define import define
from layerzoo.ops.ssm._results import laid_out, or_empty
from layerzoo.reference import ssm as reference

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
    grads[0] = laid_out(x, grads[0])
    grads[3] = laid_out(initial, grads[3])
    return or_empty(x, x.dtype, tuple(grads))


def _conv_backward_fake(
    grad_out: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    return or_empty(
        x,
        x.dtype,
        (
            torch.empty_like(x),
            weight.new_empty(weight.shape),
            None if bias is None else bias.new_empty(bias.shape),
            None if initial is None else torch.empty_like(initial),
        ),
    )


_CONV_INPUTS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? seq_idx, Tensor? initial_states, bool silu, bool reverse=False"
)

_conv_backward = define(
    f"causal_conv1d_backward(Tensor grad_out, Tensor? grad_final_states, {_CONV_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_conv_backward_reference,
    fake=_conv_backward_fake,
)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.silu, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _conv_gradient(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, seq_idx, initial = ctx.saved_tensors
    if grad_out is None and grad_final is None:
        return (None,) * 7
    if grad_out is None:
        grad_out = torch.zeros_like(x)
    gx, gweight, gbias, ginitial = _conv_backward(
        grad_out, grad_final, x, weight, bias, seq_idx, initial, ctx.silu, ctx.reverse
    )
    return gx, gweight, None if bias is None else gbias, None, None if initial is None else ginitial, None, None


_conv = define(
    f"causal_conv1d({_CONV_INPUTS}) -> (Tensor, Tensor)",
    reference=_conv_reference,
    fake=_conv_fake,
    setup_context=_conv_setup,
    backward=_conv_gradient,
    autocast=(0,),
)


def _turned(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flip(-1)


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
    *,
    reverse: bool = ...,
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
    reverse: bool = ...,
) -> tuple[Tensor, Tensor]: ...
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    activation: str | None = None,
    *,
    reverse: bool = False,
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
        reverse: the same with time turned round, `out_t = act(bias + sum_k weight_k x_{t + width - 1 - k})`; the
            initial states then stand right of the last step, the final ones are the first inputs, both in the order of
            time. On CUDA it costs copies.

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
    silu = _silu(op, activation)
    if reverse and x.is_cuda:  # where the kernel goes one way only
        x, seq_idx, initial_states = x.flip(2), _turned(seq_idx), _turned(initial_states)
        out, final = (y.flip(2) for y in _conv(x, weight, bias, seq_idx, initial_states, silu))
    else:
        out, final = _conv(x, weight, bias, seq_idx, initial_states, silu, reverse)
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
