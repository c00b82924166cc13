"""Which experts a token goes to: by its scores, in balance over a batch, or as the experts choose."""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from layerzoo.ops._checks import check_positive, check_rank, check_tensor
from layerzoo.ops._define import define
from layerzoo.reference import accumulate_dtype
from layerzoo.reference import moe as reference
from layerzoo.reference.moe import SCORES

Score = Literal["softmax", "sigmoid", "topk_softmax"]
Groups = tuple[int, int, Literal["top2", "max"]]


class RouteStats(NamedTuple):
    """What a batch did to its experts. Floating tensors are float32 (float64 for float64 logits).

    counts: (E,) int64: tokens that chose each expert, before any pair was dropped.
    importance: (E,): sum over tokens of the softmax, of the sigmoid over its sum in that token, or, for "topk_softmax",
        of the gates (Shazeer et al., 2017). Its sum is the number of tokens.
    load: (E,): counts / tokens. No gradient.
    z_loss: mean over tokens of logsumexp(logits)² (Zoph et al., 2022), without noise and bias.
    entropy: -sum m log(m) of m = importance / tokens.
    dropped: int64: pairs beyond the capacity.
    """

    counts: Tensor
    importance: Tensor
    load: Tensor
    z_loss: Tensor
    entropy: Tensor
    dropped: Tensor


def _fake(logits: Tensor, bias: Tensor | None, noise: Tensor | None, top_k: int, *args: Any) -> tuple[Tensor, ...]:
    (tokens, experts), acc, capacity = logits.shape, accumulate_dtype(logits), args[-2]

    def integers(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.int64)

    per_expert, scalars = ([logits.new_empty(shape, dtype=acc) for _ in range(2)] for shape in ((experts,), ()))
    return (
        logits.new_empty((tokens, top_k)),
        integers(tokens, top_k),
        integers(experts),
        *per_expert,
        *scalars,
        integers(),
        integers(tokens if capacity else 0, top_k),
    )


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    logits, noise, needed = args[4], args[5], args[-1]
    return tuple(
        x.new_empty(x.shape if x is not None and needed >> i & 1 else (0,))
        for i, x in enumerate((logits, logits if noise is None else noise))
    )


def _backward_reference(*args: Any) -> tuple[Tensor, Tensor]:
    grads, made = reference.moe_route_backward(*args[:-1]), _backward_fake(*args)
    for i, (grad, new) in enumerate(zip(grads, made, strict=True)):
        if args[-1] >> i & 1:
            new.copy_(grad)
    return made


