"""How fast this machine reads, copies, gathers and computes, and so the time that a call cannot stay below.

Figures are measured when they are first asked for, by the probes of `layerzoo._C`, and matrix products by torch's. They
are kept for a day in `layerzoo/limits.json` in $XDG_CACHE_HOME, by default ~/.cache. Processes that write it at the
same time may lose each other's figures, which are then measured again.
"""

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from time import perf_counter, time
from typing import Any

import torch
from torch import Tensor

from layerzoo import _native, env
from layerzoo.bench.case import TOLERANCES, Cost
from layerzoo.bench.report import machine

MB = 1 << 20
LARGEST = 512  # MB: the size at which anything larger is measured, too
DRAM = 256  # MB
SMALLEST = 0.0625  # MB: the least that a probe takes for each thread
SIDE = 1024  # of the matrices that are multiplied
SLOW = 0.5  # seconds: a product that takes longer is measured once
DAY = 24 * 60 * 60  # seconds
KEYS = ("cpu", "cores", "isa", "torch", "torch_isa", "caps", "layerzoo")  # of the machine: what figures depend on

Kept = dict[str, dict[str, tuple[float, float]]]  # by machine and figure: the figure, and when it was measured
_known: dict[str, float] = {}  # what this process has measured or read


def limits(cost: Cost, dtype: str, threads: int) -> tuple[float, str] | None:
    """The seconds that no call with that cost can stay below on this machine, and what binds.

    The bytes pass at the rates of buffers as large as all of them together, so that what fits into a cache is held to
    the rate of the cache: what is read and written to the same amount at that of a copy, what is read or written beyond
    at that of reading or of a copy, rows from random places at that of such rows. Products, other operations and
    exponentials come one after the other, since they share the arithmetic units; 16-bit types compute in float32.

    Args:
        cost: of one call. dtype: "float32", "float64", "bfloat16" or "float16". threads: 1 to 1024.

    Returns the seconds and "memory" or "arithmetic"; None without the native library.

    Raises ValueError for another dtype or number of threads.
    """
    if dtype not in TOLERANCES:
        raise ValueError(f"limits: dtype must be one of {', '.join(TOLERANCES)}, got {dtype!r}")
    _check_threads("limits", threads)
    if _probes() is None:
        return None
    memory, arithmetic = _memory_seconds(cost, threads), _arithmetic_seconds(cost, dtype, threads)
    return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def machine_rates(threads: int) -> dict[str, float]:
    """What this machine does per second with that many threads (1 to 1024); empty without the native library.

    Bytes: `read_bandwidth`, `copy_bandwidth` (read plus written) and `gather_bandwidth` (rows of 256 bytes) with 256 MB
    in all, `cache_bandwidth` (read) with 1 MB for each thread. Operations in float32: `fma_peak`, `gemm_rate`.
    Exponentials in float32: `exp_rate`. Raises ValueError for another number of threads.
    """
    _check_threads("machine_rates", threads)
    if _probes() is None:
        return {}
    return {
        "read_bandwidth": _bandwidth("read", DRAM, threads),
        "copy_bandwidth": _bandwidth("copy", DRAM, threads),
        "gather_bandwidth": _bandwidth("gather", DRAM, threads),
        "cache_bandwidth": _bandwidth("read", threads, threads),
        "fma_peak": _peak("fma_peak", "float32", threads),
        "exp_rate": _peak("exp_rate", "float32", threads),
        "gemm_rate": _gemm_rate("float32", threads),
    }


def forget() -> None:
    """Drops all figures of this machine, so that they are measured anew."""
    _known.clear()
    kept = _read()
    if kept.pop(_machine(), None):
        _write(kept)


def _check_threads(function: str, threads: int) -> None:
    if not 1 <= threads <= 1024:
        raise ValueError(f"{function}: threads must be from 1 to 1024, got {threads}")


def _probes() -> Any:
    """`layerzoo._C`; None where it or the kernels are missing."""
    if not _native.status().loaded:
        return None
    try:
        return import_module("layerzoo._C")
    except ImportError:
        return None


# ---- seconds ----


