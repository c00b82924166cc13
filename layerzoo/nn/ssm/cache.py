"""What a state-space layer keeps between two pieces of a text: the last inputs of its convolution, and its state."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from layerzoo.ops import seq_idx_from_cu_seqlens
from layerzoo.ops._checks import check_tensor

Cache = tuple[Tensor, Tensor]


class Cached(Protocol):
    """A layer with a cache."""

    layer_idx: int | None
    conv1d: nn.Conv1d

    @property
    def cache_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the two states of one row: the convolution's, the scan's."""

    def allocate_inference_cache(self, batch_size: int) -> Cache: ...


def zero_cache(layer: Cached, batch_size: int, dtype: torch.dtype | None) -> Cache:
    """`dtype` is that of the inputs, by default the layer's; the state is float32 or wider."""
    weight, (of_conv, of_scan) = layer.conv1d.weight, layer.cache_shapes
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.new_zeros(batch_size, *of_conv, dtype=dtype), weight.new_zeros(batch_size, *of_scan, dtype=wide)


def cache_of(layer: Cached, inference_params: Any, batch_size: int) -> Cache:
    """The layer's cache in mamba-ssm's object: allocated at first, zeros where a text begins."""
    if layer.layer_idx is None:
        name = type(layer).__name__
        raise ValueError(f"{name}: inference_params needs a layer_idx, which this layer was built without")
    caches = inference_params.key_value_memory_dict
    if layer.layer_idx not in caches:
        caches[layer.layer_idx] = layer.allocate_inference_cache(batch_size)
    cache: Cache = caches[layer.layer_idx]
    if inference_params.seqlen_offset == 0:
        for state in cache:
            state.zero_()
    return cache


def check_cache(layer: Cached, conv_state: Tensor, ssm_state: Tensor, rows: int | None) -> None:
    """Raises TypeError or ValueError for states of another type or shape; None: any number of rows, a pool."""
    name, weight = type(layer).__name__, layer.conv1d.weight
    if rows is None:
        rows = conv_state.shape[0] if isinstance(conv_state, Tensor) and conv_state.dim() else 0
    of_conv, of_scan = layer.cache_shapes
    check_tensor(name, "conv_state", conv_state, "(rows, channels, d_conv)", (rows, *of_conv), weight.device)
    dims = "(rows, channels, d_state)" if len(of_scan) == 2 else "(rows, heads, headdim, d_state)"
    check_tensor(name, "ssm_state", ssm_state, dims, (rows, *of_scan), weight.device)


@torch.no_grad()
def move_on(cache: Cache, x: Tensor, state: Tensor, seq_idx: Tensor | None = None) -> None:
    """Writes the last of the inputs x (batch, length, channels) behind those in the cache, and the state over the old.

    Where rows are packed or padded, `seq_idx` (batch, length), these are the last inputs of the last sequence.
    """
    inputs, old = cache
    kept = inputs.shape[2]
    if seq_idx is None or x.shape[1] == 0:
        inputs.copy_(torch.cat([inputs, x[:, -kept:].mT], 2)[:, :, -kept:])
    else:
        inputs.copy_(_last_inputs(inputs, x.mT, seq_idx))
    old.copy_(state)


def _last_inputs(before: Tensor, x: Tensor, seq_idx: Tensor) -> Tensor:
    """Those before belong to the first sequence of a row; what a sequence does not have yet is zero."""
    kept, none = before.shape[2], torch.iinfo(seq_idx.dtype).max
    first = seq_idx.masked_fill(seq_idx < 0, none).amin(1, keepdim=True)  # none: a row of padding, which goes on
    last = seq_idx.amax(1, keepdim=True)
    counts = torch.cat([first.expand(-1, kept), seq_idx], 1) == torch.where(last < 0, first, last)
    places = counts.to(torch.uint8).argsort(dim=1, stable=True)[:, -kept:]
    found = torch.cat([before, x], 2).gather(2, places.unsqueeze(1).expand(-1, x.shape[1], -1))
    return found.masked_fill(~counts.gather(1, places).unsqueeze(1), 0)


# ---- sequences one behind the other in one row ----


def marks_of(layer: object, cu_seqlens: Tensor, seq_idx: Tensor | None, x: Tensor) -> Tensor:
    """`cu_seqlens` as the `seq_idx` of x (1, length, width)."""
    name = type(layer).__name__
    if seq_idx is not None:
        raise ValueError(f"{name}: seq_idx and cu_seqlens say the same thing; give one of them")
    if x.shape[0] != 1:
        raise ValueError(f"{name}: cu_seqlens needs a batch of 1, got {x.shape[0]}")
    return seq_idx_from_cu_seqlens(cu_seqlens, x.shape[1])


def each_sequence(cu_seqlens: Tensor, cache: Cache) -> Iterator[tuple[slice, Cache]]:
    """Where each sequence stands in time, and its row of the cache."""
    for row, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        yield slice(begin, end), (cache[0][row : row + 1], cache[1][row : row + 1])
