"""SS2D: selective scans over images in several directions, the core of VMamba.

Liu et al., "VMamba: Visual State Space Model" (2024), arXiv 2401.10166. Parameter names, shapes and the order of the
directions are those of the authors' first version (there `forward_type="v0"`).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn.linear import Linear
from layerzoo.nn.ssm.selection import StepInit, check_sizes, rank_of, reset_scan, scan_selected
from layerzoo.ops import cross_merge, cross_scan
from layerzoo.ops.ssm.cross_scan import CROSS, check_directions


class SS2D(nn.Module):
    """Maps images (batch, height, width, d_model), channels last, to the same shape.

    A gate branches off; the rest goes through a depthwise convolution over the image, SiLU, and one selective scan for
    each direction, with step sizes, decays, B, C and skip weights of its own. Their sum is normalised, gated and
    projected.

    Args:
        d_model: width of input and output. d_state: states per channel. d_conv: side of the convolution, odd.
        expand: inner channels = expand * d_model. dt_rank: rank of the step sizes; "auto" is d_model / 16.
        dt_min, dt_max, dt_init_floor: range in which the initial step sizes are drawn, log-uniformly.
        dt_init, dt_scale: initial weight of the step-size projections: "random" (uniform) or "constant".
        conv_bias, bias: whether the convolution and the two outer projections have a bias.
        directions: of the scans, as for `ops.cross_scan`.

    Raises:
        ValueError: a size that is not positive, an even d_conv, an unknown `dt_init` or direction; an input of another
            width or rank, or without pixels.
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
        directions: Sequence[str] = CROSS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer, rank = type(self).__name__, rank_of(dt_rank, d_model)
        check_sizes(layer, d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=rank)
        if d_conv % 2 == 0:
            raise ValueError(f"{layer}: d_conv must be odd, got {d_conv}")
        self._dt_init = StepInit(dt_init, dt_scale, dt_min, dt_max, dt_init_floor)
        self._dt_init.check(layer)
        self.directions = check_directions(layer, directions)
        self.d_model, self.d_state, self.d_conv, self.expand, self.dt_rank = d_model, d_state, d_conv, expand, rank
        self.d_inner, ways = expand * d_model, len(self.directions)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        full: dict[str, Any] = {"device": device, "dtype": torch.float32}

        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias, **like)
        self.conv2d = nn.Conv2d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv // 2, bias=conv_bias, **like
        )
        self.x_proj_weight = nn.Parameter(torch.empty(ways, rank + 2 * d_state, self.d_inner, **like))
        self.dt_projs_weight = nn.Parameter(torch.empty(ways, self.d_inner, rank, **like))
        self.dt_projs_bias = nn.Parameter(torch.empty(ways, self.d_inner, **like))
        self.A_logs = nn.Parameter(torch.empty(ways * self.d_inner, d_state, **full))
        self.Ds = nn.Parameter(torch.empty(ways * self.d_inner, **full))
        self.out_norm = nn.LayerNorm(self.d_inner, **like)
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **like)
        self.A_logs._no_weight_decay = self.Ds._no_weight_decay = True  # type: ignore[attr-defined]
        self._reset_scans()

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for layer in (self.in_proj, self.conv2d, self.out_norm, self.out_proj):
            layer.reset_parameters()
        self._reset_scans()

    def _reset_scans(self) -> None:
        bound = self.d_inner**-0.5  # torch's for a linear layer
        nn.init.uniform_(self.x_proj_weight, -bound, bound)
        reset_scan(self._dt_init, self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)

    def extra_repr(self) -> str:
        return (
            f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}, "
            f"directions={self.directions}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, height, width, d_model) -> the same shape."""
        if x.dim() != 4 or x.shape[3] != self.d_model:
            raise ValueError(
                f"{type(self).__name__}: x must have shape (batch, height, width, d_model = {self.d_model}), "
                f"got {tuple(x.shape)}"
            )
        u, z = self.in_proj(x).chunk(2, dim=3)
        u = F.silu(self.conv2d(u.movedim(3, 1)))  # b d h w
        y = self._merge(self._scan(u), u.shape[2], u.shape[3]).movedim(1, 3)
        out: Tensor = self.out_proj(self.out_norm(y) * F.silu(z))
        return out

    def _scan(self, u: Tensor) -> list[Tensor]:
        """u (b, d, h, w) -> for each direction (b, d, h w) in its order, never reversed: the scan runs backwards."""
        orders = self._orders()
        weights = zip(
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            self.A_logs.unflatten(0, (len(orders), -1)),
            self.Ds.unflatten(0, (len(orders), -1)),
            strict=True,
        )
        return [
            scan_selected(sequence, *weight, reverse=direction.endswith("_reversed"))
            for sequence, weight, direction in zip(cross_scan(u, orders), weights, self.directions, strict=True)
        ]

    def _merge(self, ys: list[Tensor], height: int, width: int) -> Tensor:
        return cross_merge(ys, self._orders(), height, width)

    def _orders(self) -> list[str]:
        return [direction.removesuffix("_reversed") for direction in self.directions]
