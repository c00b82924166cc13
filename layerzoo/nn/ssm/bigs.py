"""BiGS: bidirectional gated state-space block.

Wang, Yan, Gu and Rush, "Pretraining Without Attention" (2022), arXiv 2212.10544.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn.ssm.s4d import DiagonalSSM


class BiGS(nn.Module):
    """Maps (batch, length, d_model) to the same shape, in both directions, with its norm and residual.

    With X = LayerNorm(x), sigma = GELU, and S4D passes along the sequence and along its reverse:
    `V = sigma(W_v X)`, `U = sigma(W_u (W_1 S4D(sigma(W_f X)) * flip(W_2 S4D(sigma(W_b flip(X))))))`,
    `x + W_o (U * V)`.

    Args:
        d_model: width of input and output. expand: width of U and V over d_model.
        d_state, dt_min, dt_max: of the two S4D passes, as in `S4D`.
        bias: whether the projections have a bias.

    Raises:
        ValueError: a size or step size out of range, an input of another shape.
    """

    def __init__(
        self,
        d_model: int,
        expand: int = 3,
        d_state: int = 64,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_model < 1 or expand < 1:
            raise ValueError(f"BiGS: d_model and expand must be at least 1, got {d_model} and {expand}")
        self.d_model, self.expand = d_model, expand
        inner = expand * d_model

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, device=device, dtype=dtype)

        self.norm = nn.LayerNorm(d_model, device=device, dtype=dtype)
        self.value_proj = linear(d_model, inner)
        self.forward_proj, self.backward_proj = linear(d_model, d_model), linear(d_model, d_model)
        self.forward_ssm = DiagonalSSM(d_model, d_state, dt_min, dt_max, device, dtype)
        self.backward_ssm = DiagonalSSM(d_model, d_state, dt_min, dt_max, device, dtype)
        self.forward_mix, self.backward_mix = linear(d_model, d_model), linear(d_model, d_model)
        self.up_proj, self.out_proj = linear(d_model, inner), linear(inner, d_model)

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for layer in self.children():
            assert isinstance(layer, nn.Linear | nn.LayerNorm | DiagonalSSM)
            layer.reset_parameters()

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, expand={self.expand}"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (batch, length, d_model) -> the same shape."""
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.d_model:
            raise ValueError(
                f"BiGS: hidden_states must have shape (batch, length, d_model = {self.d_model}), "
                f"got {tuple(hidden_states.shape)}"
            )
        x = self.norm(hidden_states)
        ahead = self.forward_mix(self.forward_ssm(F.gelu(self.forward_proj(x))))
        back = self.backward_mix(self.backward_ssm(F.gelu(self.backward_proj(x.flip(1))))).flip(1)
        mixed = F.gelu(self.up_proj(ahead * back)) * F.gelu(self.value_proj(x))
        y: Tensor = hidden_states + self.out_proj(mixed)
        return y
