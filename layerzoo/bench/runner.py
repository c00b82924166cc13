"""Runs cases: every candidate is checked against the reference, and timed only if it agrees."""

import ctypes
import gc
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from layerzoo.bench.case import Candidate, Case, Work
from layerzoo.bench.cases import all_cases
from layerzoo.bench.report import Report, Result, Row, machine

SLOW = 5.0  # seconds: a candidate that takes longer is timed once
MINUTE = 60.0  # and where it takes longer than this, its first run is the one that counts
SECONDS = 8.0  # for the rounds of one case
ROUNDS = (5, 40)  # at least, at most
SAMPLE = 0.1  # seconds: shorter calls are repeated within a sample

Note = Callable[[str], None]
Pair = tuple[Candidate, Row]


def run(
    pattern: str = "*",
    *,
    peers: bool = True,
    threads: int | None = None,
    json_path: Path | None = None,
    html_path: Path | None = None,
    smoke: bool = False,
    full: bool = False,
) -> Report:
    """Measures the cases that `pattern` matches, prints tables and writes files.

    Args:
        pattern: glob over ids such as `ssm.selective_scan/time-last/forward`, or over the beginning before a slash.
        peers: whether to measure the peers too. threads: of torch; None for all cores.
        json_path, html_path: files to write, in folders that exist.
        smoke: only the check of each candidate at a tiny shape. full: also candidates that take minutes.

    Returns the report, whose `ok` tells whether every result was right. Ctrl-C keeps what was measured so far.

    Raises ValueError where no case matches, `threads` is not positive or a folder is missing.
    """
    chosen = select(pattern)
    if threads is not None and threads < 1:
        raise ValueError(f"bench: threads must be at least 1, got {threads}")
    for path in (json_path, html_path):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"bench: {path} must be in a folder that exists")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    report = Report(machine(torch.get_num_threads()))
    # no refreshing thread: it would run beside what is measured
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )
    try:
        with progress:
            task = progress.add_task("", total=len(chosen))
            for case in chosen:

                def note(what: str, name: str = case.id) -> None:
                    progress.update(task, description=f"{name}: {what}", refresh=True)

                run_case(case, report.results, note, peers=peers, smoke=smoke, full=full)
                progress.advance(task)
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        torch.set_num_threads(before)
    Console().print(report)
    if json_path is not None:
        report.save(json_path)
    if html_path is not None:
        report.save_html(html_path)
    return report


def select(pattern: str) -> list[Case]:
    """The cases whose id, or whose id before a slash, matches."""
    cases = all_cases()
    chosen = [case for case in cases if fnmatchcase(case.id, pattern) or fnmatchcase(case.id, f"{pattern}/*")]
    if not chosen:
        names = ", ".join(sorted({case.name for case in cases}))
        raise ValueError(f"bench: pattern must match a case, got {pattern!r}; there are {names}")
    return chosen


def run_case(
    case: Case,
    results: list[Result],
    note: Note = lambda what: None,
    *,
    peers: bool = True,
    smoke: bool = False,
    full: bool = False,
    seconds: float = SECONDS,
) -> Result:
    """Appends the result of a case to `results` before anything runs, so that an interruption keeps what there is."""
    pairs = [(candidate, Row(candidate.name)) for candidate in (case.ours, *(case.peers if peers else ()))]
    shape = case.check if smoke else case.shape
    result = Result(case.name, case.variant, case.direction, dict(shape), [row for _, row in pairs])
    results.append(result)
    note("checking")
    with _attempt(*result.rows):
        inputs = case.inputs(case.check)
        expected = case.reference.build(inputs).run(case.direction)
        for candidate, row in pairs:
            with _attempt(row):
                _judge(row, candidate.build(inputs).run(case.direction), expected, case.tolerance)
    if not smoke:
        with _attempt(*result.rows):
            _measure(case, result, pairs, note, full=full, seconds=seconds)
    return result


def _measure(case: Case, result: Result, pairs: list[Pair], note: Note, *, full: bool, seconds: float) -> None:
    inputs = case.inputs(case.shape)
    result.elements = math.prod(case.shape[size] for size in case.elements) if case.elements else None
    result.tokens = math.prod(case.shape[size] for size in case.tokens) if case.tokens else None
    result.targets = list(case.targets)
    if case.bytes:
        result.bytes, result.bandwidth = case.bytes(case.shape, inputs), _bandwidth(torch.get_num_threads())
    timed = _warm_up(case, inputs, pairs, note, full)
    note("timing")
    interleave([work for work, _ in timed], [row.samples for _, row in timed], seconds=seconds)
    if case.memory and result.rows[0].samples:
        note("memory")
        result.memory = peak_memory(case)


