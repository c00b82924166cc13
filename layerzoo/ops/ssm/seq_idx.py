"""Ids of packed sequences."""

import itertools

import torch
from torch import Tensor

from layerzoo.ops._checks import INTEGER, check_positive, check_rank


def seq_idx_from_cu_seqlens(cu_seqlens: Tensor, length: int | None = None) -> Tensor:
    """The `seq_idx` of one row in which sequences stand one after the other.

    Reads the values: under torch.compile that breaks the graph, and on CUDA it waits for the device. Call it once for
    all layers.

    Args:
        cu_seqlens: (sequences + 1,) int32 or int64: where each sequence begins, from 0, and where the last one ends. A
            sequence may be empty.
        length: of the row, at least the last offset; the steps from there on are padding (-1). None: the last offset.

    Returns:
        (1, length) int32 ids, counted from 0.

    Raises:
        TypeError, ValueError: offsets of the wrong type, dtype or rank, that do not begin at 0, that decrease, or that
            go beyond the length.
    """
    op = "seq_idx_from_cu_seqlens"
    check_rank(op, "cu_seqlens", cu_seqlens, ("(sequences + 1)",), INTEGER)
    check_positive(op, "cu_seqlens", "offset", cu_seqlens.shape[0])
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{op}: cu_seqlens must begin with 0, got {offsets[0]}")
    for left, right in itertools.pairwise(offsets):
        if left > right:
            raise ValueError(f"{op}: cu_seqlens must not decrease, got {right} after {left}")
    length = offsets[-1] if length is None else length
    if length < offsets[-1]:
        raise ValueError(f"{op}: cu_seqlens must end at or before length = {length}, got {offsets[-1]}")
    steps = torch.arange(length, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    ids = torch.searchsorted(cu_seqlens[1:].contiguous(), steps, right=True, out_int32=True)
    return ids.where(steps < offsets[-1], -1).unsqueeze(0)
