"""Experts on several machines: pairs travel to the process that has their expert, and what it gives travels back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from layerzoo.nn.moe.router import Routing


class _AllToAll(torch.autograd.Function):
    """Rows to the processes of a group, `send[i]` of them to process i; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out = grad.new_empty((sum(ctx.send), *grad.shape[1:]))
        dist.all_to_all_single(out, grad.contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return out, None, None, None


def exchange(experts: Callable[..., Tensor], x: Tensor, routing: Routing, group: dist.ProcessGroup) -> Tensor:
    """What `experts`, of which each process of the group has its own, give the tokens x (T, H) of this process.

    The weights stay here: experts are asked with weight 1, and their answers are weighted where they come back.
    """
    size = group.size()
    total = routing.counts.numel()
    if routing.offsets is None:
        expert, token = routing.ids.flatten(), torch.arange(x.shape[0], device=x.device)
        token = token.repeat_interleave(routing.ids.shape[1])
        order = torch.argsort(expert, stable=True)
        order = order[: int((expert < total).sum())]
        counts = torch.bincount(expert[order], minlength=total)
        token, weights = token[order], routing.weights.flatten()[order]
    else:
        counts, token, weights = routing.offsets.diff(), routing.ids, routing.weights
    theirs = torch.empty_like(counts)  # (process, expert of ours)
    dist.all_to_all_single(theirs, counts, group=group)
    send = counts.view(size, -1).sum(1).tolist()
    receive = theirs.view(size, -1).sum(1).tolist()
    rows = _AllToAll.apply(x[token], send, receive, group)
    local = torch.arange(total // size, device=x.device).repeat(size)
    ids = local.repeat_interleave(theirs)[:, None]
    y = _AllToAll.apply(experts(rows, ids, rows.new_ones(ids.shape)), receive, send, group)
    out = weights.new_zeros(x.shape).index_add(0, token, y.to(weights.dtype) * weights[:, None])
    return out.to(x.dtype)
