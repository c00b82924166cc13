"""timm: what lets layers of ours stand where its models mix tokens or pixels, for `swap`.

Nothing of timm is imported: it is the arguments of what is replaced that count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerzoo.zoo import registry


class TokenMixer(nn.Module):
    """Stands in for the attention of timm's vision transformers: (batch, tokens, width) -> the same shape.

    `swap(model, "blocks.*.attn", TokenMixer, mixer="ssm/vision_mamba", prefix_tokens=1, d_model=192)`

    The model's prefix tokens (class and register tokens) stand before the patches. A pass along the sequence would show
    them nothing of the image, so they are moved to the middle of the patches for the mixer, where Vim (Zhu et al.,
    2024) has its class token, and back. The model outside sees no difference.

    Args:
        mixer: a layer of the zoo that maps (batch, length, width) to the same shape.
        prefix_tokens: the model's `num_prefix_tokens`.
        config: of the layer.

    Raises:
        ValueError: a negative number of prefix tokens, or more than there are tokens; a mask, or a causal call: there
            is nothing here that could obey.
    """

    def __init__(self, mixer: str, prefix_tokens: int = 0, **config: Any) -> None:
        super().__init__()
        if prefix_tokens < 0:
            raise ValueError(f"TokenMixer: prefix_tokens must be at least 0, got {prefix_tokens}")
        self.prefix_tokens = prefix_tokens
        self.mixer = registry.create(mixer, **config)

    def extra_repr(self) -> str:
        return f"prefix_tokens={self.prefix_tokens}"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x (batch, tokens, width) -> the same shape; the other arguments are those of timm's attention."""
        if attn_mask is not None or is_causal:
            got = "is_causal" if is_causal else "a mask"
            raise ValueError(f"TokenMixer: attn_mask must be None and is_causal False, got {got}")
        prefix = self.prefix_tokens
        if prefix == 0:
            y: Tensor = self.mixer(x)
            return y
        patches = x.shape[1] - prefix
        if patches < 0:
            raise ValueError(f"TokenMixer: x must have at least prefix_tokens = {prefix} tokens, got {x.shape[1]}")
        left, right = patches // 2, patches - patches // 2
        first, before, after = x.split([prefix, left, right], dim=1)
        before, first, after = self.mixer(torch.cat([before, first, after], dim=1)).split([left, prefix, right], dim=1)
        return torch.cat([first, before, after], dim=1)


class ImageMixer(nn.Module):
    """Stands in for what mixes pixels in timm's convolutional models: (batch, width, h, w) -> the same shape.

    `swap(model, "stages.*.blocks.*.conv_dw", ImageMixer, mixer="ssm/ss2d", d_model=48)`: the depthwise convolutions of
    a ConvNeXt whose stages have one width. Channels are moved last for the mixer, without a copy, and back.

    Args:
        mixer: a layer of the zoo that maps (batch, height, width, channels) to the same shape.
        config: of the layer.
    """

    def __init__(self, mixer: str, **config: Any) -> None:
        super().__init__()
        self.mixer = registry.create(mixer, **config)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) -> the same shape."""
        y: Tensor = self.mixer(x.movedim(1, 3))
        return y.movedim(3, 1)
