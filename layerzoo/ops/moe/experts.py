"""The experts of a mixture: sorting, both matrices, the gate between them and the weighted sum."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from layerzoo import env
from layerzoo.ops._checks import FLOATING, INTEGER, check_positive, check_rank, check_tensor
from layerzoo.ops._define import define
from layerzoo.reference import accumulate_dtype
from layerzoo.reference import moe as reference
from layerzoo.reference.moe import ACTIVATIONS

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

_INPUTS = (
    "Tensor x, Tensor ids, Tensor weights, Tensor? offsets, Tensor w13, Tensor w2, Tensor? b13, Tensor? b2, "
    "int activation, bool gated, bool transposed, bool interleaved, float alpha, float shift, float limit, int first"
)
_TENSORS = 8
_DIFFERENTIABLE = (0, 2, 4, 5, 6, 7)


def _fake(x: Tensor, ids: Tensor, weights: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    w13, transposed, save = args[1], args[7], args[-1]
    hidden = (weights.numel() if save else 0, w13.shape[2 if transposed else 1])
    return x.new_empty(x.shape), x.new_empty(hidden, dtype=accumulate_dtype(x))


def _backward_fake(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    like, needed = [args[0] if args[i] is None else args[i] for i in _DIFFERENTIABLE], args[-1]
    return tuple(
        x.new_empty((0,)) if not needed >> i & 1 else (torch.empty_like(x) if x.dim() == 3 else x.new_empty(x.shape))
        for i, x in enumerate(like)
    )


def _backward_reference(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    grads = reference.moe_experts_backward(grad_out, *args[:-1])
    return tuple(
        new.copy_(grad) if grad is not None and args[-1] >> i & 1 else new
        for i, (grad, new) in enumerate(zip(grads, _backward_fake(grad_out, *args), strict=True))
    )


_experts_backward = define(
    f"moe_experts_backward(Tensor grad_out, {_INPUTS}, Tensor hidden, int needed)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], output[1])
    ctx.options = inputs[_TENSORS:-1]
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *tensors, hidden = ctx.saved_tensors
    if hidden.shape[0] != tensors[2].numel():  # the op was called without keeping it
        hidden = _experts(*tensors, *ctx.options, True)[1]
    wanted = [tensors[i] is not None and ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    needed = sum(1 << i for i, want in enumerate(wanted) if want)
    grads = _experts_backward(grad_out, *tensors, *ctx.options, hidden, needed)
    given: list[Tensor | None] = [None] * (_TENSORS + len(ctx.options) + 1)
    for i, grad, want in zip(_DIFFERENTIABLE, grads, wanted, strict=True):
        given[i] = grad if want else None
    return tuple(given)


_experts = define(
    f"moe_experts({_INPUTS}, bool save) -> (Tensor, Tensor)",
    reference=reference.moe_experts,
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
)


def moe_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    activation: Activation = "silu",
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
    alpha: float | None = None,
    limit: float | None = None,
    expert_range: tuple[int, int] | None = None,
) -> Tensor:
    """Sends each token through its experts and adds up what they give: sum over k of weights[t, k] expert(x[t]).

    An expert is W2 a + b2 with a = activation(g) u and [g, u] = W13 x + b13; without a gate a = activation(W13 x + b13)
    (Shazeer et al., 2017; Shazeer, 2020). The matrices are read in place and once; nothing is copied to another type or
    layout. Same bits for any number of threads, and for a token whatever other tokens there are.

    Args:
        x: (tokens, H); float32, bfloat16, float16 or float64.
        ids: (tokens, k), int32 or int64, in [0, E]: E drops the pair, which adds nothing and gets no gradient. An
            expert may stand twice in a row; then both count.
        weights: (tokens, k), any floating dtype. A weight of 0 does not skip: 0 times infinity is NaN.
        w13: (E, 2 I, H), first all gates, then all ups; (E, I, H) where not `gated`. Its dtype may be another than
            that of x unless one is float64. w2: (E, H, I).
        activation: of g: "silu", "gelu" (by erf), "gelu_tanh", "relu" or "relu2" (its square).
        b13: (E, 2 I) or (E, I). b2: (E, H).
        transposed: w13 is (E, H, 2 I) and w2 (E, I, H).
        interleaved: gates and ups take turns: g0, u0, g1, u1, … (gpt-oss).
        alpha: a = g sigmoid(alpha g) (u + 1) instead; with "silu" only (gpt-oss: 1.702).
        limit: clamps g from above, u from both sides (gpt-oss: 7); gated experts only.
        expert_range: (begin, end): w13 holds the experts begin … end - 1 of many, and every id outside drops its pair:
            the part that one of several machines has.

    Returns:
        (tokens, H) in the dtype of x; sums are in float32 (float64 for float64).

    Differentiable by x, weights, w13, w2, b13 and b2. It keeps x and (tokens k, 2 I) in float32 for that.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a combination that is not said
            above.
        RuntimeError: an id out of range (kernels on CUDA drop the pair: set LAYERZOO_CHECK=1).
    """
    op = "moe_experts"
    check_rank(op, "x", x, ("(tokens, H)",))
    check_rank(op, "ids", ids, ("(tokens, k)",), INTEGER)
    tokens = x.shape[0]
    check_tensor(op, "ids", ids, "(tokens, k)", (tokens, ids.shape[1]), x.device, INTEGER)
    check_tensor(op, "weights", weights, "(tokens, k) like ids", tuple(ids.shape), x.device)
    first = -1
    if expert_range is not None:
        check_rank(op, "w13", w13, ("(E, 2 I, H)",))
        if not isinstance(expert_range, tuple | list):
            raise TypeError(f"{op}: expert_range must be (begin, end) or None, got {expert_range!r}")
        if len(expert_range) != 2 or expert_range[0] < 0 or expert_range[1] - expert_range[0] != w13.shape[0]:
            raise ValueError(
                f"{op}: expert_range must be (begin, end) with end - begin = {w13.shape[0]}, the first size of w13, "
                f"got {expert_range}"
            )
        first = expert_range[0]
    return _run(
        op, x, ids, weights, None, w13, w2, b13, b2, activation, gated, transposed, interleaved, alpha, limit, first
    )


def moe_experts_ragged(
    x: Tensor,
    tokens: Tensor,
    weights: Tensor,
    offsets: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    activation: Activation = "silu",
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
    alpha: float | None = None,
    limit: float | None = None,
) -> Tensor:
    """`moe_experts` where the experts choose: expert e takes tokens[offsets[e] : offsets[e + 1]].

    Args:
        tokens: (pairs,), int32 or int64, in [0, number of tokens); one may stand any number of times.
        weights: (pairs,).
        offsets: (E + 1,), int32 or int64, ascending from 0 to the number of pairs.
        x, w13, w2 and the rest: as in `moe_experts`. A token that nobody chose gets zeros.

    Raises:
        As `moe_experts`; RuntimeError for tokens or offsets out of range too, in the same places.
    """
    op = "moe_experts_ragged"
    check_rank(op, "x", x, ("(tokens, H)",))
    check_rank(op, "tokens", tokens, ("(pairs,)",), INTEGER)
    check_tensor(op, "tokens", tokens, "(pairs,)", tuple(tokens.shape), x.device, INTEGER)
    check_tensor(op, "weights", weights, "(pairs,) like tokens", tuple(tokens.shape), x.device)
    check_rank(op, "w13", w13, ("(E, 2 I, H)",))
    check_tensor(op, "offsets", offsets, "(E + 1,)", (w13.shape[0] + 1,), x.device, INTEGER)
    return _run(
        op, x, tokens, weights, offsets, w13, w2, b13, b2, activation, gated, transposed, interleaved, alpha, limit, -1
    )


def _run(
    op: str,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    offsets: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    activation: str,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    alpha: float | None,
    limit: float | None,
    first: int,
) -> Tensor:
    _check_experts(op, x, w13, w2, b13, b2, gated, transposed)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not gated and (interleaved or alpha is not None or limit is not None):
        raise ValueError(f"{op}: interleaved, alpha and limit are for gated experts, got gated=False")
    if alpha is not None and activation != "silu":
        raise ValueError(f"{op}: alpha must be None unless activation is 'silu', got {alpha} with {activation!r}")
    if limit is not None and not limit > 0:
        raise ValueError(f"{op}: limit must be positive or None, got {limit}")
    if x.is_cuda and env.check():
        reference.pairs_by_expert(x.shape[0], ids, offsets, w13.shape[0], first)
    inputs = (x, ids, weights, offsets, _readable(w13), _readable(w2), b13, b2)
    trained = [t for i in _DIFFERENTIABLE if (t := inputs[i]) is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in trained)
    out: Tensor = _experts(
        *inputs,
        ACTIVATIONS.index(activation),
        gated,
        transposed,
        interleaved,
        1.0 if alpha is None else float(alpha),
        0.0 if alpha is None else 1.0,
        math.inf if limit is None else float(limit),
        first,
        save,
    )[0]
    return out


def _check_experts(
    op: str,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    gated: bool,
    transposed: bool,
) -> None:
    names = {True: ("(E, H, 2 I)", "(E, I, H)"), False: ("(E, 2 I, H)", "(E, H, I)")}[transposed]
    if not gated:
        names = (names[0].replace("2 I", "I"), names[1])
    check_rank(op, "w13", w13, (names[0],))
    check_rank(op, "w2", w2, (names[1],))
    experts, hidden = w13.shape[0], x.shape[1]
    inner = w2.shape[1 if transposed else 2]
    width = 2 * inner if gated else inner
    kinds = (torch.float64,) if x.dtype == torch.float64 else tuple(d for d in FLOATING if d != torch.float64)
    shape13 = (experts, hidden, width) if transposed else (experts, width, hidden)
    shape2 = (experts, inner, hidden) if transposed else (experts, hidden, inner)
    check_tensor(op, "w13", w13, names[0], shape13, x.device, kinds)
    check_tensor(op, "w2", w2, names[1], shape2, x.device, kinds)
    check_positive(op, "w13", "expert", experts)
    if b13 is not None:
        check_tensor(op, "b13", b13, f"(E, {'2 I' if gated else 'I'})", (experts, width), x.device)
    if b2 is not None:
        check_tensor(op, "b2", b2, "(E, H)", (experts, hidden), x.device)


def _readable(w: Tensor) -> Tensor:
    """Kernels read any layout in which the rows or the columns of a matrix lie together."""
    return w if 1 in (w.stride(1), w.stride(2)) or min(w.shape[1:]) <= 1 else w.contiguous()
