"""What a state-space layer keeps between two pieces of a text: the last inputs of its convolution, and its state."""

from typing import Any, Protocol

import torch
from torch import Tensor

Cache = tuple[Tensor, Tensor]


class Cached(Protocol):
    """A layer with a cache."""

    layer_idx: int | None

    def allocate_inference_cache(self, batch_size: int) -> Cache: ...


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


@torch.no_grad()
def move_on(cache: Cache, recent: Tensor, state: Tensor) -> None:
    """Writes the last inputs `recent` (batch, channels, any) behind those in the cache, and the state over the old."""
    inputs, old = cache
    inputs.copy_(torch.cat([inputs, recent], 2)[:, :, recent.shape[2] :])
    old.copy_(state)
