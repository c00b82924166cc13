"""A sparse mixture whose gate depends on the task.

Liang et al., "M3ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning with Model-Accelerator
Co-design" (2022), arXiv 2210.14793.
"""

from typing import Any

import torch
from torch import Tensor, nn

from layerzoo.nn.moe.experts import Experts
from layerzoo.nn.moe.router import Router, Routing
from layerzoo.ops._checks import INTEGER
from layerzoo.ops.moe.experts import Activation


class TaskMoE(nn.Module):
    """Maps (batch, length, hidden_size) to the same shape: each token through the `top_k` experts that the gate of its
    sequence's task picks. All tasks share the experts; one task needs only those that its gate picks.

    Args:
        hidden_size: width of input and output. num_tasks: gates. num_experts, top_k: experts, and those of a token.
        intermediate_size: inner width of an expert; None: 4 hidden_size.
        activation: between its matrices. bias: whether they have biases.
        noisy: while training the logits get noise of a learned size.

    Raises:
        ValueError: a size that is not positive, an input or tasks of another shape, a number that is no task.
        TypeError: tasks that are no integers. RuntimeError: a number in a tensor that is no task, on a CPU.
    """

    def __init__(
        self,
        hidden_size: int,
        num_tasks: int,
        num_experts: int = 16,
        top_k: int = 4,
        intermediate_size: int | None = None,
        activation: Activation = "gelu",
        bias: bool = True,
        noisy: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_tasks = hidden_size, num_tasks
        inner = 4 * hidden_size if intermediate_size is None else intermediate_size
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = Router(
            hidden_size, num_experts, top_k, "noisy" if noisy else "topk_softmax", num_gates=num_tasks, **like
        )
        self.experts = Experts(hidden_size, inner, num_experts, gated=False, activation=activation, bias=bias, **like)

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        self.router.reset_parameters()
        self.experts.reset_parameters()

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_tasks={self.num_tasks}"

    def forward(
        self, hidden_states: Tensor, task: Tensor | int, *, return_routing: bool = False
    ) -> Tensor | tuple[Tensor, Routing]:
        """hidden_states (batch, length, hidden_size), task (batch,), integer, or one for all -> the same shape; with
        `return_routing` also what the gate says: the paper adds its losses "importance" and "load"."""
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(
                f"TaskMoE: hidden_states must have shape (batch, length, hidden_size = {self.hidden_size}), "
                f"got {tuple(hidden_states.shape)}"
            )
        batch, length, _ = hidden_states.shape
        if isinstance(task, int):
            if not 0 <= task < self.num_tasks:
                raise ValueError(f"TaskMoE: task must be in [0, {self.num_tasks}), got {task}")
            task = torch.full((batch,), task, device=hidden_states.device)
        if task.dtype not in INTEGER:
            raise TypeError(f"TaskMoE: task must be int32 or int64, got {task.dtype}")
        if task.shape != (batch,):
            raise ValueError(f"TaskMoE: task must have shape (batch,) = ({batch},), got {tuple(task.shape)}")
        rows = hidden_states.reshape(-1, self.hidden_size)
        routing: Routing = self.router(rows, task.long().unsqueeze(1).expand(batch, length).reshape(-1))
        y: Tensor = self.experts(rows, routing.ids, routing.weights).view(hidden_states.shape)
        return (y, routing) if return_routing else y
