"""What a call takes of memory at its peak, and a cap, so that a call that wants too much fails alone."""

import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
STATUS = Path("/proc/self/status")
PEAK = Path("/proc/self/clear_refs")  # writing 5 sets the peak to what is resident now
SHARE = 0.9  # of the memory that is free


def peak_of(call: Callable[[], T], device: str) -> tuple[T, float | None]:
    """Calls once; returns the outcome, and the bytes at the peak beyond what was taken before. On a CPU: Linux only."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome = call()
        return outcome, float(torch.cuda.max_memory_allocated() - before)
    if not PEAK.exists():
        return call(), None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # else the call would be served with memory that counts as taken before
    PEAK.write_text("5", encoding="ascii")
    resident = _kilobytes(STATUS, "VmRSS")
    outcome = call()
    return outcome, (_kilobytes(STATUS, "VmHWM") - resident) * 1024.0


@contextmanager
def capped() -> Iterator[None]:
    """Inside, an allocation beyond what is free now raises, where the system would end the process. Linux only."""
    try:
        import resource
    except ImportError:  # Windows
        resource = None  # type: ignore[assignment]
    if resource is None or not STATUS.exists():
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    free = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    limit = int((_kilobytes(STATUS, "VmSize") + SHARE * free) * 1024)
    most = before[1] if before[1] != resource.RLIM_INFINITY else limit
    resource.setrlimit(resource.RLIMIT_AS, (min(limit, most), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _kilobytes(file: Path, what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", file.read_text(encoding="ascii"))
    if found is None:
        raise RuntimeError(f"bench: {file} says nothing of {what}")
    return int(found[1])
