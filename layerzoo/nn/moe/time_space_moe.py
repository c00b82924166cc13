"""Experts of a text-to-image model: by the text token that a region belongs to, and by the diffusion step.

Xue et al., "RAPHAEL: Text-to-Image Generation via Large Mixture of Diffusion Paths" (2023), arXiv 2305.18295.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from layerzoo.nn.moe.experts import Experts
from layerzoo.ops.moe.experts import Activation
from layerzoo.reference import accumulate_dtype

FREQUENCIES = 32  # of the sines and cosines that stand for a timestep


class Paths(NamedTuple):
    """Which way an image takes. `space_ids` (batch, text): the expert of each text token. `regions` (batch, length,
    text), bool: where it acts. `time_ids` (batch,): the expert of the step."""

    space_ids: Tensor
    regions: Tensor
    time_ids: Tensor


class TimeSpaceMoE(nn.Module):
    """Maps the tokens of an image, (batch, length, hidden_size), to the same shape. Put a residual connection around.

    Space: a gate picks one expert for each text token i, the largest of softmax(G y_i) with probability p_i. It acts on
    the region where the token's cross-attention is above `threshold` times its mean over the image: `s = 1/n sum over
    the n text tokens of p_i region_i expert_i(x)`. Time: a gate picks one expert for the whole image by its diffusion
    step, with probability p: `t = p expert(x + s)`. The output is s + t.

    Args:
        hidden_size: width of an image token. text_size: of a text token.
        space_experts, time_experts: how many of each. intermediate_size: their inner width; None: 4 hidden_size.
        threshold: of the regions. noise: standard deviation of what is added to the gates' logits while training.
        activation: between an expert's matrices. bias: whether they have biases.

    Raises:
        ValueError: a size that is not positive, a negative threshold or noise, an input of another shape.
    """

    def __init__(
        self,
        hidden_size: int,
        text_size: int,
        space_experts: int = 6,
        time_experts: int = 4,
        intermediate_size: int | None = None,
        threshold: float = 1.0,
        noise: float = 0.1,
        activation: Activation = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if text_size < 1 or threshold < 0 or noise < 0:
            raise ValueError(
                f"TimeSpaceMoE: text_size must be positive, threshold and noise at least 0, "
                f"got {text_size}, {threshold} and {noise}"
            )
        self.hidden_size, self.text_size, self.threshold, self.noise = hidden_size, text_size, threshold, noise
        inner = 4 * hidden_size if intermediate_size is None else intermediate_size
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"activation": activation, "gated": False, "bias": bias}
        self.space_experts = Experts(hidden_size, inner, space_experts, **options, **like)
        self.time_experts = Experts(hidden_size, inner, time_experts, **options, **like)
        self.space_gate = nn.Linear(text_size, space_experts, **like)
        self.time_gate = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, hidden_size, **like), nn.SiLU(), nn.Linear(hidden_size, time_experts, **like)
        )

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for layer in (self.space_experts, self.time_experts, self.space_gate, *self.time_gate):
            if isinstance(layer, Experts | nn.Linear):
                layer.reset_parameters()

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, text_size={self.text_size}, threshold={self.threshold:g}"

    def forward(
        self,
        hidden_states: Tensor,
        text: Tensor,
        attention: Tensor,
        timestep: Tensor,
        text_mask: Tensor | None = None,
        *,
        return_paths: bool = False,
    ) -> Tensor | tuple[Tensor, Paths]:
        """hidden_states (batch, length, hidden_size) -> the same shape; with `return_paths` also the choices.

        text (batch, text, text_size). attention (batch, length, text): how much each image token looks at each text
        token, not negative. timestep (batch,), integer or floating. text_mask (batch, text), bool: False for padding.
        """
        self._check(hidden_states, text, attention, timestep, text_mask)
        batch, length, _ = hidden_states.shape
        probability, space_ids = self._pick(self.space_gate(text))  # b text
        attention = attention.to(accumulate_dtype(attention))
        regions = attention > self.threshold * attention.mean(dim=1, keepdim=True)
        if text_mask is not None:
            regions = regions & text_mask.unsqueeze(1)
            probability = probability / text_mask.sum(dim=1, keepdim=True).clamp(min=1)
        else:
            probability = probability / max(text.shape[1], 1)
        # an expert runs once on a pixel, however many of the text's tokens lead there
        experts = self.space_experts.num_experts
        chosen = space_ids.unsqueeze(1).expand_as(regions)
        weights = probability.new_zeros(batch, length, experts)
        weights = weights.scatter_add(2, chosen, probability.unsqueeze(1) * regions)
        reached = torch.zeros_like(weights).scatter_add(2, chosen, regions.to(weights.dtype)) > 0
        every = torch.arange(experts, device=text.device)
        rows = hidden_states.reshape(-1, self.hidden_size)
        ids = torch.where(reached, every, experts).view(-1, experts)
        space = self.space_experts(rows, ids, weights.view(-1, experts))

        probability, time_ids = self._pick(self.time_gate(self._waves(timestep)))  # b
        ids, weight = (x.unsqueeze(1).expand(batch, length).reshape(-1, 1) for x in (time_ids, probability))
        y = (space + self.time_experts(rows + space, ids, weight)).view(hidden_states.shape)
        return (y, Paths(space_ids, regions, time_ids)) if return_paths else y

    def _pick(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The largest of the probabilities, and whose it is; of equal ones the first."""
        logits = logits.to(accumulate_dtype(logits))
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits)
        probability, ids = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        return probability[..., 0], ids[..., 0]

    def _waves(self, timestep: Tensor) -> Tensor:
        weight = self.space_gate.weight
        wide = accumulate_dtype(weight)
        rates = torch.exp(torch.arange(FREQUENCIES, device=weight.device, dtype=wide) * (-math.log(1e4) / FREQUENCIES))
        angles = timestep.to(wide).unsqueeze(1) * rates
        return torch.cat([angles.cos(), angles.sin()], dim=1).to(weight.dtype)

    def _check(
        self, hidden_states: Tensor, text: Tensor, attention: Tensor, timestep: Tensor, text_mask: Tensor | None
    ) -> None:
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(
                f"TimeSpaceMoE: hidden_states must have shape (batch, length, hidden_size = {self.hidden_size}), "
                f"got {tuple(hidden_states.shape)}"
            )
        batch, length, _ = hidden_states.shape
        if text.dim() != 3 or text.shape[0] != batch or text.shape[2] != self.text_size:
            raise ValueError(
                f"TimeSpaceMoE: text must have shape (batch = {batch}, text, text_size = {self.text_size}), "
                f"got {tuple(text.shape)}"
            )
        shapes = {
            "attention": (attention, "(batch, length, text)", (batch, length, text.shape[1])),
            "timestep": (timestep, "(batch,)", (batch,)),
            "text_mask": (text_mask, "(batch, text)", (batch, text.shape[1])),
        }
        for name, (value, dims, shape) in shapes.items():
            if value is not None and value.shape != shape:
                raise ValueError(f"TimeSpaceMoE: {name} must have shape {dims} = {shape}, got {tuple(value.shape)}")
