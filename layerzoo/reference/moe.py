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


def check_values(x: Tensor, ids: Tensor, offsets: Tensor | None, experts: int, first: int) -> None:
    """Raises where a pair is of no expert that there is, or of no token."""
    tokens = pairs_by_expert(ids, offsets, experts, first)[1]
    bad = (tokens < 0) | (tokens >= x.shape[0])
    if bad.any():
        raise RuntimeError(f"moe_experts: tokens must be in [0, {x.shape[0]}), got {int(tokens[bad][0])}")


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
    check_values(x, ids, offsets, experts, first)
    pairs, tokens, ends = pairs_by_expert(ids, offsets, experts, first)
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
