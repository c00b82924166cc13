"""What a case runs with: its sizes, type, device and threads, as the command line's words say."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from layerzoo.bench.case import TOLERANCES, Case, Shape

MOST = 24  # values of a sweep


@dataclass(frozen=True)
class Sweep:
    """A size of the shape, and the values that it takes in turn."""

    size: str
    values: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Sweep":
        """`L=256:65536:x4` (from, to, times 4), `L=64:256:+64` (from, to, plus 64) or `L=1,7,512`. ValueError else."""
        found = re.fullmatch(r"(\w+)=(?:(\d+):(\d+):([x+])(\d+)|(\d+(?:,\d+)*))", text)
        if not found:
            raise ValueError(f"bench: sweep must be like L=256:65536:x4, L=64:256:+64 or L=1,7,512, got {text!r}")
        size, start, stop, kind, step, values = found.groups()
        if values:
            return cls._checked(text, size, [int(value) for value in values.split(",")])
        first, last, by = int(start), int(stop), int(step)
        if first < 1 or by < 1 or (kind == "x" and by < 2):
            raise ValueError(f"bench: sweep must start at 1 or more and grow, got {text!r}")
        grown = [first]
        while len(grown) <= MOST and (value := grown[-1] * by if kind == "x" else grown[-1] + by) <= last:
            grown.append(value)
        return cls._checked(text, size, grown if first <= last else [])

    @classmethod
    def _checked(cls, text: str, size: str, values: list[int]) -> "Sweep":
        if not 1 <= len(values) <= MOST or min(values) < 1:
            raise ValueError(f"bench: sweep must have 1 to {MOST} values, all of them at least 1, got {text!r}")
        return cls(size, tuple(values))


@dataclass(frozen=True)
class Setting:
    """One choice for one case."""

    shape: Shape
    dtype: str
    device: str = "cpu"
    threads: int = 1
    swept: str = ""


def settings(
    case: Case, threads: Sequence[int], dtypes: Sequence[str], device: str, sweep: Sweep | None
) -> Iterator[Setting]:
    """Every setting of a case: all threads by all types (those that the case has) by all values of the sweep."""
    if device not in case.devices:
        return
    shapes = [case.shape]
    if sweep is not None:
        shapes = [{**case.shape, sweep.size: value} for value in sweep.values] if sweep.size in case.shape else []
    for count in threads:
        for dtype in dtypes or case.dtypes[:1]:
            if dtype in case.dtypes:
                for shape in shapes:
                    yield Setting(shape, dtype, device, count, sweep.size if sweep else "")


def check_device(device: str) -> None:
    """Raises ValueError for a device that torch cannot use here."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"bench: device cuda is absent: torch {torch.__version__} sees no GPU")


def check_dtypes(dtypes: Sequence[str]) -> None:
    """Raises ValueError for a type that no case can have."""
    for dtype in dtypes:
        if dtype not in TOLERANCES:
            raise ValueError(f"bench: dtype must be one of {', '.join(TOLERANCES)}, got {dtype!r}")
