"""The mixture-of-experts ops in plain PyTorch: what runs without kernels, and what the kernels are compared with."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from layerzoo.reference import accumulate_dtype

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def activate(name: str, g: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The activation of g and its derivative; silu is g sigmoid(alpha g)."""
    if name == "silu":
        s = torch.sigmoid(alpha * g)
        return g * s, s * (1 + alpha * g * (1 - s))
    if name == "gelu":
        below = 0.5 * torch.erfc(-g * math.sqrt(0.5))
        return g * below, below + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        root, cube = 2 * math.sqrt(2 / math.pi), 0.044715
        s = torch.sigmoid(root * g * (1 + cube * g * g))
        return g * s, s * (1 + (1 - s) * root * g * (1 + 3 * cube * g * g))
    r = F.relu(g)
    return (r, (g > 0).to(g.dtype)) if name == "relu" else (r * r, 2 * r)


def _gate(
    g: Tensor, u: Tensor | None, name: str, alpha: float, shift: float, limit: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the second matrix gets, and its derivatives by g and u."""
    if u is None:
        return (*activate(name, g, alpha), None)
    y, slope = activate(name, g.clamp(max=limit), alpha)
    up = u.clamp(-limit, limit) + shift
    return y * up, slope * up * (g <= limit), y * (u.abs() <= limit)


def pairs_by_expert(
    count: int, ids: Tensor, offsets: Tensor | None, experts: int, first: int
) -> tuple[Tensor, Tensor, list[int]]:
    """The pairs that are kept, sorted by expert, the token of each, and where each expert's begin and end.

    Raises RuntimeError where a pair is of no expert that there is, or of none of the `count` tokens.
    """
    if offsets is None:
        local = ids.reshape(-1).long() - max(first, 0)
        bad = (ids.reshape(-1) < 0) | (local > experts) if first < 0 else ids.reshape(-1) < 0
        if bad.any():
            at = int(bad.nonzero()[0])
            raise RuntimeError(
                f"moe_experts: ids must be in [0, {experts}], where {experts} drops the pair, "
                f"got {int(ids.reshape(-1)[at])} for token {at // ids.shape[1]}"
            )
        local = torch.where((local < 0) | (local > experts), experts, local)
        pairs = torch.argsort(local, stable=True)[: int((local < experts).sum())]
        counts = torch.bincount(local, minlength=experts + 1)[:experts]
        return pairs, pairs // ids.shape[1], [0, *counts.cumsum(0).tolist()]
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != ids.numel():
        raise RuntimeError(
            f"moe_experts: offsets must go from 0 to {ids.numel()}, the number of tokens, got {ends[0]} to {ends[-1]}"
        )
    if any(a > b for a, b in itertools.pairwise(ends)):
        raise RuntimeError(f"moe_experts: offsets must not descend, got {ends}")
    bad = (ids < 0) | (ids >= count)
    if bad.any():
        raise RuntimeError(f"moe_experts: tokens must be in [0, {count}), got {int(ids[bad][0])}")
    return torch.arange(ids.numel(), device=ids.device), ids.long(), ends


def moe_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    offsets: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    activation: int,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    alpha: float,
    shift: float,
    limit: float,
    first: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """out (tokens, H), and what the backward pass needs: the hidden layer before its gate, one row for each pair."""
    acc, experts = accumulate_dtype(x), w13.shape[0]
    pairs, tokens, ends = pairs_by_expert(x.shape[0], ids, offsets, experts, first)
    w = weights.reshape(-1)[pairs].to(acc)
    hidden = x.new_zeros((weights.numel() if save else 0, w13.shape[2 if transposed else 1]), dtype=acc)
    out = x.new_zeros(x.shape, dtype=acc)
    for e in range(experts):
        rows = slice(ends[e], ends[e + 1])
        up, down = (matrix[e].to(acc).mT if transposed else matrix[e].to(acc) for matrix in (w13, w2))
        h = F.linear(x[tokens[rows]].to(acc), up, None if b13 is None else b13[e].to(acc))
        if interleaved:
            h = torch.cat([h[:, ::2], h[:, 1::2]], dim=1)
        if save:
            hidden[rows] = h
        a, _, _ = _gate(*_halves(h, gated), ACTIVATIONS[activation], alpha, shift, limit)
        y = F.linear(a, down, None if b2 is None else b2[e].to(acc))
        out.index_add_(0, tokens[rows], y * w[rows, None])
    return out.to(x.dtype), hidden


def _halves(h: Tensor, gated: bool) -> tuple[Tensor, Tensor | None]:
    if not gated:
        return h, None
    g, u = h.chunk(2, dim=1)
    return g, u


def moe_experts_backward(
    grad_out: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    offsets: Tensor | None,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    activation: int,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    alpha: float,
    shift: float,
    limit: float,
    first: int,
    hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, weights, w13, w2, b13 and b2."""
    acc, experts = accumulate_dtype(x), w13.shape[0]
    pairs, tokens, ends = pairs_by_expert(x.shape[0], ids, offsets, experts, first)
    w = weights.reshape(-1).to(acc)
    grad_x, grad_w = x.new_zeros(x.shape, dtype=acc), torch.zeros_like(w)
    grad_w13, grad_w2 = torch.zeros_like(w13), torch.zeros_like(w2)
    grad_b13, grad_b2 = (None if b is None else torch.zeros_like(b) for b in (b13, b2))
    for e in range(experts):
        rows = slice(ends[e], ends[e + 1])
        up, down = (matrix[e].to(acc).mT if transposed else matrix[e].to(acc) for matrix in (w13, w2))
        one, go = x[tokens[rows]].to(acc), grad_out[tokens[rows]].to(acc)
        weight = w[pairs[rows], None]
        g, u = _halves(hidden[rows], gated)
        a, by_g, by_u = _gate(g, u, ACTIVATIONS[activation], alpha, shift, limit)
        grad_a = go @ down
        grad_w[pairs[rows]] = (grad_a * a).sum(1) + (0 if b2 is None else go @ b2[e].to(acc))
        grad_h = weight * grad_a * by_g
        if by_u is not None:
            both = (grad_h, weight * grad_a * by_u)
            grad_h = torch.stack(both, dim=2).flatten(1) if interleaved else torch.cat(both, dim=1)
        grad_x.index_add_(0, tokens[rows], grad_h @ up)
        grad_up, grad_down = grad_h.mT @ one, go.mT @ (weight * a)
        grad_w13[e] = grad_up.mT if transposed else grad_up
        grad_w2[e] = grad_down.mT if transposed else grad_down
        if grad_b13 is not None:
            grad_b13[e] = grad_h.sum(0)
        if grad_b2 is not None:
            grad_b2[e] = (weight * go).sum(0)
    return grad_x.to(x.dtype), grad_w.to(weights.dtype).view_as(weights), grad_w13, grad_w2, grad_b13, grad_b2


SCORES = ("softmax", "sigmoid", "topk_softmax")
TINY = 1e-20  # added to what weights are divided by


def _probabilities(h: Tensor, score: str) -> Tensor:
    """(T, E): what each expert's score is among all; a row with NaN is NaN."""
    if score == "sigmoid":
        return torch.where(h.isnan().any(1, keepdim=True), math.nan, torch.sigmoid(h))
    return F.softmax(h, dim=1)


def _chosen(
    h: Tensor, p: Tensor, bias: Tensor | None, top_k: int, n_group: int, topk_group: int, top2: bool, score: str
) -> Tensor:
    """Ids of the `top_k` largest, ties by the lowest id. Without a bias by h itself, which has fewer ties than p."""
    scored = h if score == "topk_softmax" else p
    if bias is not None:
        scored = scored + bias.to(h.dtype)
    choice, scored = (torch.where(x.isnan(), -math.inf, x) for x in (h if bias is None else scored, scored))
    order = choice.argsort(dim=1, descending=True, stable=True)
    if topk_group < n_group:
        size = h.shape[1] // n_group
        group = (scored if top2 else choice).unflatten(1, (n_group, size))
        group = group.topk(2).values.sum(2) if top2 and size > 1 else group.amax(2)
        group = torch.where(group.isnan(), -math.inf, group)
        keep = group.argsort(dim=1, descending=True, stable=True)[:, :topk_group]
        masked = torch.ones_like(group, dtype=torch.uint8).scatter(1, keep, 0).repeat_interleave(size, 1)
        order = order.gather(1, masked.gather(1, order).argsort(dim=1, stable=True))
    return order[:, :top_k].contiguous()


def _gates(h: Tensor, p: Tensor, ids: Tensor, score: str) -> Tensor:
    if score != "topk_softmax":
        return p.gather(1, ids)
    return torch.where(h.isnan().any(1, keepdim=True), math.nan, F.softmax(h.gather(1, ids), dim=1))


def _kept(ids: Tensor, weights: Tensor, counts: Tensor, capacity: int, by_weight: bool) -> Tensor:
    """(T, k): is the pair among the first `capacity` of its expert?"""
    flat = ids.mT.reshape(-1)  # all first choices before all second ones
    order = torch.arange(flat.numel(), device=ids.device)
    if by_weight:
        order = weights.nan_to_num(nan=-1.0).mT.reshape(-1).argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(flat.numel(), device=ids.device) - first[flat[order]]
    return (rank < capacity).view(ids.shape[1], ids.shape[0]).mT.contiguous()


def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    top_k: int,
    score: int,
    n_group: int,
    topk_group: int,
    top2: bool,
    normalize: bool,
    scale: float,
    capacity: int,
    by_weight: bool,
) -> tuple[Tensor, ...]:
    """weights, ids, the six statistics, and the ids before any pair is dropped (where `capacity` is not 0)."""
    acc, name, (tokens, experts) = accumulate_dtype(logits), SCORES[score], logits.shape
    clean = logits.to(acc)
    h = clean if noise is None else clean + noise.to(acc)
    p = _probabilities(h, name)
    ids = _chosen(h, p, bias, top_k, n_group, topk_group, top2, name)
    gates = _gates(h, p, ids, name)
    if name == "softmax":
        importance = p.sum(0)
    elif name == "sigmoid":
        importance = (p / (p.sum(1, keepdim=True) + TINY)).sum(0)
    else:
        importance = torch.zeros_like(p).scatter(1, ids, gates).sum(0)
    weights = scale * (gates / (gates.sum(1, keepdim=True) + TINY) if normalize else gates)
    counts = torch.zeros(experts, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add_(0, ids.reshape(-1), torch.ones_like(ids).reshape(-1))
    rows = max(tokens, 1)
    mean = importance / rows
    entropy = -(mean * mean.clamp_min(torch.finfo(acc).tiny).log()).sum()
    z_loss = _log_sum_exp(clean).square().sum() / rows
    chosen, dropped = ids.new_empty((0, top_k)), counts.new_zeros(())
    if capacity:
        kept = _kept(ids, weights, counts, capacity, by_weight)
        chosen, dropped = ids, ids.numel() - kept.sum()
        weights, ids = torch.where(kept, weights, 0), torch.where(kept, ids, experts)
    return weights.to(logits.dtype), ids, counts, importance, counts.to(acc) / rows, z_loss, entropy, dropped, chosen


def _log_sum_exp(x: Tensor) -> Tensor:
    """Not torch's, which knows infinite sums: here a row without a softmax has no sum either."""
    top = x.amax(1, keepdim=True)
    return top.squeeze(1) + (x - top).exp().sum(1).log()


def moe_route_backward(
    grad_weights: Tensor | None,
    grad_importance: Tensor | None,
    grad_z_loss: Tensor | None,
    grad_entropy: Tensor | None,
    logits: Tensor,
    noise: Tensor | None,
    ids: Tensor,
    chosen: Tensor,
    importance: Tensor,
    score: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of logits and noise, in float32 (float64 for float64)."""
    acc, name, (tokens, experts) = accumulate_dtype(logits), SCORES[score], logits.shape
    rows = max(tokens, 1)
    clean = logits.to(acc)
    h = clean if noise is None else clean + noise.to(acc)
    by_importance = torch.zeros_like(importance) if grad_importance is None else grad_importance
    if grad_entropy is not None:
        mean = (importance / rows).clamp_min(torch.finfo(acc).tiny)
        by_importance = by_importance - grad_entropy / rows * (mean.log() + 1)
    kept, chosen = ids < experts, chosen if chosen.shape[0] == tokens else ids
    p = _probabilities(h, name)
    gates = _gates(h, p, chosen, name)
    by_gate = torch.zeros_like(gates) if grad_weights is None else grad_weights.to(acc) * scale * kept
    if normalize:
        total = gates.sum(1, keepdim=True) + TINY
        by_gate = (by_gate - (by_gate * gates).sum(1, keepdim=True) / total) / total
    if name == "topk_softmax":
        by_gate = by_gate + by_importance[chosen]
        by_choice = gates * (by_gate - (by_gate * gates).sum(1, keepdim=True))
        by_h = torch.zeros_like(h).scatter(1, chosen, by_choice)
    elif name == "sigmoid":
        total = p.sum(1, keepdim=True) + TINY
        by_p = (by_importance - (by_importance * p).sum(1, keepdim=True) / total) / total
        by_h = by_p.scatter_add(1, chosen, by_gate) * p * (1 - p)
    else:
        by_p = by_importance.expand_as(h).scatter_add(1, chosen, by_gate)
        by_h = p * (by_p - (by_p * p).sum(1, keepdim=True))
    if grad_z_loss is None:
        return by_h, by_h
    return by_h + grad_z_loss * (2 / rows) * _log_sum_exp(clean)[:, None] * F.softmax(clean, dim=1), by_h


# How far from the best total an assignment may be: for each token this share of the range of the scores.
ASSIGNMENT_EPSILON = 1e-5
ASSIGNMENT_BIDS = 1000  # for each token, in the mean


def finite_scores(scores: Tensor) -> Tensor:
    """In float64 between 0 and 1; NaN and -inf count as the smallest finite score, +inf as the largest."""
    s, finite = scores.double(), scores.isfinite()
    low = torch.where(finite, s, math.inf).amin()
    high = torch.where(finite, s, -math.inf).amax()
    s = torch.where(finite, s, torch.where(scores == math.inf, high, low))
    return ((s - low) / (high - low)).nan_to_num(nan=0.0)


def balanced_assignment(scores: Tensor, epsilon: float, bids: int) -> Tensor:
    """Bertsekas' auction with scaled eps; all bidders without a place bid at once. ids (T, 1).

    Where E does not divide T, each expert has one more place, and E - T % E extra bidders, who may stand nowhere else,
    fill what no token gets. Places of one kind share a price: the lowest bid in them.
    """
    tokens, experts = scores.shape
    if tokens == 0:
        return scores.new_empty((0, 1), dtype=torch.int64)
    s, (least, rest) = finite_scores(scores), divmod(tokens, experts)
    places = ([least] if least else []) + ([1] if rest else [])
    room = torch.tensor(places, device=s.device).repeat_interleave(experts)
    s = s.repeat(1, len(places))
    if rest:
        extra = s.new_full((experts - rest, len(room)), -math.inf)
        extra[:, -experts:] = 0
        s = torch.cat([s, extra])
    price, eps, left = s.new_zeros(len(room)), 0.25, bids * len(s)
    at = torch.full((len(s),), -1, device=s.device)
    while left > 0:
        eps = max(eps / 5, epsilon)
        at.fill_(-1)
        bid = s.new_zeros(len(s))
        while left > 0 and (free := (at < 0).nonzero().squeeze(1)).numel():
            left -= free.numel()
            top, best = (s[free] - price).max(1)
            second = (s[free] - price).scatter(1, best[:, None], -math.inf).amax(1)
            at[free], bid[free] = best, price[best] + eps + torch.where(second.isfinite(), top - second, 0)
            order = bid.argsort(descending=True, stable=True)
            order = order[at[order].argsort(stable=True)]
            first = torch.searchsorted(at[order], torch.arange(len(room) + 1, device=s.device))
            rank = torch.arange(len(s), device=s.device) - first[at[order]]
            at[order[(at[order] >= 0) & (rank >= room[at[order]])]] = -1
            full = (first[1:] - first[:-1] >= room).nonzero().squeeze(1)
            price[full] = bid[order[first[full] + room[full] - 1]]
        if eps == epsilon:
            break
    ids = at[:tokens] % experts
    return (_greedy(s[:tokens] - price, room.tolist(), experts, rest) if (at < 0).any() else ids)[:, None]


def _greedy(gain: Tensor, room: list[int], experts: int, rest: int) -> Tensor:
    """Each token in turn to where it gains most of what is left; `rest` experts fill their one more place."""
    ids, regular = [], len(room) - experts if rest else len(room)
    for row in gain.argsort(dim=1, descending=True, stable=True).tolist():
        kind = next(kind for kind in row if room[kind] and (kind < regular or rest))
        room[kind] -= 1
        rest -= kind >= regular
        ids.append(kind % experts)
    return torch.tensor(ids, device=gain.device)
