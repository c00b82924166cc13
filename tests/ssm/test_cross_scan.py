"""cross_scan and cross_merge against paths that are written down pixel by pixel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerzoo.ops import cross_merge, cross_scan

from .inputs import lay_out
from .paths import path

ORDERS = (
    "row",
    "column",
    "window1_row",
    "window2_row",
    "window2_column",
    "window3_row",
    "window7_row",
    "window7_column",
)
DIRECTIONS = tuple(f"{order}{way}" for order in ORDERS for way in ("", "_reversed"))
SIZES = ((1, 1), (1, 9), (9, 1), (4, 6), (5, 7), (14, 14), (15, 8))
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "part of channels": lambda x: lay_out(x.movedim(1, 3), "rows").movedim(3, 1),
    "gaps": lambda x: lay_out(x, "gaps"),
}


def image(batch: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-99, 99, (batch, channels, height, width), generator=generator).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_pixel_in_its_place(size: tuple[int, int], layout: str) -> None:
    x = image(2, 3, *size)
    for direction, sequence in zip(DIRECTIONS, cross_scan(LAYOUTS[layout](x), DIRECTIONS), strict=True):
        want = torch.stack([x[:, :, i, j] for i, j in path(direction, *size)], 2)
        assert torch.equal(sequence, want), direction


def test_a_known_path_with_smaller_windows_at_the_ends() -> None:
    (got,) = cross_scan(torch.arange(15.0).view(1, 1, 3, 5), ("window2_row",))
    assert got.flatten().tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_merging_undoes_scanning(size: tuple[int, int], layout: str) -> None:
    x = LAYOUTS[layout](image(2, 3, *size))
    for direction in DIRECTIONS:
        assert torch.equal(cross_merge(cross_scan(x, (direction,)), (direction,), *size), x), direction


@given(
    st.lists(st.sampled_from(DIRECTIONS), min_size=1, max_size=6),
    st.integers(1, 16),
    st.integers(1, 16),
    st.sampled_from(list(LAYOUTS)),
)
def test_each_is_the_transpose_of_the_other(directions: list[str], height: int, width: int, layout: str) -> None:
    """<scan(x), s> = <x, merge(s)>, exactly, in integers; and so are the gradients."""
    x = LAYOUTS[layout](image(2, 3, height, width, torch.float64)).requires_grad_()
    s = [torch.randint(-99, 99, (2, 3, height * width)).double().requires_grad_() for _ in directions]
    scanned, merged = cross_scan(x, directions), cross_merge(s, directions, height, width)
    left = torch.stack([(a * b).sum() for a, b in zip(scanned, s, strict=True)]).sum()
    assert left == (x * merged).sum()
    (grad,) = torch.autograd.grad(scanned, x, [t.detach() for t in s])
    assert torch.equal(grad, merged)
    for one, other in zip(torch.autograd.grad(merged, s, x.detach()), scanned, strict=True):
        assert torch.equal(one, other)


def test_what_costs_no_copy() -> None:
    for x in (image(2, 8, 6, 6), image(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)):
        row, column, again = cross_scan(x, ("row", "column", "column"))
        assert row.data_ptr() == x.data_ptr()
        assert again is column
        together = x.stride(1) == 1
        assert all((sequence.stride(1) == 1) == together for sequence in (row, column))
        assert all((s.stride(1) == 1) == together for s in cross_scan(x, ("window2_row", "window4_column")))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    def both(x: Tensor) -> Tensor:
        directions = ("row", "column_reversed", "window2_row", "window7_column_reversed")
        return cross_merge([2 * s for s in cross_scan(x, directions)], directions, x.shape[2], x.shape[3])

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for x in (image(2, 3, 5, 9), image(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)):
        assert torch.equal(compiled(x), both(x))


ROW = torch.ones(2, 3, 6)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: cross_scan(3), TypeError, ("x must be a tensor", "int")),
        (lambda: cross_scan(torch.ones(2, 3, 4)), ValueError, ("x must have shape (batch, channels, height, width)",)),
        (lambda: cross_scan(torch.ones(1, 1, 2, 2).int()), TypeError, ("x must have dtype float32", "int32")),
        (lambda: cross_scan(torch.ones(1, 1, 0, 2)), ValueError, ("x must have at least one pixel", "got 0")),
        (lambda: cross_scan(torch.ones(1, 1, 2, 2), "row"), ValueError, ("directions must be a sequence", "'row'")),
        (lambda: cross_scan(torch.ones(1, 1, 2, 2), ()), ValueError, ("at least one name", "()")),
        *(
            (lambda name=name: cross_scan(torch.ones(1, 1, 2, 2), ("row", name)), ValueError, (f"got {name!r}",))
            for name in (
                "",
                "diagonal",
                "rows",
                "_row",
                "row_reversed_reversed",
                "window2",
                "window_row",
                "window0_row",
            )
        ),
        (lambda: cross_merge([ROW], ("row", "column"), 2, 3), ValueError, ("as many as the 2 directions", "got 1")),
        (lambda: cross_merge([ROW], ("row",), 2, 4), ValueError, ("sequences[0]", "(2, 3, 8)", "got (2, 3, 6)")),
        (lambda: cross_merge([ROW], ("row",), 0, 4), ValueError, ("height must be at least 1", "got 0")),
        (lambda: cross_merge([ROW, ROW.to("meta")], ("row",) * 2, 2, 3), ValueError, ("sequences[1]", "meta")),
        (lambda: cross_merge([ROW], ("line",), 2, 3), ValueError, ("'window<k>_row'", "got 'line'")),
    ],
)
def test_bad_input(call: Callable[[], Any], kind: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(kind) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
