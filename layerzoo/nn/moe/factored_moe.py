"""Two mixtures of experts, one on the other, each with its own gate: as many paths as pairs of experts.

Eigen, Ranzato and Sutskever, "Learning Factored Representations in a Deep Mixture of Experts" (2013), arXiv 1312.4314.
"""

from typing import Any

import torch
from torch import Tensor, nn

from layerzoo.reference import accumulate_dtype


class FactoredMoE(nn.Module):
    """Maps (..., input_size) to (..., output_size): `z = sum_i g_i(x) f_i(x)`, then `y = sum_j h_j(z) e_j(z)`.

    Experts f, e are linear layers with ReLU; gates g, h are softmaxes of linear, ReLU, linear. All experts run.
    `balance` is the paper's constraint for the beginning of a training: an expert whose running total of gate values is
    more than `margin` rows above the mean gets weight 0 in a batch, and the weights of the others are scaled to sum 1.
    It acts in training mode; set `layer.balance = False` once the experts have begun to differ.

    Args:
        input_size, hidden_size, output_size: widths of x, z and y. num_experts: of each of the two mixtures.
        gate_size: inner width of a gate. balance, margin: see above.

    Raises:
        ValueError: a size that is not positive, an input of another width.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_experts: int = 4,
        gate_size: int = 32,
        balance: bool = True,
        margin: float = 100.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(input_size, hidden_size, output_size, num_experts, gate_size) < 1 or not margin > 0:
            raise ValueError(
                f"FactoredMoE: sizes, num_experts and margin must be positive, got {input_size}, {hidden_size}, "
                f"{output_size}, {num_experts}, gate_size {gate_size} and {margin}"
            )
        self.input_size, self.balance = input_size, balance
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = _Mixture(input_size, hidden_size, num_experts, gate_size, margin, like)
        self.second = _Mixture(hidden_size, output_size, num_experts, gate_size, margin, like)

    def reset_parameters(self) -> None:
        """Draws every parameter anew, and forgets the running totals."""
        self.first.reset_parameters()
        self.second.reset_parameters()

    def extra_repr(self) -> str:
        return f"input_size={self.input_size}, balance={self.balance}"

    def forward(self, x: Tensor, *, return_routing: bool = False) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (..., input_size) -> (..., output_size); with `return_routing` also the weights of both mixtures, each
        (..., num_experts)."""
        if not x.dim() or x.shape[-1] != self.input_size:
            raise ValueError(
                f"FactoredMoE: x must have shape (..., input_size = {self.input_size}), got {tuple(x.shape)}"
            )
        z, first = self.first(x, self.balance)
        y, second = self.second(z, self.balance)
        return (y, (first, second)) if return_routing else y


class _Mixture(nn.Module):
    """One of the two. The buffer `totals` (E,) holds each expert's total of gate values, less the mean of all."""

    totals: Tensor

    def __init__(
        self, inputs: int, outputs: int, experts: int, gate_size: int, margin: float, like: dict[str, Any]
    ) -> None:
        super().__init__()
        self.num_experts, self.margin = experts, margin
        self.experts = nn.Linear(inputs, experts * outputs, **like)
        self.gate = nn.Sequential(
            nn.Linear(inputs, gate_size, **like), nn.ReLU(), nn.Linear(gate_size, experts, **like)
        )
        self.register_buffer("totals", torch.zeros(experts, device=like["device"], dtype=torch.float32))

    def reset_parameters(self) -> None:
        for layer in (self.experts, *self.gate):
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        self.totals.zero_()

    def forward(self, x: Tensor, balance: bool) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)
        weights = logits.to(accumulate_dtype(logits)).softmax(dim=-1)
        if balance and self.training:
            weights = weights.masked_fill(self.totals > self.margin, 0)
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
            with torch.no_grad():
                self.totals += weights.flatten(0, -2).sum(0)
                self.totals -= self.totals.mean()
        weights = weights.to(x.dtype)
        outputs = self.experts(x).relu().unflatten(-1, (self.num_experts, -1))
        return (weights.unsqueeze(-2) @ outputs).squeeze(-2), weights
