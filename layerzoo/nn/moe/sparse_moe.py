"""A feed-forward layer of many experts, of which each token meets few.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer" (2017),
arXiv 1701.06538.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerzoo.nn.linear import Linear
from layerzoo.nn.moe.experts import Experts
from layerzoo.nn.moe.parallel import exchange
from layerzoo.nn.moe.router import Kind, Router, Routing
from layerzoo.ops.moe.experts import Activation


class SharedExpert(nn.Module):
    """A feed-forward layer that every token meets, and where `gate` is set, a sigmoid of the token scales."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, gated: bool, gate: bool, **like: Any
    ) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        self.w13 = Linear(hidden_size, intermediate_size * (2 if gated else 1), bias=False, **like)
        self.w2 = Linear(intermediate_size, hidden_size, bias=False, **like)
        self.gate = Linear(hidden_size, 1, bias=False, **like) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.w13(x)
        g, u = h.chunk(2, dim=-1) if self.gated else (h, None)
        a = _activate(self.activation, g)
        y: Tensor = self.w2(a if u is None else a * u)
        return y if self.gate is None else y * torch.sigmoid(self.gate(x))


def _activate(name: str, x: Tensor) -> Tensor:
    if name == "relu2":
        return F.relu(x).square()
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    function: Tensor = getattr(F, name)(x)
    return function


class SparseMoE(nn.Module):
    """Maps (..., hidden_size) to the same shape: every token through `top_k` of `num_experts` feed-forward layers.

    Args:
        hidden_size: H, width of input and output. intermediate_size: I, inner width of an expert.
        num_experts: E. top_k: experts for each token.
        router: how they are chosen: see `Router`, which the following are handed to. normalize, scale, groups,
            capacity_factor, eval_capacity_factor, drop, jitter.
        activation, gated: of an expert, see `moe_experts`. bias: whether experts have biases.
        shared_size: inner width of one more expert that every token meets, 0 for none (DeepSeekMoE, 2024).
        shared_gate: scale what that one gives by a sigmoid of the token (Qwen2-MoE).

    What the router said of the last call is not kept: ask for it with `return_routing`, or watch a model with
    `RouterStats`.

    Raises:
        ValueError: a size or option that is not allowed; an input whose width is not hidden_size.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        router: Kind = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        groups: tuple[int, int, Literal["top2", "max"]] | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        drop: Literal["position", "weight"] = "position",
        jitter: float = 0.0,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        shared_size: int = 0,
        shared_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shared_size < 0:
            raise ValueError(f"SparseMoE: shared_size must not be negative, got {shared_size}")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = Router(
            hidden_size,
            num_experts,
            top_k,
            router,
            normalize=normalize,
            scale=scale,
            groups=groups,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            drop=drop,
            jitter=jitter,
            **like,
        )
        self.hidden_size, self.num_experts = hidden_size, num_experts
        self.process_group: torch.distributed.ProcessGroup | None = None
        self.experts = Experts(
            hidden_size, intermediate_size, num_experts, activation=activation, gated=gated, bias=bias, **like
        )
        shared = (hidden_size, shared_size, activation, gated, shared_gate)
        self.shared = SharedExpert(*shared, **like) if shared_size else None

    def forward(self, x: Tensor, *, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        """x (..., hidden_size) -> the same shape; with `return_routing` also what the router said of each token."""
        if x.dim() < 1 or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{type(self).__name__}: x must have shape (..., hidden_size = {self.hidden_size}), "
                f"got {tuple(x.shape)}"
            )
        rows = x.reshape(-1, self.hidden_size)
        routing: Routing = self.router(rows)
        if self.process_group is None:
            y = self.experts(rows, routing.ids, routing.weights, routing.offsets)
        else:
            y = exchange(self.experts, rows, routing, self.process_group)
        if self.shared is not None:
            y = y + self.shared(rows)
        y = y.view(x.shape)
        return (y, routing) if return_routing else y

    @torch.no_grad()
    def shard(self, process_group: torch.distributed.ProcessGroup) -> SparseMoE:
        """A copy of this layer for one of several machines: with the experts of this process, and everything else.

        Each process of the group holds num_experts / size experts and has tokens of its own, any number of them; pairs
        travel to their experts and back. Gradients of the experts are of the tokens of all processes; those of the
        router and the shared expert of this one's, to be summed as in any data-parallel training. Limits of capacity
        and balanced assignment hold within each process.

        Raises:
            ValueError: experts that do not divide among the processes; a layer that is sharded already.
        """
        if self.process_group is not None:
            raise ValueError("SparseMoE: shard is for a layer that has all experts, this one is sharded already")
        size, rank = process_group.size(), process_group.rank()
        if self.num_experts % size:
            raise ValueError(
                f"SparseMoE: num_experts must divide among the {size} processes of process_group, "
                f"got {self.num_experts}"
            )
        part = copy.copy(self)
        part._modules = {name: copy.deepcopy(module) for name, module in self._modules.items() if name != "experts"}
        part._modules["experts"] = local = copy.copy(self.experts)
        count = self.num_experts // size
        local._parameters = {
            name: None if p is None else nn.Parameter(p[rank * count : (rank + 1) * count].clone(), p.requires_grad)
            for name, p in self.experts._parameters.items()
        }
        part.process_group = process_group
        return part
