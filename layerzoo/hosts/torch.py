"""Recipes for torch's own layers, which the recipe of a model takes along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerzoo.hosts.recipe import Accelerated, has_kernel
from layerzoo.ops.linear import MOST_ROWS, linear


class Linear(Accelerated, nn.Linear):
    """torch's linear layer by the fastest way on a CPU."""

    host = nn.Linear

    @classmethod
    def refusal(cls, module: Any) -> str:
        if not has_kernel("skinny_linear", "cpu"):
            return "layerzoo has no kernels here"
        if type(module.weight) is not nn.Parameter or module.weight.dtype not in MOST_ROWS:
            return f"its weight must be a plain parameter, got {type(module.weight).__name__} of {module.weight.dtype}"
        return ""

    @classmethod
    def probe(cls, module: Any) -> tuple[Tensor, ...]:
        noise = torch.randn(1, module.in_features, generator=torch.Generator().manual_seed(0))
        return (noise.to(module.weight.device, module.weight.dtype),)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
