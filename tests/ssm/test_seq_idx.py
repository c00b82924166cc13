"""layerzoo.ops.seq_idx_from_cu_seqlens: marks of packed sequences from their offsets."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layerzoo.ops import seq_idx_from_cu_seqlens


@given(st.lists(st.integers(0, 5), max_size=6), st.none() | st.integers(0, 7), st.sampled_from(["int32", "int64"]))
def test_each_step_has_the_number_of_its_sequence(sizes: list[int], padding: int | None, dtype: str) -> None:
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(getattr(torch, dtype))
    length = None if padding is None else sum(sizes) + padding
    want = [mark for mark, size in enumerate(sizes) for _ in range(size)] + [-1] * (padding or 0)
    ids = seq_idx_from_cu_seqlens(offsets, length)
    assert ids.dtype == torch.int32
    assert ids.tolist() == [want]


def test_strides() -> None:
    offsets = torch.tensor([0, 9, 2, 9, 5, 9])[::2]
    assert seq_idx_from_cu_seqlens(offsets).tolist() == [[0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([0, 1],), TypeError, "cu_seqlens must be a tensor, got list"),
        ((torch.tensor([0.0, 1.0]),), TypeError, "cu_seqlens must have dtype int32, int64, got float32"),
        ((torch.tensor([[0, 1]]),), ValueError, r"cu_seqlens must have shape \(sequences \+ 1\), got \(1, 2\)"),
        ((torch.tensor([], dtype=torch.int32),), ValueError, "cu_seqlens must have at least one offset, got 0"),
        ((torch.tensor([1, 2]),), ValueError, "cu_seqlens must begin with 0, got 1"),
        ((torch.tensor([0, 4, 3]),), ValueError, "cu_seqlens must not decrease, got 3 after 4"),
        ((torch.tensor([0, 4]), 3), ValueError, "cu_seqlens must end at or before length = 3, got 4"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"seq_idx_from_cu_seqlens: {words}"):
        seq_idx_from_cu_seqlens(*arguments)