_route_backward = define(
    "moe_route_backward(Tensor? grad_weights, Tensor? grad_importance, Tensor? grad_z_loss, Tensor? grad_entropy, "
    "Tensor logits, Tensor? noise, Tensor ids, Tensor chosen, Tensor importance, int score, bool normalize, "
    "float scale, int needed) -> (Tensor, Tensor)",
    reference=_backward_reference,
    fake=_backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, noise, _, score, _, _, _, normalize, scale, _, _ = inputs
    _, ids, counts, importance, load, _, _, dropped, chosen = output
    ctx.save_for_backward(logits, noise, ids, chosen, importance)
    ctx.options = score, normalize, scale
    ctx.mark_non_differentiable(ids, counts, load, dropped, chosen)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = [grads[i] for i in (0, 3, 5, 6)]
    needed = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
    given: list[Tensor | None] = [None] * 12
    if any(grad is not None for grad in wanted):
        made = _route_backward(*wanted, *ctx.saved_tensors, *ctx.options, needed[0] + 2 * needed[1])
        given[0], given[2] = (grad if need else None for grad, need in zip(made, needed, strict=True))
    return tuple(given)


_route = define(
    "moe_route(Tensor logits, Tensor? bias, Tensor? noise, int top_k, int score, int n_group, int topk_group, "
    "bool top2, bool normalize, float scale, SymInt capacity, bool by_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.moe_route,
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
)


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    bias: Tensor | None = None,
    groups: Groups | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    noise: Tensor | None = None,
    capacity: int | None = None,
    drop: Literal["position", "weight"] = "position",
) -> tuple[Tensor, Tensor, RouteStats]:
    """Each token's `top_k` experts and their weights.

    With h = logits + noise, a token's scores s are softmax(h), sigmoid(h), or h itself for "topk_softmax". It takes the
    experts with the largest s + bias, equal ones by the lowest id (without a bias by h, where nothing underflows), and
    weighs them by s, or, for "topk_softmax", by the softmax over those it took. So noisy top-k (Shazeer et al., 2017)
    is "topk_softmax" with noise, N(0, 1) times its softplus; Switch (Fedus et al., 2021) "softmax" with a capacity;
    Mixtral "topk_softmax", the same as "softmax" with `normalize`; DeepSeek-V3 "sigmoid" with bias, groups, normalize
    and scale.

    Args:
        logits: (T, E); float32, bfloat16, float16 or float64. Everything is computed in float32 (float64 for float64).
        top_k: experts for each token, 1 … E.
        bias: (E,): added for the choice only; it never enters the weights, and gets no gradient.
        groups: (n_group, topk_group, "top2" or "max"): the experts are n_group groups of neighbours; a token keeps the
            topk_group best, by the sum of the two largest s + bias in each or the largest, and chooses in these only.
        normalize: divides the weights of a token by their sum + 1e-20, before any is dropped.
        scale: multiplies the weights, last.
        noise: (T, E), added to logits for choice and weights alike; it gets a gradient.
        capacity: pairs that an expert takes; others are dropped: their id becomes E, their weight 0, and they get no
            gradient. None: no limit.
        drop: who comes first. "position": all first choices in the order of tokens, then all second ones, and so on
            (GShard, Lepikhin et al., 2020). "weight": the largest weights (V-MoE, Riquelme et al., 2021); equal ones by
            position, NaN last.

    Returns:
        weights (T, top_k) in the dtype of logits, ids (T, top_k) int64, by descending s + bias, and `RouteStats`.
        Differentiable by logits and noise are weights, importance, z_loss and entropy.

        NaN in h counts as -inf for the choice, so that ids are always distinct and in range; the weights of that token
        are NaN, and so are importance, z_loss and entropy, while other tokens keep their weights. A token whose softmax
        does not exist (+inf, or -inf throughout) is treated alike.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; top_k outside 1 … E; groups that
            do not divide E or keep fewer than top_k experts; scale not positive and finite; capacity below 1.
    """
    op = "moe_route"
    check_rank(op, "logits", logits, ("(T, E)",))
    tokens, experts = logits.shape
    check_positive(op, "logits", "expert", experts)
    if not 1 <= top_k <= experts:
        raise ValueError(f"{op}: top_k must be from 1 to E = {experts}, got {top_k}")
    if score not in SCORES:
        raise ValueError(f"{op}: score must be one of {', '.join(SCORES)}, got {score!r}")
    if bias is not None:
        check_tensor(op, "bias", bias, "(E,)", (experts,), logits.device)
    if noise is not None:
        check_tensor(op, "noise", noise, "(T, E) like logits", (tokens, experts), logits.device)
    n_group, topk_group, best = (1, 1, "max") if groups is None else groups
    if best not in ("top2", "max"):
        raise ValueError(f"{op}: groups must end in 'top2' or 'max', got {groups}")
    if n_group < 1 or experts % n_group:
        raise ValueError(f"{op}: groups must begin with a number that divides E = {experts}, got {groups}")
    if not 1 <= topk_group <= n_group or topk_group * experts // n_group < top_k:
        raise ValueError(
            f"{op}: groups must keep from 1 to {n_group} groups and at least top_k = {top_k} experts, got {groups}"
        )
    if not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"{op}: capacity must be at least 1 or None, got {capacity}")
    if drop not in ("position", "weight"):
        raise ValueError(f"{op}: drop must be 'position' or 'weight', got {drop!r}")
    weights, ids, *stats, _ = _route(
        logits,
        None if bias is None else bias.detach(),
        noise,
        top_k,
        SCORES.index(score),
        n_group,
        topk_group,
        best == "top2",
        normalize,
        float(scale),
        capacity or 0,
        drop == "weight",
    )
    return weights, ids, RouteStats(*stats)


_assignment = define(
    "moe_balanced_assignment(Tensor scores, float epsilon, int bids) -> Tensor",
    reference=reference.balanced_assignment,
    fake=lambda scores, epsilon, bids: scores.new_empty((scores.shape[0], 1), dtype=torch.int64),
    inference=True,
)


