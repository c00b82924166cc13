"""A frozen linear layer with routed low-rank experts beside it.

Gao et al., "Higher Layers Need More LoRA Experts" (2024), arXiv 2402.08562: MoLA, whose upper layers have more of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerzoo.nn.moe.router import Router, Routing


class MoELoRA(nn.Module):
    """Maps (..., in_features) to (..., out_features): W0 x + b0 + sum over k of weights[k] (alpha / rank) B_k A_k x.

    The router takes the `top_k` largest logits of x; their softmax gives the weights. B begins at zero, so a new layer
    computes what W0 does. Expert e has the rows e rank … (e + 1) rank of `lora_A` (E rank, in_features) and the same
    columns of `lora_B` (out_features, E rank): two matrix products compute all experts, and the router zeroes most.

    Args:
        in_features, out_features, bias: of the linear layer `base`, which is frozen; `around` takes one that exists.
        num_experts, top_k, rank, alpha: see above.

    Raises:
        ValueError: a size that is not positive, top_k above num_experts, an input of another width. TypeError: `around`
            of a module that is no `nn.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int = 4,
        top_k: int = 2,
        rank: int = 8,
        alpha: float = 16.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._connect(base.requires_grad_(False), num_experts, top_k, rank, alpha)

    @classmethod
    def around(
        cls, base: nn.Linear, num_experts: int = 4, top_k: int = 2, rank: int = 8, alpha: float = 16.0
    ) -> "MoELoRA":
        """Experts beside a linear layer that exists, which becomes part of this one and is not frozen by it."""
        if not isinstance(base, nn.Linear):
            raise TypeError(f"MoELoRA: base must be an nn.Linear, got {type(base).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._connect(base, num_experts, top_k, rank, alpha)
        return layer

    def _connect(self, base: nn.Linear, num_experts: int, top_k: int, rank: int, alpha: float) -> None:
        if rank < 1:
            raise ValueError(f"MoELoRA: rank must be at least 1, got {rank}")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.num_experts, self.rank, self.alpha = num_experts, rank, alpha
        like: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.router = Router(base.in_features, num_experts, top_k, "topk_softmax", **like)
        self.lora_A = nn.Parameter(torch.empty(num_experts * rank, base.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, num_experts * rank, **like))
        self._reset_experts()

    def reset_parameters(self) -> None:
        """Draws every parameter anew, the base too."""
        self.base.reset_parameters()
        self.router.reset_parameters()
        self._reset_experts()

    def _reset_experts(self) -> None:
        bound = self.in_features**-0.5
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, rank={self.rank}, alpha={self.alpha:g}"

    def forward(self, input: Tensor, *, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        """input (..., in_features) -> (..., out_features); with `return_routing` also what the router says of each row:
        `routing.losses["balance"]` is the paper's loss."""
        if not input.dim() or input.shape[-1] != self.in_features:
            raise ValueError(
                f"MoELoRA: input must have shape (..., in_features = {self.in_features}), got {tuple(input.shape)}"
            )
        rows = input.reshape(-1, self.in_features)
        routing: Routing = self.router(rows)
        inner = F.linear(rows, self.lora_A).unflatten(1, (self.num_experts, self.rank))
        weights = routing.dense() * (self.alpha / self.rank)
        inner = inner * weights.to(inner.dtype).unsqueeze(2)
        added = F.linear(inner.flatten(1), self.lora_B).view(*input.shape[:-1], self.out_features)
        y = self.base(input) + added
        return (y, routing) if return_routing else y
