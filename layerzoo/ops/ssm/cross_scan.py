"""The orders in which a scan walks over the pixels of an image: to sequences, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from layerzoo.ops._checks import check_positive, check_rank, check_tensor

CROSS = ("row", "column", "row_reversed", "column_reversed")


def cross_scan(x: Tensor, directions: Sequence[str] = CROSS) -> tuple[Tensor, ...]:
    """The pixels of images as sequences, one for each direction (VMamba, Liu et al., 2024, arXiv 2401.10166).

    A direction is "row" (row by row), "column", or for any k "windowk_row" or "windowk_column": k x k windows one after
    the other (LocalMamba, Huang et al., 2024, arXiv 2403.09338), both they and the pixels in them row by row, or column
    by column. Windows begin at the top left; where k does not divide a side the last ones are smaller, and nothing is
    padded. With "_reversed" behind it a direction runs from its last pixel to its first.

    "row" is a view of x where strides allow it. Other orders are copied, once for each order and once more for its
    reverse: where `selective_scan` reads them, `reverse=True` saves the second. Channels that lie together in memory
    still do in the sequences. What the directions need more than once is one tensor.

    Args:
        x: (batch, channels, height, width).
        directions: at least one; the default is VMamba's.

    Returns:
        A (batch, channels, height * width) for each direction; differentiable as often as wanted.

    Raises:
        TypeError, ValueError: x of the wrong type, dtype or rank, or without pixels; a direction that is none.
    """
    op = "cross_scan"
    check_rank(op, "x", x, ("(batch, channels, height, width)",))
    check_positive(op, "x", "pixel", x.shape[2] * x.shape[3])
    sequences: dict[str, Tensor] = {}
    directions = check_directions(op, directions)
    for direction in directions:
        order = direction.removesuffix("_reversed")
        if order not in sequences:
            sequences[order] = _to_sequence(x, order)
        if direction not in sequences:
            sequences[direction] = sequences[order].flip(2)
    return tuple(sequences[direction] for direction in directions)


def cross_merge(sequences: Sequence[Tensor], directions: Sequence[str], height: int, width: int) -> Tensor:
    """The images whose pixels are the sums of what the sequences hold of them: the transpose of `cross_scan`.

    Args:
        sequences: a (batch, channels, height * width) for each direction. directions: as for `cross_scan`.
        height, width: of the images.

    Returns:
        (batch, channels, height, width); differentiable as often as wanted.

    Raises:
        TypeError, ValueError: sequences of the wrong type, dtype, shape or device, or of another number than the
            directions; a direction that is none; a side that is not positive.
    """
    op = "cross_merge"
    directions = check_directions(op, directions)
    if len(sequences) != len(directions):
        raise ValueError(
            f"{op}: sequences must be as many as the {len(directions)} directions {directions}, got {len(sequences)}"
        )
    for name, side in (("height", height), ("width", width)):
        if side < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {side}")
    first = sequences[0]
    check_rank(op, "sequences[0]", first, ("(batch, channels, height * width)",))
    shape = (*first.shape[:2], height * width)
    sums: dict[str, Tensor] = {}  # of each order
    for i, (sequence, direction) in enumerate(zip(sequences, directions, strict=True)):
        check_tensor(op, f"sequences[{i}]", sequence, "(batch, channels, height * width)", shape, first.device)
        order = direction.removesuffix("_reversed")
        forward = sequence if direction == order else sequence.flip(2)
        sums[order] = sums[order] + forward if order in sums else forward
    images = [_to_image(total, order, height, width) for order, total in sums.items()]
    merged = images[0]
    for image in images[1:]:
        merged = merged + image
    return merged


def check_directions(op: str, directions: Sequence[str]) -> tuple[str, ...]:
    """The directions; raises ValueError for none, or for one that is none."""
    if isinstance(directions, str) or len(directions) == 0:
        raise ValueError(f"{op}: directions must be a sequence of at least one name, got {directions!r}")
    for direction in directions:
        order = direction.removesuffix("_reversed")
        window = order.removesuffix("row") if order.endswith("row") else order.removesuffix("column")
        side = window.removeprefix("window").removesuffix("_")
        known = window in ("", f"window{side}_") and window != order
        if not known or (window and not (side.isdecimal() and int(side) > 0)):
            raise ValueError(
                f"{op}: directions must be 'row', 'column', 'window<k>_row' or 'window<k>_column' with k >= 1, each "
                f"with or without '_reversed', got {direction!r}"
            )
    return tuple(directions)


def _window(order: str) -> int:
    """The side of the windows; 0 for none."""
    window = order.rpartition("_")[0]
    return int(window.removeprefix("window")) if window else 0


def _to_sequence(x: Tensor, order: str) -> Tensor:
    """(b, d, h, w) -> (b, d, h w) in the order."""
    x = x.mT if order.endswith("column") else x
    if not _together(x):
        return _walk(x, 2, _window(order))
    return _walk(x.movedim(1, 3), 1, _window(order)).mT


def _to_image(sequence: Tensor, order: str, height: int, width: int) -> Tensor:
    """The inverse of `_to_sequence`."""
    sides = (width, height) if order.endswith("column") else (height, width)
    if _together(sequence):
        image = _walk_back(sequence.mT, 1, _window(order), *sides).movedim(3, 1)
    else:
        image = _walk_back(sequence, 2, _window(order), *sides)
    return image.mT if order.endswith("column") else image


def _together(x: Tensor) -> bool:
    """Do channels lie together in memory?"""
    return x.shape[1] > 1 and x.stride(1) == 1


def _parts(side: int, window: int) -> list[tuple[int, int, int]]:
    """(begin, length, side of its windows): what whole windows cover, and the rest."""
    rest = side % window
    parts = ((0, side - rest, window), (side - rest, rest, rest))
    return [part for part in parts if part[1]]


def _walk(x: Tensor, dim: int, window: int) -> Tensor:
    """Rows and columns, dimensions `dim` and `dim` + 1, as one: row by row, or window by window."""
    if window == 0:
        return x.flatten(dim, dim + 1)
    bands = []
    for top, height, h in _parts(x.shape[dim], window):
        tiles = []
        for left, width, w in _parts(x.shape[dim + 1], window):
            tile = x.narrow(dim, top, height).narrow(dim + 1, left, width)
            tile = tile.unflatten(dim, (-1, h)).unflatten(dim + 2, (-1, w)).transpose(dim + 1, dim + 2)
            tiles.append(tile.flatten(dim + 1, dim + 3))
        bands.append(_joined(tiles, dim + 1).flatten(dim, dim + 1))
    return _joined(bands, dim)


def _walk_back(x: Tensor, dim: int, window: int, height: int, width: int) -> Tensor:
    """The inverse of `_walk`."""
    if window == 0:
        image: Tensor = x.unflatten(dim, (height, width))
        return image
    bands = []
    for top, rows, h in _parts(height, window):
        band = x.narrow(dim, top * width, rows * width).unflatten(dim, (-1, h * width))
        tiles = []
        for left, columns, w in _parts(width, window):
            tile = band.narrow(dim + 1, h * left, h * columns).unflatten(dim + 1, (-1, h, w))
            tiles.append(tile.transpose(dim + 1, dim + 2).flatten(dim + 2, dim + 3))
        bands.append(_joined(tiles, dim + 2).flatten(dim, dim + 1))
    return _joined(bands, dim)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
