"""Which experts a token goes to."""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from layerzoo.ops._checks import check_positive, check_rank, check_tensor
from layerzoo.ops._define import define
from layerzoo.reference import moe as reference
from layerzoo.reference.moe import SCORES
from layerzoo.reference.ssm import accumulate_dtype

_ROUTE = "Tensor logits, int top_k, int score, Tensor? bias, int groups, int topk_group, bool top2, bool normalize, "


class RouteStats(NamedTuple):
    """What `moe_route` says besides weights and ids, for T tokens and E experts; float32, float64 for float64.

    `counts` (E,) int64: pairs of each expert, before any was dropped; `load` (E,): the same over T.
    `importance` (E,): sums over tokens of the probabilities, which add up to 1 for a token. `z_loss`: mean squared
    log-sum-exp of the logits. `entropy`: of the mean probabilities, in nats. `dropped`: how many pairs, int64.
    Gradients go through importance, z_loss and entropy.
    """

    counts: Tensor
    importance: Tensor
    load: Tensor
    z_loss: Tensor
    entropy: Tensor
    dropped: Tensor


def _fake(logits: Tensor, top_k: int, *args: Any) -> tuple[Tensor, ...]:
    (tokens, experts), acc, capacity = logits.shape, accumulate_dtype(logits), args[-2]
    return (
        logits.new_empty((tokens, top_k)),
        logits.new_empty((tokens, top_k), dtype=torch.int64),
        logits.new_empty((tokens if capacity > 0 else 0, top_k), dtype=torch.int64),
        logits.new_empty((experts,), dtype=torch.int64),
        logits.new_empty((experts,), dtype=acc),
        logits.new_empty((tokens,), dtype=acc),
        logits.new_empty((), dtype=torch.int64),
    )


