"""A layer of experts that all get the same number of tokens, without any loss that asks for it.

Lewis et al., "BASE Layers: Simplifying Training of Large, Sparse Models" (2021), arXiv 2103.16716.
"""

from typing import Any

import torch
from torch import Tensor

from layerzoo.nn.moe.router import Routing
from layerzoo.nn.moe.sparse_moe import SparseMoE
from layerzoo.ops.moe.experts import Activation


class BASELayer(SparseMoE):
    """Maps (..., hidden_size) to the same shape: x + sigmoid(score) expert(x), with one expert for each token.

    While training the tokens of a call are assigned so that every expert gets as many as any other (one more where they
    do not divide) and the sum of the scores is largest; in eval mode each token goes to its best expert.

    Args:
        hidden_size, intermediate_size, num_experts, activation, bias: as in `SparseMoE`.

    Raises:
        ValueError: as `SparseMoE`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: Activation = "relu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            intermediate_size,
            num_experts,
            1,
            router="base",
            normalize=False,
            activation=activation,
            gated=False,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor, *, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        """x (..., hidden_size) -> the same shape; with `return_routing` also what the router said of each token."""
        y: Any = super().forward(x, return_routing=return_routing)
        return (x + y[0], y[1]) if return_routing else x + y
