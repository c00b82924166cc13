"""The matrices of feed-forward experts of one shape."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from layerzoo.ops import moe_experts
from layerzoo.ops.moe.experts import Activation


class Experts(nn.Module):
    """`num_experts` plain feed-forward layers, stacked: w13 (E, I, H), b13 (E, I), w2 (E, H, I), b2 (E, H).

    Raises:
        ValueError: a size that is not positive.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: Activation = "gelu",
        bias: bool = True,
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
        self.w13 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size, **like))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **like))
        self.b13 = nn.Parameter(torch.empty(num_experts, intermediate_size, **like)) if bias else None
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
        return f"{experts} x ({hidden}, {inner}), {self.activation}"

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (T, H), ids and weights (T, k) -> (T, H), as `moe_experts`."""
        return moe_experts(
            x,
            ids,
            weights,
            self.w13,
            self.w2,
            activation=self.activation,
            b13=self.b13,
            b2=self.b2,
            gated=False,
        )
