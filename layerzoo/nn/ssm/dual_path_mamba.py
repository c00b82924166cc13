"""Dual-path Mamba: a long sequence as chunks, mixed within and then across them.

Jiang, Han and Mesgarani, "Dual-path Mamba: Short and Long-term Bidirectional Selective Structured State Space Models
for Speech Separation" (2024), arXiv 2403.18257, with the chunks of Luo, Chen and Yoshioka, "Dual-path RNN" (2020),
arXiv 1910.06379.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn.ssm.mamba import Mamba
from layerzoo.ops import causal_conv1d, selective_scan


def to_chunks(x: Tensor, size: int) -> Tensor:
    """(batch, length, width) -> (batch, chunks, size, width): chunks that overlap by half, padded with zeros so that
    every step is in two of them. `size` is even."""
    half, length = size // 2, x.shape[1]
    halves = -(-length // half) + 2  # the first and the last hold nothing but padding
    padded = F.pad(x, (0, 0, half, (halves - 1) * half - length))
    parts = padded.unflatten(1, (halves, half))
    return torch.cat([parts[:, :-1], parts[:, 1:]], dim=2)


def overlap_add(chunks: Tensor, length: int) -> Tensor:
    """(batch, chunks, size, width) -> (batch, length, width): each step is the mean of its two places.

    It undoes `to_chunks` to the bit: the half of twice a number is that number.
    """
    half = chunks.shape[2] // 2
    whole = (chunks[:, 1:, :half] + chunks[:, :-1, half:]) / 2
    return whole.flatten(1, 2)[:, :length]


class _TwoWayMamba(nn.Module):
    """The sum of a Mamba along the sequence and of another, with weights of its own, against it."""

    def __init__(self, d_model: int, options: dict[str, Any], like: dict[str, Any]) -> None:
        super().__init__()
        self.ahead, self.back = Mamba(d_model, **options, **like), Mamba(d_model, **options, **like)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ahead(x) + _against(self.back, x)
        return y


def _against(mamba: Mamba, hidden_states: Tensor) -> Tensor:
    """What the layer gives for the flipped sequence, flipped; nothing is flipped in memory."""
    x, z = mamba.in_proj(hidden_states).chunk(2, dim=2)  # b l d each
    weight = mamba.conv1d.weight.squeeze(1)
    x = causal_conv1d(x.transpose(1, 2), weight, mamba.conv1d.bias, activation="silu", reverse=True)
    y = selective_scan(**mamba._scan_arguments(x, z), reverse=True)
    out: Tensor = mamba.out_proj(y.transpose(1, 2))
    return out


class _DualPath(nn.Module):
    """Both mixers of one layer, each with its norm and residual, over (batch, chunks, size, d_model)."""

    def __init__(self, d_model: int, options: dict[str, Any], like: dict[str, Any]) -> None:
        super().__init__()
        self.intra_norm, self.inter_norm = nn.RMSNorm(d_model, **like), nn.RMSNorm(d_model, **like)
        self.intra, self.inter = _TwoWayMamba(d_model, options, like), _TwoWayMamba(d_model, options, like)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.intra(self.intra_norm(x).flatten(0, 1)).view(x.shape)
        across = self.inter_norm(x).transpose(1, 2)  # batch, size, chunks
        y: Tensor = x + self.inter(across.flatten(0, 1)).view(across.shape).transpose(1, 2)
        return y


class DualPathMamba(nn.Module):
    """Maps (batch, length, d_model) to the same shape; every step sees the whole sequence, on both sides.

    The sequence is cut into chunks of `chunk_size` that overlap by half. Each layer mixes within every chunk, then,
    among the steps of equal place, across the chunks: `x + mix(RMSNorm(x))` both times, where mix is the sum of a Mamba
    in each direction. In the end the chunks are put together again, each step as the mean of its two places.

    Args:
        d_model: width of input and output. chunk_size: steps of a chunk, even. num_layers: layers between cutting and
        putting together. d_state, d_conv, expand: of the four Mambas of a layer, as in `Mamba`.

    Raises:
        ValueError: a size out of range, an odd chunk_size, an input of another shape.
    """

    def __init__(
        self,
        d_model: int,
        chunk_size: int = 64,
        num_layers: int = 1,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if chunk_size < 2 or chunk_size % 2:
            raise ValueError(f"DualPathMamba: chunk_size must be even and at least 2, got {chunk_size}")
        if d_model < 1 or num_layers < 1:
            raise ValueError(
                f"DualPathMamba: d_model and num_layers must be at least 1, got {d_model} and {num_layers}"
            )
        self.d_model, self.chunk_size = d_model, chunk_size
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.layers = nn.ModuleList(_DualPath(d_model, options, like) for _ in range(num_layers))

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for module in self.modules():
            if isinstance(module, nn.RMSNorm | Mamba):
                module.reset_parameters()

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, chunk_size={self.chunk_size}"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (batch, length, d_model) -> the same shape."""
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.d_model:
            raise ValueError(
                f"DualPathMamba: hidden_states must have shape (batch, length, d_model = {self.d_model}), "
                f"got {tuple(hidden_states.shape)}"
            )
        chunks = to_chunks(hidden_states, self.chunk_size)
        for layer in self.layers:
            chunks = layer(chunks)
        return overlap_add(chunks, hidden_states.shape[1])
