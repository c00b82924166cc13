"""Soft mixture of experts: experts work on averages of all tokens, and every token gets an average of what they give.

Puigcerver, Riquelme, Mustafa and Houlsby, "From Sparse to Soft Mixtures of Experts" (2023), arXiv 2308.00951.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerzoo.nn.moe.experts import Experts
from layerzoo.ops.moe.experts import Activation
from layerzoo.reference import accumulate_dtype


class SoftMoE(nn.Module):
    """Maps (batch, length, hidden_size) to the same shape. Not causal: every token sees every other.

    Each expert has `slots_per_expert` slots. With X the tokens of a sequence, phi (slots, hidden_size) and norm() of
    length 1: `logits = norm(X) (scale norm(phi))^T`, `D = softmax(logits) over tokens`, `C = softmax(logits) over
    slots`, and the output is `C experts(D^T X)`. Logits and both softmaxes are in float32 (float64 for float64).

    Args:
        hidden_size: width of input and output. num_experts, slots_per_expert: their product is best near the length.
        intermediate_size: inner width of an expert; None: 4 hidden_size.
        activation: between its matrices. bias: whether they have biases.

    Raises:
        ValueError: a size that is not positive, an input or a mask of another shape. TypeError: a mask of another type.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        slots_per_expert: int = 1,
        intermediate_size: int | None = None,
        activation: Activation = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if slots_per_expert < 1:
            raise ValueError(f"SoftMoE: slots_per_expert must be at least 1, got {slots_per_expert}")
        self.hidden_size, self.slots_per_expert = hidden_size, slots_per_expert
        inner = 4 * hidden_size if intermediate_size is None else intermediate_size
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.experts = Experts(hidden_size, inner, num_experts, gated=False, activation=activation, bias=bias, **like)
        self.phi = nn.Parameter(torch.empty(num_experts * slots_per_expert, hidden_size, **like))
        self.scale = nn.Parameter(torch.empty((), **like))
        self._reset_slots()

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        self.experts.reset_parameters()
        self._reset_slots()

    def _reset_slots(self) -> None:
        nn.init.normal_(self.phi, std=self.hidden_size**-0.5)
        nn.init.ones_(self.scale)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, slots_per_expert={self.slots_per_expert}"

    def route(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """D and C, both (batch, length, slots); slot s belongs to expert s // slots_per_expert."""
        wide = accumulate_dtype(hidden_states)
        tokens = F.normalize(hidden_states.to(wide), dim=2)
        slots = self.scale.to(wide) * F.normalize(self.phi.to(wide), dim=1)
        logits = tokens @ slots.mT
        if mask is None:
            return logits.softmax(dim=1), logits.softmax(dim=2)
        # not -inf, of which a row of nothing but padding would make NaN
        kept = logits.masked_fill(~mask.unsqueeze(2), torch.finfo(wide).min)
        return kept.softmax(dim=1), logits.softmax(dim=2)

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden_states (batch, length, hidden_size) -> the same shape.

        `mask` (batch, length), bool: True for tokens, False for padding, which has no effect whatever stands there, and
        whose output is zero.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(
                f"SoftMoE: hidden_states must have shape (batch, length, hidden_size = {self.hidden_size}), "
                f"got {tuple(hidden_states.shape)}"
            )
        x = hidden_states
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"SoftMoE: mask must be bool, got {mask.dtype}")
            if mask.shape != x.shape[:2]:
                raise ValueError(
                    f"SoftMoE: mask must have shape (batch, length) = {tuple(x.shape[:2])}, got {tuple(mask.shape)}"
                )
            x = x.masked_fill(~mask.unsqueeze(2), 0)
        dispatch, combine = self.route(x, mask)
        slots = (dispatch.mT.to(x.dtype) @ x).flatten(0, 1)
        owner = torch.arange(self.experts.num_experts, device=x.device).repeat_interleave(self.slots_per_expert)
        ids = owner.repeat(x.shape[0]).unsqueeze(1)
        outputs = self.experts(slots, ids, torch.ones_like(ids, dtype=x.dtype))
        y: Tensor = combine.to(x.dtype) @ outputs.view(x.shape[0], self.phi.shape[0], self.hidden_size)
        return y if mask is None else y.masked_fill(~mask.unsqueeze(2), 0)
