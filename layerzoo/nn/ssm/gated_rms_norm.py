"""RMS normalisation with a gate, as Mamba-2 has it.

Dao and Gu, "Transformers are SSMs" (2024), arXiv 2405.21060; Zhang and Sennrich, "Root Mean Square Layer Normalization"
(2019), arXiv 1910.07467.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedRMSNorm(nn.Module):
    """norm(x silu(gate)) weight, or norm(x) weight silu(gate); the mean square is taken over each group of channels.

    Args:
        channels: width of input, gate and output. groups: how many parts of it have a mean square of their own.
        norm_before_gate: which of the two formulas; False is the first. eps: added to the mean square.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 1,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups, self.norm_before_gate, self.eps = groups, norm_before_gate, eps
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(channels, **like))

    def reset_parameters(self) -> None:
        """Sets the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x, gate (..., channels) -> the same shape in x's dtype, computed in float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y, opened = x.to(wide), F.silu(gate.to(wide))
        if not self.norm_before_gate:
            y = y * opened
        groups: Tensor = y.unflatten(-1, (self.groups, -1))
        y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).flatten(-2) * self.weight
        y = y * opened if self.norm_before_gate else y
        return y.to(x.dtype)
