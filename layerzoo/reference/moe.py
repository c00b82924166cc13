"""The mixture-of-experts ops in plain PyTorch: what runs without kernels, and what the kernels are compared with."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from layerzoo.reference.ssm import accumulate_dtype

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


def pairs_by_expert(ids: Tensor, offsets: Tensor | None, experts: int, first: int) -> tuple[Tensor, Tensor, list[int]]:
    """The pairs that are kept, sorted by expert, the token of each, and where each expert's begin and end."""
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
    return torch.arange(ids.numel(), device=ids.device), ids.long(), ends


def _check_tokens(tokens: Tensor, count: int) -> None:
    bad = (tokens < 0) | (tokens >= count)
    if bad.any():
        raise RuntimeError(f"moe_experts: tokens must be in [0, {count}), got {int(tokens[bad][0])}")


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
    pairs, tokens, ends = pairs_by_expert(ids, offsets, experts, first)
    _check_tokens(tokens, x.shape[0])
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
    pairs, tokens, ends = pairs_by_expert(ids, offsets, experts, first)
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


# ---- routing ----

SCORES = ("softmax", "sigmoid", "topk_softmax")
TINY = 1e-20


def _first_largest(x: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the last dimension, largest first, of equals the lowest index."""
    return torch.sort(x, dim=-1, descending=True, stable=True).indices[..., :count]


def _keep_groups(choice: Tensor, groups: int, topk_group: int, top2: bool) -> Tensor:
    grouped = choice.view(choice.shape[0], groups, -1)
    best = grouped.sort(dim=-1, descending=True).values[..., : 2 if top2 else 1]
    kept = _first_largest(best.sum(-1), topk_group)
    mask = torch.zeros(choice.shape[0], groups, dtype=torch.bool, device=choice.device).scatter_(1, kept, True)
    return grouped.masked_fill(~mask[..., None], -math.inf).flatten(1)


def _drop(ids: Tensor, weights: Tensor, experts: int, capacity: int, by_weight: bool) -> Tensor:
    """Which pairs (T, k) are over the capacity of their expert."""
    tokens, k = ids.shape
    order = torch.arange(tokens * k, device=ids.device).view(tokens, k).T.flatten()  # first choices first
    if by_weight:
        order = order[torch.sort(weights.flatten()[order], descending=True, stable=True).indices]
    sorted_ids, by_expert = torch.sort(ids.flatten()[order], stable=True)
    first = torch.searchsorted(sorted_ids, torch.arange(experts, device=ids.device))
    place = torch.arange(tokens * k, device=ids.device) - first[sorted_ids]
    over = torch.zeros(tokens * k, dtype=torch.bool, device=ids.device)
    over[order[by_expert]] = place >= capacity
    return over.view(tokens, k)


def _scored(logits: Tensor, noise: Tensor | None, score: int) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(logits)
    z = logits.to(acc) if noise is None else logits.to(acc) + noise.to(acc)
    return z, torch.sigmoid(z) if SCORES[score] == "sigmoid" else z.softmax(dim=1)


def moe_route(
    logits: Tensor,
    top_k: int,
    score: int,
    bias: Tensor | None,
    groups: int,
    topk_group: int,
    top2: bool,
    normalize: bool,
    scale: float,
    noise: Tensor | None,
    capacity: int,
    by_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """weights, ids, ids before any was dropped, counts, importance, log-sum-exp, dropped."""
    z, p = _scored(logits, noise, score)
    experts, late = logits.shape[1], SCORES[score] == "topk_softmax"
    choice = (z if late else p) if bias is None else (z if late else p) + bias.to(z.dtype)
    choice = torch.where(choice.isnan(), -math.inf, choice)
    if groups > 1:
        choice = _keep_groups(choice, groups, topk_group, top2)
    ids = _first_largest(choice, top_k)
    weights = z.gather(1, ids).softmax(dim=1) if late else p.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + TINY)
    weights = (weights * scale).masked_fill(z.isnan().any(dim=1, keepdim=True), math.nan)
    chosen = ids if capacity > 0 else ids[:0]
    counts = torch.bincount(ids.flatten(), minlength=experts)
    dropped = counts.new_zeros(())
    if capacity > 0:
        over = _drop(ids, weights, experts, capacity, by_weight)
        ids, weights, dropped = ids.masked_fill(over, experts), weights.masked_fill(over, 0), over.sum()
    importance = (p / p.sum(dim=1, keepdim=True)).sum(0)
    return weights.to(logits.dtype), ids, chosen.clone(), counts, importance, z.logsumexp(dim=1), dropped


def moe_route_backward(
    grad_weights: Tensor,
    grad_importance: Tensor | None,
    grad_lse: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    chosen: Tensor,
    lse: Tensor,
    score: int,
    noise: Tensor | None,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits, which is that of the noise too."""
    z, s = _scored(logits, noise, score)
    chosen = chosen if chosen.shape[0] == ids.shape[0] else ids
    g = grad_weights.to(z.dtype).masked_fill(ids == logits.shape[1], 0) * scale
    late, p = SCORES[score] == "topk_softmax", z.softmax(dim=1)
    grad_s, grad_z = torch.zeros_like(z), torch.zeros_like(z)
    if late:
        r = z.gather(1, chosen).softmax(dim=1)
        grad_z.scatter_add_(1, chosen, r * (g - (g * r).sum(1, keepdim=True)))
    else:
        w = s.gather(1, chosen)
        if normalize:
            total = w.sum(1, keepdim=True) + TINY
            g = (g - (g * w).sum(1, keepdim=True) / total) / total
        grad_s.scatter_add_(1, chosen, g)
    if grad_importance is not None:
        total, q = s.sum(1, keepdim=True), s / s.sum(1, keepdim=True)
        grad_s += (grad_importance - (q * grad_importance).sum(1, keepdim=True)) / total
    if SCORES[score] == "sigmoid":
        grad_z += grad_s * s * (1 - s)
    else:
        grad_z += p * (grad_s - (grad_s * p).sum(1, keepdim=True))
    if grad_lse is not None:
        grad_z += grad_lse[:, None] * p
    return grad_z.to(logits.dtype)


def balanced_assignment(scores: Tensor) -> Tensor:
    """The auction of the kernel with all tokens that wait bidding at once: another order, the same guarantee."""
    tokens, experts = scores.shape
    score = scores.detach().double().cpu()
    finite = score[score.isfinite()]
    least, most = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 0.0)
    score = torch.nan_to_num(score, nan=min(least, 0.0), posinf=max(most, 0.0), neginf=min(least, 0.0))
    places = -(-tokens // experts)
    value = torch.cat([score, score.new_zeros(places * experts - tokens, experts)])
    price = value.new_zeros(experts, places)
    spread = max(float(value.max() - value.min()), 1e-12) if value.numel() else 1e-12
    ids = torch.zeros(len(value), dtype=torch.int64)
    step = spread / 4
    while step > spread * 1e-5:
        step = max(step / 5, spread * 1e-5)
        holder = torch.full((experts, places), -1)
        waiting = list(range(len(value)))
        for _ in range(400 * len(value)):
            if not waiting:
                break
            who = waiting.pop()
            net = value[who] - price.min(dim=1).values
            where = int(net.argmax())
            others = torch.cat([net[:where], net[where + 1 :], value[who, where] - price[where].sort().values[1:2]])
            place = int(price[where].argmin())
            price[where, place] += (float(net[where] - others.max()) if others.numel() else 0.0) + step
            if holder[where, place] >= 0:
                waiting.append(int(holder[where, place]))
            holder[where, place] = who
        free = (holder < 0).nonzero().tolist()
        for who, (e, place) in zip(waiting, free, strict=True):
            holder[e, place] = who
        ids[holder.flatten()] = torch.arange(experts).repeat_interleave(places)
    return ids[:tokens, None].to(scores.device)