def _memory_seconds(cost: Cost, threads: int) -> float:
    size = _working_set(cost.bytes)
    matched = min(cost.read, cost.written)
    parts = {"copy": cost.written + matched, "read": cost.read - matched, "gather": cost.gathered}
    return sum(part / _bandwidth(kind, size, threads) for kind, part in parts.items() if part)


def _arithmetic_seconds(cost: Cost, dtype: str, threads: int) -> float:
    computed = "float64" if dtype == "float64" else "float32"
    seconds = 0.0
    if cost.products:
        # Without instructions for a 16-bit type torch's product is a hundred times slower than one after a cast.
        seconds += cost.products / max(_gemm_rate(of, threads) for of in {dtype, computed})
    if cost.flops:
        seconds += cost.flops / _peak("fma_peak", computed, threads)
    if cost.exps:
        seconds += cost.exps / _peak("exp_rate", computed, threads)
    return seconds


def _working_set(count: float) -> int:
    """The power of two of MB, between 1 and LARGEST, that holds `count` bytes."""
    return min(LARGEST, 1 << max(0, math.ceil(math.log2(max(count, 1) / MB))))


# ---- figures ----


def _bandwidth(kind: str, megabytes: int, threads: int) -> float:
    """Bytes per second of "read", "copy" or "gather", with buffers of `megabytes` in all threads together."""
    figure = f"{kind}_bandwidth {megabytes} MB, {threads} threads"
    each = megabytes / threads / (2 if kind == "copy" else 1)  # a copy has two buffers
    return _figure(
        figure, lambda: {figure: getattr(_probes(), f"{kind}_bandwidth")(max(each, SMALLEST), threads=threads)}
    )


def _peak(probe: str, dtype: str, threads: int) -> float:
    """What `fma_peak` or `exp_rate` says of a type for the instruction set in use; each measures both types."""

    def named(of: str) -> str:
        return f"{probe} {of}, {threads} threads"

    def measure() -> dict[str, float]:
        return {named(of): rate for of, rate in getattr(_probes(), probe)(_native.status().isa, threads).items()}

    return _figure(named(dtype), measure)


def _gemm_rate(dtype: str, threads: int) -> float:
    """Operations per second of the faster of torch's products of square matrices."""
    figure = f"gemm_rate {dtype}, {threads} threads"
    return _figure(figure, lambda: {figure: 2 * SIDE**3 / _product_seconds(getattr(torch, dtype), threads)})


def _product_seconds(dtype: torch.dtype, threads: int) -> float:
    x = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu").to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            return min(_shortest(partial(torch.mm, x, x)), _shortest(partial(_onednn, x)))
    finally:
        torch.set_num_threads(before)


def _onednn(x: Tensor) -> None:
    torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")


def _shortest(product: Callable[[], object]) -> float:
    """Seconds; infinite where torch has no such product, or none for the type."""
    try:
        first = _seconds(product)
    except (AttributeError, RuntimeError):
        return math.inf
    return first if first > SLOW else min(_seconds(product) for _ in range(9))


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


# ---- what was measured before ----


def _figure(figure: str, measure: Callable[[], dict[str, float]]) -> float:
    """A figure from this process, from the file, or else from `measure`, which may give others with it."""
    if figure not in _known:
        for name, (rate, _) in _read().get(_machine(), {}).items():
            _known.setdefault(name, rate)
    if figure not in _known:
        found = measure()
        _known.update(found)
        kept = _read()
        kept.setdefault(_machine(), {}).update({name: (rate, time()) for name, rate in found.items()})
        _write(kept)
    return _known[figure]


@cache
def _machine() -> str:
    facts = machine()
    return json.dumps({key: facts[key] for key in KEYS}, sort_keys=True)


def _path() -> Path:
    return env.cache() / "limits.json"


def _read() -> Kept:
    """What is kept of all machines and not older than a day; nothing where the file is absent or damaged."""
    now = time()
    try:
        data = json.loads(_path().read_text(encoding="utf-8"))
        return {
            name: {
                figure: (rate, when)
                for figure, (rate, when) in figures.items()
                if 0 < rate < math.inf and 0 <= now - when < DAY
            }
            for name, figures in data.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(kept: Kept) -> None:
    """Replaces the file at once, so that no reader sees half of it. Where that is not possible nothing is kept."""
    path = _path()
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
