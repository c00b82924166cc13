"""LocalMamba: selective scans over images, window by window, in directions chosen for each layer.

Huang et al., "LocalMamba: Visual State Space Model with Windowed Selective Scan" (2024), arXiv 2403.09338.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn.ssm.selection import check_sizes
from layerzoo.nn.ssm.ss2d import SS2D

CANDIDATES = (
    "row",
    "row_reversed",
    "column",
    "column_reversed",
    "window2_row",
    "window2_row_reversed",
    "window7_row",
    "window7_row_reversed",
)


class LocalMamba(SS2D):
    """Maps images (batch, height, width, d_model), channels last, to the same shape: `SS2D` with windows.

    Before the directions are added, each is gated, channel by channel and pixel by pixel, by attention that all of them
    share (`attn`).

    To search for the directions of a layer, give it all `CANDIDATES` and `search=True`: the sum is then weighted by a
    softmax over `direction_logits`, after a normalisation without weights that makes the directions comparable. Train,
    and build the layer anew with `best_directions()`.

    Args:
        d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias: as
            for `SS2D`.
        directions: as for `ops.cross_scan`; the default is what the authors found for the first layer of their
            LocalVMamba-T.
        search: whether the directions are weighted.
        reduction: the attention has d_inner / reduction hidden channels.

    Raises:
        ValueError: as for `SS2D`; a reduction that leaves no channel.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 3,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        directions: Sequence[str] = ("row", "row_reversed", "window7_row", "window7_row_reversed"),
        search: bool = False,
        reduction: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            dt_rank,
            dt_min,
            dt_max,
            dt_init,
            dt_scale,
            dt_init_floor,
            conv_bias,
            bias,
            directions,
            device,
            dtype,
        )
        check_sizes("LocalMamba", reduction=reduction)
        if reduction > self.d_inner:
            raise ValueError(f"LocalMamba: reduction must be at most d_inner = {self.d_inner}, got {reduction}")
        self.attn = ChannelSpatialGate(self.d_inner, self.d_inner // reduction, device, dtype)
        zeros = torch.zeros(len(self.directions), device=device, dtype=torch.float32)
        self.direction_logits = nn.Parameter(zeros) if search else None

    def reset_parameters(self) -> None:
        """Draws every parameter anew; a search starts with equal weights."""
        super().reset_parameters()
        self.attn.reset_parameters()
        if self.direction_logits is not None:
            nn.init.zeros_(self.direction_logits)

    def best_directions(self, count: int = 4) -> tuple[str, ...]:
        """The `count` directions of greatest weight, in the order in which they were given.

        Raises:
            ValueError: a layer built without search; a count that is not between 1 and the number of directions.
        """
        if self.direction_logits is None:
            raise ValueError("LocalMamba.best_directions: search must be True when the layer is built, got False")
        if not 1 <= count <= len(self.directions):
            raise ValueError(
                f"LocalMamba.best_directions: count must be between 1 and {len(self.directions)}, got {count}"
            )
        best = sorted(self.direction_logits.topk(count).indices.tolist())
        return tuple(self.directions[i] for i in best)

    def _merge(self, ys: list[Tensor], height: int, width: int) -> Tensor:
        gated = [self.attn(y.mT) for y in ys]  # b l d: the gate does not ask for the order of the pixels
        if self.direction_logits is not None:
            weights = self.direction_logits.softmax(0)
            gated = [
                weight.to(y.dtype) * F.layer_norm(y, y.shape[-1:]) for weight, y in zip(weights, gated, strict=True)
            ]
        return super()._merge([y.mT for y in gated], height, width)


class ChannelSpatialGate(nn.Module):
    """Gates (batch, length, channels) by attention: one factor for each channel, times one for each pixel.

    With n = LayerNorm(x) and g = GELU(global_reduce(mean of n over the pixels)), the channels' factors are
    sigmoid(channel_select(g)), a pixel's is sigmoid(spatial_select([GELU(local_reduce(n)), g])).
    """

    def __init__(
        self, channels: int, reduced: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, device=device, dtype=dtype)
        self.global_reduce = nn.Linear(channels, reduced, device=device, dtype=dtype)
        self.local_reduce = nn.Linear(channels, reduced, device=device, dtype=dtype)
        self.channel_select = nn.Linear(reduced, channels, device=device, dtype=dtype)
        self.spatial_select = nn.Linear(2 * reduced, 1, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for layer in self.children():
            assert isinstance(layer, nn.Linear | nn.LayerNorm)
            layer.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, length, channels) -> the same shape."""
        n = self.norm(x)
        whole = F.gelu(self.global_reduce(n.mean(1, keepdim=True)))
        each = F.gelu(self.local_reduce(n))
        channel = torch.sigmoid(self.channel_select(whole))
        pixel = torch.sigmoid(self.spatial_select(torch.cat([each, whole.expand_as(each)], dim=2)))
        return x * channel * pixel
