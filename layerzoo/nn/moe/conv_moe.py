"""A mixture of convolutional experts: each image goes through the few that its own average pixel chooses.

Pavlitska, Hubschneider, Struppek and Zöllner, "Sparsely-gated Mixture-of-Expert Layers for CNN Interpretability"
(2022), arXiv 2204.10598; the gate is that of Shazeer et al. (2017).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn.moe.any_experts import AnyExperts, factory_of
from layerzoo.nn.moe.router import Router, Routing


class ConvMoE(AnyExperts):
    """Maps images (batch, in_channels, height, width) to (batch, out_channels, …): sum of weights[k] expert_k(image).

    The gate sees each image's mean over its pixels and takes the `top_k` largest of its logits. Experts are residual
    blocks of two convolutions, each with a group norm over all channels of an image; `around` takes any other modules.
    In eager mode an expert runs on its own images only. Under torch.compile and torch.export, where shapes may not
    depend on values, every expert runs on all of them, to the same result.

    Args:
        in_channels, num_experts, top_k: as said. out_channels: None: in_channels.
        kernel_size: of both convolutions, odd. stride: of the first; where it, or out_channels, changes the shape, the
            residual goes through a convolution of size 1.
        noisy: while training logits get noise of a learned size.

    Raises:
        ValueError: a size out of range, images of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        num_experts: int = 4,
        top_k: int = 2,
        out_channels: int | None = None,
        kernel_size: int = 3,
        stride: int = 1,
        noisy: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        outputs = in_channels if out_channels is None else out_channels
        if min(in_channels, outputs, stride) < 1 or kernel_size % 2 != 1:
            raise ValueError(
                f"ConvMoE: in_channels, out_channels and stride must be positive and kernel_size odd, "
                f"got {in_channels}, {outputs}, {stride} and {kernel_size}"
            )
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        experts = [_Block(in_channels, outputs, kernel_size, stride, like) for _ in range(num_experts)]
        self._connect(experts, in_channels, top_k, noisy, like)

    @classmethod
    def around(cls, experts: Sequence[nn.Module], in_channels: int, top_k: int = 2, noisy: bool = True) -> "ConvMoE":
        """A mixture of modules that exist, which become part of it; all map images to outputs of one shape.

        Where they are compiled, or norms over the batch are in them, mind that then all of them see every image.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._connect(experts, in_channels, top_k, noisy, factory_of(experts))
        return layer

    def _connect(
        self, experts: Sequence[nn.Module], in_channels: int, top_k: int, noisy: bool, like: dict[str, Any]
    ) -> None:
        self.in_channels = in_channels
        self.router = Router(in_channels, len(experts), top_k, "noisy" if noisy else "topk_softmax", **like)
        self.experts = nn.ModuleList(experts)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}"

    def forward(self, images: Tensor, *, return_routing: bool = False) -> Tensor | tuple[Tensor, Routing]:
        """images (batch, in_channels, height, width) -> (batch, out_channels, …); with `return_routing` also what the
        gate says: `routing.losses["importance"]` is the loss that keeps the experts in use."""
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"ConvMoE: images must have shape (batch, in_channels = {self.in_channels}, height, width), "
                f"got {tuple(images.shape)}"
            )
        routing: Routing = self.router(images.mean(dim=(2, 3)))
        if torch.compiler.is_compiling() or images.is_meta or not images.shape[0]:
            y = self._all(images, routing)
        else:
            y = self._chosen(images, routing)
        return (y, routing) if return_routing else y

    def _all(self, images: Tensor, routing: Routing) -> Tensor:
        weights = routing.dense().to(images.dtype)
        parts = [w.view(-1, 1, 1, 1) * expert(images) for w, expert in zip(weights.mT, self.experts, strict=True)]
        return torch.stack(parts).sum(0)

    def _chosen(self, images: Tensor, routing: Routing) -> Tensor:
        y: Tensor | None = None
        for index, expert in enumerate(self.experts):
            rows, slots = (routing.ids == index).nonzero(as_tuple=True)
            if len(rows):
                part = expert(images[rows]) * routing.weights[rows, slots].to(images.dtype).view(-1, 1, 1, 1)
                y = part.new_zeros((images.shape[0], *part.shape[1:])) if y is None else y
                y = y.index_add(0, rows, part)
        assert y is not None
        return y


class _Block(nn.Module):
    """Two convolutions with norms, and what went in added."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, like: dict[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False, **like)
        self.norm1 = nn.GroupNorm(1, outputs, **like)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel, 1, kernel // 2, bias=False, **like)
        self.norm2 = nn.GroupNorm(1, outputs, **like)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False, **like)

    def forward(self, images: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(images)))
        return F.relu(self.norm2(self.conv2(inner)) + self.shortcut(images))