def _warm_up(
    case: Case, inputs: Any, pairs: list[Pair], note: Note, full: bool
) -> list[tuple[Callable[[], object], Row]]:
    """Runs each candidate once, drops those that differ from the first peer, and returns those to be timed."""
    ready: list[tuple[Work, Row, float]] = []
    outcomes: dict[str, dict[str, Tensor]] = {}
    for candidate, row in pairs:
        if row.status != "ok":
            continue
        if candidate.full and not full:
            row.status, row.reason = "skipped", "takes minutes: only in a full run"
            continue
        note(f"first run of {candidate.name}")
        with _attempt(row):
            work = candidate.build(inputs)
            start = perf_counter()
            outcomes[row.name] = work.run(case.direction)
            elapsed = perf_counter() - start
            if SLOW < elapsed <= MINUTE:  # the first run also pays for fresh memory
                elapsed = _time(partial(work.run, case.direction), 1)
            ready.append((work, row, elapsed))
    yardstick = next((row.name for _, row in pairs[1:] if row.name in outcomes), None)
    timed: list[tuple[Callable[[], object], Row]] = []
    for work, row, elapsed in ready:
        if yardstick not in (None, row.name):
            _judge(row, outcomes[row.name], outcomes[yardstick], case.tolerance, f" from {yardstick} at full size")
        if row.status == "wrong":
            continue
        if elapsed > SLOW:
            row.status, row.samples = "once", [elapsed]
        else:
            timed.append((partial(work.run, case.direction), row))
    return timed


def interleave(
    calls: Sequence[Callable[[], object]],
    samples: Sequence[list[float]],
    *,
    seconds: float,
    rounds: tuple[int, int] = ROUNDS,
) -> None:
    """Times the calls in turn, A B A B, and appends seconds per call to `samples`; garbage collection is off.

    Stops after `seconds`, but not before the first of `rounds`, and not after the second. A warm-up goes before.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        repeats = [max(1, math.ceil(SAMPLE / _time(call, 1))) for call in calls]
        start = perf_counter()
        for done in range(rounds[1]):
            if done >= rounds[0] and perf_counter() - start > seconds:
                break
            for call, kept, times in zip(calls, samples, repeats, strict=True):
                kept.append(_time(call, times))
    finally:
        if collecting:
            gc.enable()


def _time(call: Callable[[], object], times: int) -> float:
    start = perf_counter()
    for _ in range(times):
        call()
    return (perf_counter() - start) / times


@contextmanager
def _attempt(*rows: Row) -> Iterator[None]:
    """What is raised inside becomes the status of the rows that had none: absent after an ImportError, else failed."""
    try:
        yield
    except Exception as error:
        status, kind = ("absent", "") if isinstance(error, ImportError) else ("failed", f"{type(error).__name__}: ")
        for row in rows:
            if row.status == "ok" and not row.samples:
                row.status, row.reason = status, f"{kind}{error}".partition("\n")[0]  # type: ignore[assignment]


def _judge(
    row: Row, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float, whom: str = ""
) -> None:
    """Marks a row as wrong where a tensor is further off than `tolerance`, relative in norm."""
    if actual.keys() != expected.keys():
        row.status, row.reason = "wrong", f"returned {', '.join(actual)} instead of {', '.join(expected)}"
        return
    worst = 0.0
    for name, tensor in actual.items():
        error = _distance(tensor, expected[name])
        worst = max(worst, error)
        if not error <= tolerance:  # NaN is wrong too
            row.status, row.reason = "wrong", f"{name} differs by {error:.1e}{whom}, allowed {tolerance:.0e}"
            return
    row.reason = f"agrees to {worst:.0e}" if worst else "agrees exactly"


def _distance(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


@cache
def _bandwidth(threads: int) -> float | None:
    try:
        from layerzoo import _C
    except ImportError:
        return None
    return float(_C.read_bandwidth(256, threads))


def peak_memory(case: Case) -> float | None:
    """Peak extra memory of one call of ours, over the bytes of its leaves; in a process of its own. Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_memory, case, torch.get_num_threads()).result()


def _peak_memory(case: Case, threads: int) -> float:
    torch.set_num_threads(threads)
    case.ours.build(case.inputs(case.check)).run(case.direction)  # loads libraries and starts threads
    work = case.ours.build(case.inputs(case.shape))
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # else the call would be served with memory that counts as taken before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak to what is resident now
    before = _resident("VmRSS")
    outcome = work.run(case.direction)
    extra = _resident("VmHWM") - before
    del outcome  # was part of the peak
    return extra / sum(leaf.nbytes for leaf in work.leaves.values())


def _resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024
