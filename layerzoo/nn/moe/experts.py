"""The matrices of feed-forward experts of one shape."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from layerzoo.ops import moe_experts, moe_experts_ragged
from layerzoo.ops.moe.experts import Activation


class Experts(nn.Module):
    """Feed-forward layers, stacked as in transformers: w13 (E, 2 I, H), b13 (E, 2 I), w2 (E, H, I), b2 (E, H).

    Without a gate w13 is (E, I, H) and b13 (E, I).

    Raises:
        ValueError: a size that is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(hidden_size, intermediate_size, num_experts) < 1:
            raise ValueError(
                f"Experts: hidden_size, intermediate_size and num_experts must be positive, "
                f"got {hidden_size}, {intermediate_size} and {num_experts}"
            )
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.activation: Activation = activation
        self.gated = gated
        width = intermediate_size * (2 if gated else 1)
        self.w13 = nn.Parameter(torch.empty(num_experts, width, hidden_size, **like))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **like))
        self.b13 = nn.Parameter(torch.empty(num_experts, width, **like)) if bias else None
        self.b2 = nn.Parameter(torch.empty(num_experts, hidden_size, **like)) if bias else None
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    def reset_parameters(self) -> None:
        """Draws every parameter anew, each expert as `nn.Linear` draws its own."""
        for weight, bias in ((self.w13, self.b13), (self.w2, self.b2)):
            bound = 1 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)
            if bias is not None:
                nn.init.uniform_(bias, -bound, bound)

    def extra_repr(self) -> str:
        experts, hidden, inner = self.w2.shape
        return f"{experts} x ({hidden}, {inner}), {self.activation}, gated={self.gated}"

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, offsets: Tensor | None = None) -> Tensor:
        """x (T, H) -> (T, H), as `moe_experts`, or as `moe_experts_ragged` where `offsets` are given."""
        options: dict[str, Any] = {
            "activation": self.activation,
            "b13": self.b13,
            "b2": self.b2,
            "gated": self.gated,
        }
        if offsets is None:
            return moe_experts(x, ids, weights, self.w13, self.w2, **options)
        return moe_experts_ragged(x, ids, weights, offsets, self.w13, self.w2, **options)
