"""Recipes for torch's own layers, which the recipe of a model takes along."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerzoo.hosts.recipe import Accelerated, has_kernel
from layerzoo.ops import skinny_linear

LEAST_WEIGHTS = 2**19  # below, torch's function costs less than it loses
# Rows up to which skinny_linear is faster than torch, which has instructions for bfloat16 on some processors.
MOST_ROWS = {torch.float64: 8, torch.float32: 8, torch.float16: 8, torch.bfloat16: 4}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by our kernel for the few rows of decoding on a CPU."""
    if (
        torch.is_grad_enabled()
        or not x.is_cpu
        or weight.numel() < LEAST_WEIGHTS
        or x.dtype != weight.dtype
        or x.numel() > MOST_ROWS.get(x.dtype, 0) * x.shape[-1]
        or torch.is_autocast_enabled("cpu")
    ):
        return F.linear(x, weight, bias)
    return skinny_linear(x, weight, bias)


class Linear(Accelerated, nn.Linear):
    """torch's linear layer, as fast as memory for a few rows without gradients; otherwise what it was."""

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
