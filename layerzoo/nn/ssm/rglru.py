"""RG-LRU: real-gated linear recurrent unit.

De et al., "Griffin: Mixing Gated Linear Recurrences with Local Attention for Efficient Language Models" (2024), arXiv
2402.19427. Parameter names and shapes are those of RecurrentGemma's unit in transformers, so that its weights load.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.ops import linear_scan

SHARPNESS = 8.0  # the paper's c
RADIUS = (0.9, 0.999)  # of the decay at its start, where the gate is open


class RGLRU(nn.Module):
    """Maps (batch, length, width) to the same shape, causally.

    With r and i = sigmoid(block-diagonal linear(x)), `log a_t = -8 softplus(recurrent_param) r_t` and
    `h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t`; the first step of a sequence takes i_t x_t as it is.

    Args:
        width: of input, state and output. num_heads: blocks of the two gates, which must divide the width.

    Raises:
        ValueError: a size that is not positive, heads that do not divide the width, an input of another shape.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or num_heads < 1:
            raise ValueError(f"RGLRU: width and num_heads must be at least 1, got {width} and {num_heads}")
        if width % num_heads:
            raise ValueError(f"RGLRU: num_heads must divide the width {width}, got {num_heads}")
        self.width, self.num_heads = width, num_heads
        block = width // num_heads

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.recurrent_param = nn.Parameter(torch.empty(width, device=device, dtype=torch.float32))
        self.input_gate_weight, self.input_gate_bias = parameter(num_heads, block, block), parameter(num_heads, block)
        self.recurrent_gate_weight = parameter(num_heads, block, block)
        self.recurrent_gate_bias = parameter(num_heads, block)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Gates as LeCun's; with an open gate, the squares of the decays a are uniform between 0.9^2 and 0.999^2."""
        for weight in (self.input_gate_weight, self.recurrent_gate_weight):
            weight.normal_(std=math.sqrt(self.num_heads / self.width))
        self.input_gate_bias.zero_()
        self.recurrent_gate_bias.zero_()
        low, high = RADIUS
        log_a = torch.empty_like(self.recurrent_param).uniform_(low**2, high**2).log() / 2
        self.recurrent_param.copy_(torch.log(torch.expm1(-log_a / SHARPNESS)))  # inverse of softplus

    def extra_repr(self) -> str:
        return f"width={self.width}, num_heads={self.num_heads}"

    def forward(self, x: Tensor, segment_pos: Tensor | None = None) -> Tensor:
        """x (batch, length, width) -> the same shape.

        `segment_pos` (batch, length), integer: the place of each step in its sequence; a sequence begins at each 0.
        None: one sequence a row.
        """
        return self._recur(x, None, segment_pos)[0]

    def step(self, x: Tensor, state: Tensor | None = None, segment_pos: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The next steps, one or more: (batch, length, width) and the state -> (output, state after them).

        A state is (batch, width), in float32 or wider; None is the start of a sequence. `segment_pos` as in forward.
        """
        y, h = self._recur(x, state, segment_pos)
        if h.shape[1] == 0:
            return y, h.new_zeros(h.shape[0], self.width) if state is None else state
        return y, h[:, -1]

    def _recur(self, x: Tensor, state: Tensor | None, segment_pos: Tensor | None) -> tuple[Tensor, Tensor]:
        if x.dim() != 3 or x.shape[2] != self.width:
            raise ValueError(f"RGLRU: x must have shape (batch, length, width = {self.width}), got {tuple(x.shape)}")
        if segment_pos is not None and segment_pos.shape != x.shape[:2]:
            raise ValueError(
                f"RGLRU: segment_pos must have shape (batch, length) = {tuple(x.shape[:2])}, "
                f"got {tuple(segment_pos.shape)}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        r = self._gate(x, self.recurrent_gate_weight, self.recurrent_gate_bias).to(wide)
        i = self._gate(x, self.input_gate_weight, self.input_gate_bias).to(wide)
        log_a = -SHARPNESS * F.softplus(self.recurrent_param.to(wide)) * r  # b l d
        a, scale = log_a.exp(), _sqrt_one_minus_square(log_a)
        if segment_pos is not None:
            begins = (segment_pos == 0).unsqueeze(2)
            a, scale = a.masked_fill(begins, 0), scale.masked_fill(begins, 1)
        elif state is None:
            scale = torch.cat([torch.ones_like(scale[:, :1]), scale[:, 1:]], dim=1)
        h = linear_scan(a, scale * i * x.to(wide), state)
        return h.to(x.dtype), h

    def _gate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """sigmoid of a linear layer of each head, (batch, length, width)."""
        heads = x.unflatten(2, (self.num_heads, -1)).unsqueeze(3)  # b l h 1 w
        return torch.sigmoid((heads @ weight).squeeze(3) + bias).flatten(2)


def _sqrt_one_minus_square(log_a: Tensor) -> Tensor:
    """sqrt(1 - a^2), right for a near 1. Its slope is unbounded there, so a is held off by the least that counts."""
    return (-torch.expm1(2 * log_a)).clamp(min=torch.finfo(log_a.dtype).tiny).sqrt()
