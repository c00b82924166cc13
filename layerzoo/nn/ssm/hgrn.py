"""HGRN: hierarchically gated recurrent unit.

Qin, Yang and Zhong, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling" (2023), arXiv 2311.04823: a
complex linear recurrence whose forget gates cannot fall below a bound that rises with the depth of the layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.ops import linear_scan


class HGRN(nn.Module):
    """Maps (batch, length, d_model) to the same shape, causally: the token mixer of one layer.

    With c_t = SiLU(W_r x_t) + i SiLU(W_i x_t) and g = `lower_bound`,
    `f_t = g + (1 - g) sigmoid(W_f x_t)`, `h_t = f_t e^{i theta} h_{t-1} + (1 - f_t) c_t`, and the output is
    `W_o LayerNorm(SiLU(W_g x_t) [Re h_t, Im h_t])`.

    Args:
        d_model: width of input and output, and number of complex states.
        lower_bound: bound of every forget gate where forward gets none, from 0 up to but not including 1.
        bias: whether the projections have a bias.

    Raises:
        ValueError: a size that is not positive, a bound outside [0, 1), an input whose width is not d_model.
    """

    def __init__(
        self,
        d_model: int,
        lower_bound: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"HGRN: d_model must be at least 1, got {d_model}")
        if not 0 <= lower_bound < 1:
            raise ValueError(f"HGRN: lower_bound must be in [0, 1), got {lower_bound}")
        self.d_model, self.lower_bound = d_model, lower_bound
        self.input_proj = nn.Linear(d_model, 2 * d_model, bias=bias, device=device, dtype=dtype)
        self.forget_proj = nn.Linear(d_model, d_model, bias=bias, device=device, dtype=dtype)
        self.gate_proj = nn.Linear(d_model, 2 * d_model, bias=bias, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(2 * d_model, device=device, dtype=dtype)
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=bias, device=device, dtype=dtype)
        self.theta = nn.Parameter(torch.empty(d_model, device=device, dtype=torch.float32))
        self._reset_theta()

    def reset_parameters(self) -> None:
        """Draws the projections anew; the angles of rotation begin as the frequencies of rotary embeddings."""
        for layer in (self.input_proj, self.forget_proj, self.gate_proj, self.norm, self.out_proj):
            layer.reset_parameters()
        self._reset_theta()

    @torch.no_grad()
    def _reset_theta(self) -> None:
        steps = torch.arange(self.d_model, device=self.theta.device, dtype=torch.float32)
        self.theta.copy_(10000 ** (-2 * steps / self.d_model))

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, lower_bound={self.lower_bound}"

    def forward(
        self, hidden_states: Tensor, lower_bound: Tensor | None = None, segment_pos: Tensor | None = None
    ) -> Tensor:
        """hidden_states (batch, length, d_model) -> the same shape.

        `lower_bound` (d_model,) takes the place of the constructor's: one row of `hgrn_lower_bounds`. `segment_pos`
        (batch, length), integer: the place of each token in its sequence; a sequence begins at each 0. None: one
        sequence a row.
        """
        return self._mix(hidden_states, None, lower_bound, segment_pos)[0]

    def step(
        self,
        hidden_states: Tensor,
        state: Tensor | None = None,
        lower_bound: Tensor | None = None,
        segment_pos: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The next tokens, one or more: (batch, length, d_model) and the state -> (output, state after them).

        A state is complex (batch, d_model); None is the start of a sequence. The rest as in forward.
        """
        y, h = self._mix(hidden_states, state, lower_bound, segment_pos)
        if h.shape[1] == 0:
            return y, h.new_zeros(h.shape[0], self.d_model) if state is None else state
        return y, h[:, -1]

    def _mix(
        self, x: Tensor, state: Tensor | None, lower_bound: Tensor | None, segment_pos: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(
                f"HGRN: hidden_states must have shape (batch, length, d_model = {self.d_model}), got {tuple(x.shape)}"
            )
        if segment_pos is not None and segment_pos.shape != x.shape[:2]:
            raise ValueError(
                f"HGRN: segment_pos must have shape (batch, length) = {tuple(x.shape[:2])}, "
                f"got {tuple(segment_pos.shape)}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        low = self.lower_bound if lower_bound is None else lower_bound.to(wide)
        forget = low + (1 - low) * torch.sigmoid(self.forget_proj(x).to(wide))  # b l d
        real, imaginary = F.silu(self.input_proj(x).to(wide)).chunk(2, dim=2)
        inputs = torch.complex((1 - forget) * real, (1 - forget) * imaginary)
        theta = self.theta.to(wide)
        kept = forget if segment_pos is None else forget.masked_fill((segment_pos == 0).unsqueeze(2), 0)
        h = linear_scan(torch.complex(kept * theta.cos(), kept * theta.sin()), inputs, state)
        mixed = torch.cat([h.real, h.imag], dim=2).to(x.dtype) * F.silu(self.gate_proj(x))
        y: Tensor = self.out_proj(self.norm(mixed))
        return y, h


def hgrn_lower_bounds(logits: Tensor) -> Tensor:
    """Bounds of the forget gates of a stack: logits (layers, d_model), a parameter of the model -> the same shape.

    Row k is the cumulative sum of softmax(logits) over the layers, less its first term: 0 in the first layer, rising
    with depth, below 1 (Qin, Yang and Zhong, 2023, section 3.2).

    Raises:
        ValueError: logits that are not a matrix.
    """
    if logits.dim() != 2:
        raise ValueError(f"hgrn_lower_bounds: logits must have shape (layers, d_model), got {tuple(logits.shape)}")
    shares = logits.softmax(0)
    return shares.cumsum(0) - shares[:1]
