"""What an op that falls back to its reference returns: in the memory that a kernel would have made."""

import torch
from torch import Tensor


def new(like: Tensor) -> Tensor:
    """New memory as the kernels lay out a result: parameters contiguous, sequences in the order of their strides."""
    return like.new_empty(like.shape) if like.dim() == 2 else torch.empty_like(like)


def laid_out(like: Tensor | None, value: Tensor | None) -> Tensor | None:
    return None if like is None or value is None else new(like).copy_(value)


def or_empty(like: Tensor, dtype: torch.dtype, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """An op returns tensors only: nothing in place of None."""
    return tuple(like.new_empty((0,), dtype=dtype) if grad is None else grad for grad in grads)
