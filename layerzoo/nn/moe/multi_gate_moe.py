"""Experts that several tasks share, and for each task a gate of its own.

Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts" (KDD 2018), and for
sequences Yuan et al., "A Novel Temporal Multi-Gate Mixture-of-Experts Approach for Vehicle Trajectory and Driving
Intention Prediction" (2023), arXiv 2308.00533. The losses: Kendall, Gal and Cipolla (2018), arXiv 1705.07115.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerzoo.nn.moe.any_experts import AnyExperts, factory_of
from layerzoo.ops import linear_scan
from layerzoo.reference import accumulate_dtype


class MultiGateMoE(AnyExperts):
    """Maps (batch, ..., hidden_size) to (num_tasks, batch, ..., output_size): `y_k = sum_e softmax(W_k x)_e f_e(x)`.

    Every expert runs once for all tasks. With `temporal` x is (batch, length, hidden_size) and the gates see a summary
    of the whole sequence, the last state of `h_t = f_t h_{t-1} + (1 - f_t) c_t` with f_t = sigmoid of one linear layer
    of x_t and c_t another; a sequence then has one mixture. Experts are two linear layers with ReLU behind the first;
    `around` takes any other modules.

    Args:
        hidden_size: width of the input. num_tasks, num_experts: see above. output_size: None: hidden_size.
        intermediate_size: inner width of an expert; None: 4 hidden_size. temporal: see above.

    Raises:
        ValueError: a size that is not positive, an input of another shape, an empty sequence with `temporal`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_tasks: int = 2,
        num_experts: int = 4,
        output_size: int | None = None,
        intermediate_size: int | None = None,
        temporal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        outputs = hidden_size if output_size is None else output_size
        inner = 4 * hidden_size if intermediate_size is None else intermediate_size
        if min(hidden_size, outputs, inner) < 1:
            raise ValueError(
                f"MultiGateMoE: hidden_size, output_size and intermediate_size must be positive, "
                f"got {hidden_size}, {outputs} and {inner}"
            )
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        experts = [
            nn.Sequential(nn.Linear(hidden_size, inner, **like), nn.ReLU(), nn.Linear(inner, outputs, **like))
            for _ in range(num_experts)
        ]
        self._connect(experts, hidden_size, num_tasks, temporal, like)

    @classmethod
    def around(
        cls, experts: Sequence[nn.Module], hidden_size: int, num_tasks: int = 2, temporal: bool = False
    ) -> "MultiGateMoE":
        """Gates for modules that exist, which become part of it; each maps the input to a tensor of one shape, whose
        first dimensions are those that have a mixture each."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._connect(experts, hidden_size, num_tasks, temporal, factory_of(experts))
        return layer

    def _connect(
        self, experts: Sequence[nn.Module], hidden_size: int, num_tasks: int, temporal: bool, like: dict[str, Any]
    ) -> None:
        if min(len(experts), num_tasks) < 1:
            raise ValueError(
                f"MultiGateMoE: num_experts and num_tasks must be positive, got {len(experts)} and {num_tasks}"
            )
        self.hidden_size, self.num_tasks, self.temporal = hidden_size, num_tasks, temporal
        self.experts = nn.ModuleList(experts)
        self.gates = nn.Linear(hidden_size, num_tasks * len(experts), bias=False, **like)
        self.summary = nn.Linear(hidden_size, 2 * hidden_size, **like) if temporal else None

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_tasks={self.num_tasks}, temporal={self.temporal}"

    def route(self, x: Tensor) -> Tensor:
        """The weights, (num_tasks, batch, ..., experts), or (num_tasks, batch, experts) with `temporal`."""
        if self.summary is not None:
            forget, value = self.summary(x).to(accumulate_dtype(x)).chunk(2, dim=2)
            forget = torch.sigmoid(forget)
            x = linear_scan(forget, (1 - forget) * value)[:, -1].to(x.dtype)
        logits = self.gates(x).unflatten(-1, (self.num_tasks, len(self.experts)))
        return logits.to(accumulate_dtype(logits)).softmax(-1).to(logits.dtype).movedim(-2, 0)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, ..., hidden_size) -> (num_tasks, batch, ..., output_size)."""
        if x.dim() < 2 or x.shape[-1] != self.hidden_size or (self.temporal and (x.dim() != 3 or not x.shape[1])):
            dims = "length >= 1" if self.temporal else "..."
            raise ValueError(
                f"MultiGateMoE: x must have shape (batch, {dims}, hidden_size = {self.hidden_size}), "
                f"got {tuple(x.shape)}"
            )
        weights = self.route(x)
        outputs = torch.stack([expert(x) for expert in self.experts])
        weights = weights.movedim(-1, 1)
        shared = (1,) * (outputs.dim() - weights.dim() + 1)  # dimensions of an output that have one mixture
        return (weights.reshape(*weights.shape, *shared) * outputs).sum(1)


class TaskUncertainty(nn.Module):
    """Adds up the losses of several tasks by weights that it learns: sum of exp(-s_k) L_k + s_k, from s = 0.

    At its minimum s_k is the logarithm of L_k: a task that stays noisy counts less (Kendall, Gal and Cipolla, 2018).

    Raises:
        ValueError: no task, or losses of another shape.
    """

    def __init__(
        self, num_tasks: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"TaskUncertainty: num_tasks must be at least 1, got {num_tasks}")
        self.log_variance = nn.Parameter(torch.zeros(num_tasks, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Weighs all tasks alike."""
        nn.init.zeros_(self.log_variance)

    def forward(self, losses: Tensor) -> Tensor:
        """losses (num_tasks,) -> a scalar."""
        if losses.shape != self.log_variance.shape:
            raise ValueError(
                f"TaskUncertainty: losses must have shape {tuple(self.log_variance.shape)}, got {tuple(losses.shape)}"
            )
        return (torch.exp(-self.log_variance) * losses + self.log_variance).sum()
