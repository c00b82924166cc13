"""VisionMamba: bidirectional selective state-space layer, the block of Vim.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model" (2024), arXiv
2401.09417. Parameter names and shapes are those of the mixer in the authors' code (there `bimamba_type="v2"`).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerzoo.nn.linear import Linear
from layerzoo.nn.ssm.selection import StepInit, check_sizes, rank_of, reset_scan, scan_selected
from layerzoo.ops import causal_conv1d


class VisionMamba(nn.Module):
    """Maps (batch, length, d_model) to the same shape; each token sees all others, in time and memory linear in length.

    Two of Mamba's passes share the outer projections and the gate: one goes from the first token to the last, one, with
    its own convolution, selection, decays and skip weights (names with `_b`), from the last to the first. Their sum is
    projected. Nothing is turned round in memory.

    Args:
        d_model: width of input and output. d_state: states per channel. d_conv: width of the two convolutions.
        expand: inner channels = expand * d_model. dt_rank: rank of the step sizes; "auto" is d_model / 16.
        dt_min, dt_max, dt_init_floor: range in which the initial step sizes are drawn, log-uniformly.
        dt_init, dt_scale: initial weight of the step-size projections: "random" (uniform) or "constant".
        conv_bias, bias: whether the convolutions and the two outer projections have a bias.
        if_divide_out: whether the sum of the two passes is halved.

    Raises:
        ValueError: a size that is not positive or an unknown `dt_init`; an input whose width is not d_model.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        if_divide_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rank = rank_of(dt_rank, d_model)
        check_sizes("VisionMamba", d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=rank)
        self._dt_init = StepInit(dt_init, dt_scale, dt_min, dt_max, dt_init_floor)
        self._dt_init.check("VisionMamba")
        self.d_model, self.d_state, self.d_conv, self.expand, self.dt_rank = d_model, d_state, d_conv, expand, rank
        self.d_inner, self.if_divide_out = expand * d_model, if_divide_out
        like: dict[str, Any] = {"device": device, "dtype": dtype}

        def convolution() -> nn.Conv1d:
            width = self.d_inner
            return nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1, bias=conv_bias, **like)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))

        self.in_proj = Linear(d_model, 2 * self.d_inner, bias=bias, **like)
        self.conv1d, self.conv1d_b = convolution(), convolution()
        self.x_proj = Linear(self.d_inner, rank + 2 * d_state, bias=False, **like)
        self.x_proj_b = Linear(self.d_inner, rank + 2 * d_state, bias=False, **like)
        self.dt_proj, self.dt_proj_b = Linear(rank, self.d_inner, **like), Linear(rank, self.d_inner, **like)
        self.A_log, self.A_b_log = parameter(self.d_inner, d_state), parameter(self.d_inner, d_state)
        self.D, self.D_b = parameter(self.d_inner), parameter(self.d_inner)
        self.out_proj = Linear(self.d_inner, d_model, bias=bias, **like)
        for kept in (self.A_log, self.A_b_log, self.D, self.D_b):
            kept._no_weight_decay = True  # type: ignore[attr-defined]  # a mark that the authors' training looks for
        self._reset_scans()

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for layer in (self.in_proj, self.conv1d, self.conv1d_b, self.x_proj, self.x_proj_b, self.out_proj):
            layer.reset_parameters()
        self._reset_scans()

    def _reset_scans(self) -> None:
        reset_scan(self._dt_init, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D)
        reset_scan(self._dt_init, self.dt_proj_b.weight, self.dt_proj_b.bias, self.A_b_log, self.D_b)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_state={self.d_state}, d_conv={self.d_conv}, expand={self.expand}"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (batch, length, d_model) -> the same shape."""
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.d_model:
            raise ValueError(
                f"VisionMamba: hidden_states must have shape (batch, length, d_model = {self.d_model}), "
                f"got {tuple(hidden_states.shape)}"
            )
        x, z = self.in_proj(hidden_states).mT.chunk(2, dim=1)  # b d l each
        ahead = _one_way(x, z, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, reverse=False)
        back = _one_way(x, z, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)
        both = ahead + back
        y: Tensor = self.out_proj((both / 2 if self.if_divide_out else both).mT)
        return y


def _one_way(
    x: Tensor,
    z: Tensor,
    conv: nn.Conv1d,
    x_proj: nn.Linear,
    dt_proj: nn.Linear,
    A_log: Tensor,
    D: Tensor,
    *,
    reverse: bool,
) -> Tensor:
    u = causal_conv1d(x, conv.weight.squeeze(1), conv.bias, activation="silu", reverse=reverse)
    return scan_selected(u, x_proj.weight, dt_proj.weight, dt_proj.bias, A_log, D, z, reverse=reverse)