_route_backward = define(
    "moe_route_backward(Tensor grad_weights, Tensor? grad_importance, Tensor? grad_lse, Tensor logits, Tensor ids, "
    "Tensor chosen, Tensor lse, int score, Tensor? noise, bool normalize, float scale) -> Tensor",
    reference=reference.moe_route_backward,
    fake=lambda grad_weights, grad_importance, grad_lse, logits, *args: logits.new_empty(logits.shape),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.score, _, _, _, _, ctx.normalize, ctx.scale, noise, _, _ = inputs
    _, ids, chosen, counts, _, lse, dropped = output
    ctx.save_for_backward(logits, ids, chosen, lse, noise)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(ids, chosen, counts, dropped)


def _gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, ids, chosen, lse, noise = ctx.saved_tensors
    of_weights, of_importance, of_lse = grads[0], grads[4], grads[5]
    if of_weights is None:
        of_weights = logits.new_zeros(ids.shape)
    grad = _route_backward(
        of_weights, of_importance, of_lse, logits, ids, chosen, lse, ctx.score, noise, ctx.normalize, ctx.scale
    )
    of_noise = grad.to(noise.dtype) if noise is not None and ctx.needs_input_grad[9] else None
    return (grad, None, None, None, None, None, None, None, None, of_noise, None, None)


_route = define(
    f"moe_route({_ROUTE} float scale, Tensor? noise, int capacity, bool by_weight)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.moe_route,
    fake=_fake,
    setup_context=_setup,
    backward=_gradient,
)

_balanced_assignment = define(
    "balanced_assignment(Tensor scores) -> Tensor",
    reference=reference.balanced_assignment,
    fake=lambda scores: scores.new_empty((scores.shape[0], 1), dtype=torch.int64),
)


def moe_route(
    logits: Tensor,
    top_k: int,
    *,
    score: Literal["softmax", "sigmoid", "topk_softmax"] = "softmax",
    bias: Tensor | None = None,
    groups: tuple[int, int, Literal["top2", "max"]] | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    noise: Tensor | None = None,
    capacity: int | None = None,
    drop: Literal["position", "weight"] = "position",
) -> tuple[Tensor, Tensor, RouteStats]:
    """Chooses top_k experts for each token, and says how much each of them counts.

    Args:
        logits: (T, E); float32, bfloat16, float16 or float64.
        top_k: experts for each token, in [1, E].
        score: "softmax": the probabilities, best first (Fedus et al., 2021). "sigmoid": of each logit by itself
            (DeepSeek-AI, 2024). "topk_softmax": the largest logits, and the softmax over these alone (Jiang et al.,
            2024); the same as "softmax" with `normalize`, but exact where all the probabilities are tiny.
        bias: (E,), added for the choice and never part of a weight; no gradient.
        groups: (n, m, how): the experts stand in n groups of E / n, and only those of the best m are chosen. A group is
            as good as the sum of its two best experts ("top2") or its best one ("max").
        normalize: divide the weights of a token by their sum + 1e-20. scale: factor of all weights, after that.
        noise: (T, E), added to the logits for everything: choice, weights and statistics. For noisy top-k (Shazeer et
            al., 2017) it is a normal sample times the learned spread.
        capacity: at most so many tokens for an expert; None: any number. Other pairs are dropped: id E, weight 0, no
            gradient; the weights that stay are not changed.
        drop: who is dropped. "position": first choices of all tokens come before second ones, and earlier tokens before
            later ones. "weight": larger weights come first.

    Returns:
        (weights, ids, stats): (T, top_k) in the dtype of the logits; (T, top_k) int64, best first; `RouteStats`.

    Of equal scores the lowest id is chosen. NaN comes last, like minus infinity, so ids are always different and in
    range, and all weights of that token are NaN; no other token changes.

    Differentiable by logits and noise. All is computed in float32 (float64 for float64), the same for any number of
    threads.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; top_k or capacity out of range;
            groups that do not divide E or have less than top_k experts in all.
    """
    op = "moe_route"
    check_rank(op, "logits", logits, ("(T, E)",))
    tokens, experts = logits.shape
    check_positive(op, "logits", "expert", experts)
    if not 1 <= top_k <= experts:
        raise ValueError(f"{op}: top_k must be in [1, E = {experts}], got {top_k}")
    if score not in SCORES:
        raise ValueError(f"{op}: score must be one of {', '.join(SCORES)}, got {score!r}")
    if bias is not None:
        check_tensor(op, "bias", bias, "(E,)", (experts,), logits.device)
        bias = bias.detach()
    if noise is not None:
        check_tensor(op, "noise", noise, "(T, E)", (tokens, experts), logits.device)
    if capacity is not None and capacity < 1:
        raise ValueError(f"{op}: capacity must be at least 1 or None, got {capacity}")
    if drop not in ("position", "weight"):
        raise ValueError(f"{op}: drop must be 'position' or 'weight', got {drop!r}")
    count, kept, how = groups or (1, 1, "max")
    if count < 1 or experts % count or not 1 <= kept <= count or kept * (experts // count) < top_k:
        raise ValueError(
            f"{op}: groups must be (n, m, how) with n a divisor of E = {experts} and m of them holding at least "
            f"top_k = {top_k} experts, got {groups}"
        )
    if how not in ("top2", "max"):
        raise ValueError(f"{op}: groups must end with 'top2' or 'max', got {groups}")
    weights, ids, _, counts, importance, lse, dropped = _route(
        logits,
        top_k,
        SCORES.index(score),
        bias,
        count,
        kept,
        how == "top2",
        normalize,
        float(scale),
        noise,
        capacity or 0,
        drop == "weight",
    )
    mean = importance / max(tokens, 1)
    stats = RouteStats(
        counts=counts,
        importance=importance,
        load=counts.to(importance.dtype) / max(tokens, 1),
        z_loss=lse.square().sum() / max(tokens, 1),
        entropy=-torch.special.xlogy(mean, mean).sum(),
        dropped=dropped,
    )
    return weights, ids, stats


def balanced_assignment(scores: Tensor) -> Tensor:
    """Gives each token one expert so that the sum of the scores is largest and no expert has more than its share.

    The linear assignment of BASE layers (Lewis et al., 2021) by an auction (Bertsekas and Castañón, 1989). The sum is
    within T 1e-5 of the best one, relative to the range of the scores, 0 included.

    Args:
        scores: (T, E), floating; on a GPU they are taken to the CPU and back. What is not finite counts as the largest
            (infinity) or the smallest (minus infinity, NaN) of the finite ones and 0.

    Returns:
        (T, 1) int64. Every expert has T / E tokens where that is a whole number, else at most that, rounded up. No
        gradient.

    Raises:
        TypeError, ValueError: scores of the wrong type or shape, or without experts.
    """
    op = "balanced_assignment"
    check_rank(op, "scores", scores, ("(T, E)",))
    check_positive(op, "scores", "expert", scores.shape[1])
    ids: Tensor = _balanced_assignment(scores.detach().cpu())
    return ids.to(scores.device)


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """Shares out each token so that the experts get equal amounts: rows of the transport plan nearest to the logits.

    The balanced choice of S-BASE (Clark et al., 2022), in the log domain, by a fixed number of rounds.

    Args:
        logits: (T, E), floating. iterations: rounds of scaling columns, then rows; at least 1.

    Returns:
        (T, E) in float32 (float64 for float64): rows sum to 1, columns to T / E but for what the rounds have left.
        Differentiable by torch.

    Raises:
        TypeError, ValueError: logits of the wrong type or shape, iterations below 1.
    """
    op = "sinkhorn"
    check_rank(op, "logits", logits, ("(T, E)",))
    if iterations < 1:
        raise ValueError(f"{op}: iterations must be at least 1, got {iterations}")
    z = logits.to(accumulate_dtype(logits))
    if not z.shape[0]:
        return z
    share = math.log(z.shape[0]) - math.log(max(z.shape[1], 1))
    rows = z.new_zeros(z.shape[0], 1)
    for _ in range(iterations):
        columns = share - (z + rows).logsumexp(dim=0, keepdim=True)
        rows = -(z + columns).logsumexp(dim=1, keepdim=True)
    return (z + rows + columns).exp()


def expert_choice(logits: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every expert takes the `capacity` tokens that are most probable for it (Zhou et al., 2022).

    Not causal: a later token can take the place of an earlier one.

    Args:
        logits: (T, E), floating. capacity: tokens of each expert, in [1, T].

    Returns:
        (tokens, weights, offsets) as `moe_experts_ragged` takes them: (E capacity,) int64, of equals the first ones;
        (E capacity,) in the dtype of the logits, the token's probability of that expert, differentiable; (E + 1,).

    Raises:
        TypeError, ValueError: logits of the wrong type or shape, or without experts; a capacity out of range.
    """
    op = "expert_choice"
    check_rank(op, "logits", logits, ("(T, E)",))
    tokens, experts = logits.shape
    check_positive(op, "logits", "expert", experts)
    if not 1 <= capacity <= tokens:
        raise ValueError(f"{op}: capacity must be in [1, T = {tokens}], got {capacity}")
    probability = logits.to(accumulate_dtype(logits)).softmax(dim=1).T
    chosen = torch.sort(probability.detach(), dim=1, descending=True, stable=True).indices[:, :capacity]
    weights = probability.gather(1, chosen).flatten().to(logits.dtype)
    return chosen.flatten(), weights, capacity * torch.arange(experts + 1, device=logits.device)
