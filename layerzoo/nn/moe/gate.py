"""A linear gate that chooses few of many experts, with noise that can be learned.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer" (2017), arXiv
1701.06538.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerzoo.reference.ssm import accumulate_dtype


class Gating(NamedTuple):
    """What a gate says of T rows and E experts.

    `weights`, `ids`: (T, k), the weights of a row sum to 1. `counts` (E,): rows of each expert. `importance` (E,): the
    sums of its weights. `losses`: scalars with gradients, by name: "importance" and "load" (Shazeer et al., 2017) and
    "balance" (Fedus et al., 2021: E where one expert has all).
    """

    weights: Tensor
    ids: Tensor
    counts: Tensor
    importance: Tensor
    losses: dict[str, Tensor]

    def dense(self) -> Tensor:
        """The weights of all experts, (T, E), zero for those that were not chosen."""
        shape = (self.weights.shape[0], self.counts.shape[0])
        return self.weights.new_zeros(shape).scatter(1, self.ids, self.weights)


class Gate(nn.Module):
    """Maps rows (T, hidden_size) to a `Gating`: softmax over the `top_k` largest logits; of equal ones the lowest id.

    All in float32 (float64 for float64).

    Args:
        noisy: while training logits get normal noise of a learned size, softplus(noise_weight x) + 0.01.
        num_gates: as many gates, of which each row names its own.

    Raises:
        ValueError: a size that is not positive, top_k above num_experts, an input of another width.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        noisy: bool = False,
        num_gates: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(hidden_size, top_k, num_gates) < 1 or top_k > num_experts:
            raise ValueError(
                f"Gate: hidden_size, top_k and num_gates must be positive and top_k at most num_experts = "
                f"{num_experts}, got {hidden_size}, {top_k} and {num_gates}"
            )
        self.hidden_size, self.num_experts, self.top_k, self.num_gates = hidden_size, num_experts, top_k, num_gates
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (num_gates * num_experts, hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, **like))
        self.noise_weight = nn.Parameter(torch.empty(shape, **like)) if noisy else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws small logits, so that the load is nearly equal at first; the noise begins at softplus(0)."""
        nn.init.normal_(self.weight, std=0.02)
        if self.noise_weight is not None:
            nn.init.zeros_(self.noise_weight)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.num_experts}, top_k={self.top_k}, noisy={self.noise_weight is not None}"

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Gating:
        """x (T, hidden_size) -> `Gating`; `gate` (T,), integer: which of the `num_gates`, the first if None."""
        if x.dim() != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"Gate: x must have shape (T, hidden_size = {self.hidden_size}), got {tuple(x.shape)}")
        x = x.to(accumulate_dtype(x))
        clean = self._linear(x, self.weight, gate)
        noisy, spread = clean, None
        if self.noise_weight is not None and self.training:
            spread = F.softplus(self._linear(x, self.noise_weight, gate)) + 1e-2
            noisy = clean + torch.randn_like(clean) * spread
        best, order = noisy.sort(dim=1, descending=True, stable=True)
        ids = order[:, : self.top_k]
        weights = best[:, : self.top_k].softmax(dim=1)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, ids.flatten(), torch.ones_like(ids.flatten()))
        importance = weights.new_zeros(self.num_experts).scatter_add(0, ids.flatten(), weights.flatten())
        load = counts.to(weights.dtype)
        if spread is not None and self.top_k < self.num_experts:
            # how likely each expert would be chosen if its own noise were drawn again
            last, next_best = best[:, self.top_k - 1, None], best[:, self.top_k, None]
            rival = torch.where(noisy >= last, next_best, last)
            load = torch.special.ndtr((clean - rival) / spread).sum(0)
        rows = max(x.shape[0], 1)
        share = counts.to(weights.dtype) / (rows * self.top_k)
        losses = {
            "importance": cv_squared(importance),
            "load": cv_squared(load),
            "balance": self.num_experts * (share * clean.softmax(dim=1).sum(0) / rows).sum(),
        }
        return Gating(weights, ids, counts, importance, losses)

    def _linear(self, x: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
        every = F.linear(x, weight.to(x.dtype)).view(x.shape[0], self.num_gates, self.num_experts)
        if gate is None:
            return every[:, 0]
        return every.gather(1, gate.view(-1, 1, 1).expand(-1, 1, self.num_experts)).squeeze(1)


def cv_squared(x: Tensor) -> Tensor:
    """The squared coefficient of variation of x (E,), by the population variance; 0 where all are equal or zero."""
    mean = x.mean()
    return (x - mean).square().mean() / mean.square().clamp(min=torch.finfo(x.dtype).tiny)