def balanced_assignment(scores: Tensor) -> Tensor:
    """One expert for each token, equally many for each expert, with the largest total score (BASE, Lewis et al., 2021).

    An auction (Bertsekas, 1992) with scaled eps: the total is at most T eps below the best one, eps being 1e-5 of the
    range of the scores. An auction that has not ended after 1000 bids a token in the mean is broken off, and the tokens
    then choose in turn at the prices it has reached. Deterministic. On CUDA it waits for the device.

    Args:
        scores: (T, E), floating. NaN and -inf count as the smallest finite score, +inf as the largest.

    Returns:
        ids (T, 1) int64, as `moe_experts` takes them. Each expert gets T / E tokens; where that is not whole, T % E of
        them get one more than the others. No gradient: take the weights from scores.gather(1, ids).

    Raises:
        TypeError, ValueError: scores of the wrong type, dtype or rank, or without experts.
    """
    op = "balanced_assignment"
    check_rank(op, "scores", scores, ("(T, E)",))
    check_positive(op, "scores", "expert", scores.shape[1])
    ids: Tensor = _assignment(scores.detach(), reference.ASSIGNMENT_EPSILON, reference.ASSIGNMENT_BIDS)
    return ids


def sinkhorn(logits: Tensor, n_iterations: int = 100, tolerance: float | None = None) -> Tensor:
    """The balanced plan nearest to exp(logits): diag(a) exp(logits) diag(b), rows sum to 1 / T, columns to 1 / E.

    Computed with logarithms (S-BASE, Clark et al., 2022), so that no logits overflow. Columns come last: their sums are
    exact, those of the rows as near as the iterations get. A router takes the top-k of the plan and weighs by the
    softmax or sigmoid of the logits.

    Args:
        logits: (T, E), floating. -inf forbids a pair; NaN, +inf, or a row or column of -inf alone make the plan NaN.
        n_iterations: at least 1; with `tolerance` the most there are.
        tolerance: stops when log(b) changes by less in the mean. It reads values: a graph breaks there, CUDA waits.

    Returns:
        (T, E) float32 (float64 for float64 logits). Differentiable, through every iteration; a router that does not
        need that calls it under torch.no_grad().

    Raises:
        TypeError, ValueError: logits of the wrong type, dtype or rank, or without experts; n_iterations below 1;
            tolerance not positive.
    """
    op = "sinkhorn"
    check_rank(op, "logits", logits, ("(T, E)",))
    tokens, experts = logits.shape
    check_positive(op, "logits", "expert", experts)
    if n_iterations < 1:
        raise ValueError(f"{op}: n_iterations must be at least 1, got {n_iterations}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"{op}: tolerance must be positive or None, got {tolerance}")
    z = logits.to(accumulate_dtype(logits))
    if tokens == 0:
        return z.clone()
    log_b = z.new_zeros(experts)
    for _ in range(n_iterations):
        log_a = -(z + log_b).logsumexp(1, keepdim=True) - math.log(tokens)
        before, log_b = log_b, -(z + log_a).logsumexp(0) - math.log(experts)
        if tolerance is not None and (log_b - before).abs().mean() < tolerance:
            break
    return (z + log_a + log_b).exp()


def expert_choice(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each expert takes the tokens that weigh it most (Zhou et al., 2022): as `moe_experts_ragged` takes them.

    Weights are a token's softmax over the experts. A token may be taken by any number of experts, or by none. What an
    expert takes depends on the whole batch: no router for a causal language model.

    Args:
        logits: (T, E), floating; computed in float32 (float64 for float64).
        capacity: tokens for each expert, at least 1; all T where there are fewer.

    Returns:
        With C = min(capacity, T): tokens (E C,) int64, weights (E C,) in the dtype of logits, offsets (E + 1,) int64.
        An expert's tokens go by descending weight, equal ones by the lowest token. Tokens with NaN come last, and weigh
        NaN where they are taken. Weights are differentiable.

    Raises:
        TypeError, ValueError: logits of the wrong type, dtype or rank, or without experts; capacity below 1.
    """
    op = "expert_choice"
    check_rank(op, "logits", logits, ("(T, E)",))
    tokens, experts = logits.shape
    check_positive(op, "logits", "expert", experts)
    if capacity < 1:
        raise ValueError(f"{op}: capacity must be at least 1, got {capacity}")
    taken = min(capacity, tokens)
    p = logits.to(accumulate_dtype(logits)).softmax(1).mT
    order = p.detach().nan_to_num(nan=-1.0).argsort(dim=1, descending=True, stable=True)[:, :taken]
    offsets = torch.arange(experts + 1, device=logits.device) * taken
    return order.reshape(-1), p.gather(1, order).reshape(-1).to(logits.dtype), offsets
