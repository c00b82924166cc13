"""Runs cases: every candidate is checked against the reference, and timed only if it agrees."""

import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from layerzoo.bench.case import Candidate, Case, Direction, Work
from layerzoo.bench.cases import select
from layerzoo.bench.limits import limits
from layerzoo.bench.memory import capped, peak_of
from layerzoo.bench.report import Report, Result, Row, machine
from layerzoo.bench.settings import Setting, Sweep, check_device, check_dtypes, settings

SLOW = 5.0  # seconds: a candidate that takes longer is timed once
MINUTE = 60.0  # and where it takes longer than this, its first run is the one that counts
SECONDS = 8.0  # for the rounds of one case
ROUNDS = (7, 40)  # at least, at most; of fewer than six no bounds can be given
SAMPLE = 0.1  # seconds: shorter calls are repeated within a sample

Note = Callable[[str], None]
Pair = tuple[Candidate, Row]


def run(
    pattern: str = "*",
    *,
    peers: bool = True,
    threads: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    device: str = "cpu",
    sweep: Sweep | None = None,
    smoke: bool = False,
    full: bool = False,
    seconds: float = SECONDS,
) -> Report:
    """Measures the cases that `pattern` matches.

    Args:
        pattern: glob over ids such as `ssm.selective_scan/time-last/forward`, or over the beginning before a slash; or
            several, with commas between.
        peers: whether to measure the peers too. threads: of torch, each in turn; by default all cores.
        dtypes: each in turn, for the cases that have it; by default the first of each case. device: cpu or cuda.
        sweep: one size with several values, for the cases that have it.
        smoke: only the check of each candidate at a tiny shape. full: also candidates that take minutes.
        seconds: for the rounds of one case.

    Returns the report, whose `ok` tells whether every result was right. Ctrl-C keeps what was measured so far.

    Raises ValueError where no case matches, or none has the size, type or device; for another type or device than there
    are, an absent one, or a number of threads that is not positive.
    """
    plan, problems = planned(pattern, threads, dtypes, device, sweep)
    report = Report(machine(), problems=problems)
    progress = progress_bar()
    before = torch.get_num_threads()
    try:
        with progress, capped():
            task = progress.add_task("", total=len(plan))
            for case, setting in plan:

                def note(what: str, name: str = case.id) -> None:
                    progress.update(task, description=f"{name}: {what}", refresh=True)

                torch.set_num_threads(setting.threads)
                run_case(case, setting, report.results, note, peers=peers, smoke=smoke, full=full, seconds=seconds)
                progress.advance(task)
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        torch.set_num_threads(before)
    return report


def planned(
    pattern: str, threads: Sequence[int], dtypes: Sequence[str], device: str, sweep: Sweep | None
) -> tuple[list[tuple[Case, Setting]], list[str]]:
    """What is to be measured, and what cannot be (as `select`). Raises ValueError as `run` does."""
    check_device(device)
    check_dtypes(dtypes)
    for count in threads:
        if count < 1:
            raise ValueError(f"bench: threads must be at least 1, got {count}")
    chosen, problems = select(pattern)
    counts = list(threads) or [os.cpu_count() or 1]
    plan = [(case, setting) for case in chosen for setting in settings(case, counts, dtypes, device, sweep)]
    if not plan:
        wanted = ", ".join([*([f"a size {sweep.size}"] if sweep else []), *dtypes, device])
        sizes = ", ".join(sorted({size for case in chosen for size in case.shape}))
        raise ValueError(f"bench: no case of {pattern!r} has {wanted}; their sizes are {sizes}")
    return plan, problems


def progress_bar() -> Progress:
    """On the standard error stream. No thread refreshes it: that would run beside what is measured."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )


def run_case(
    case: Case,
    setting: Setting | None = None,
    results: list[Result] | None = None,
    note: Note = lambda what: None,
    *,
    peers: bool = True,
    smoke: bool = False,
    full: bool = False,
    seconds: float = SECONDS,
) -> Result:
    """Appends the result of a case to `results` before anything runs, so that an interruption keeps what there is.

    Earlier results of the same sweep there tell how long a slow candidate would take.
    """
    setting = setting or Setting(case.shape, case.dtypes[0], threads=torch.get_num_threads())
    results = [] if results is None else results
    pairs = [(candidate, Row(candidate.name)) for candidate in (case.ours, *(case.peers if peers else ()))]
    result = Result(
        case.name,
        case.variant,
        case.direction,
        dict(case.check if smoke else setting.shape),
        [row for _, row in pairs],
        setting.dtype,
        setting.device,
        setting.threads,
        setting.swept,
    )
    if not full:
        _skip_what_would_take_long(result, results)
    results.append(result)
    note("checking")
    with _attempt(*result.rows):
        inputs = inputs_of(case, case.check, setting)
        expected = case.reference.start(inputs).run(case.direction)
        for candidate, row in pairs:
            if row.status == "ok":
                with _attempt(row):
                    _judge(row, candidate.start(inputs).run(case.direction), expected, case.allowed(setting.dtype))
    if not smoke:
        with _attempt(*result.rows):
            _measure(case, setting, result, pairs, note, full=full, seconds=seconds)
    return result


def inputs_of(case: Case, shape: Mapping[str, int], setting: Setting) -> Any:
    """The inputs of a case in the type and on the device of a setting."""
    dtype = getattr(torch, setting.dtype)

    def placed(value: Any, name: str = "") -> Any:
        if isinstance(value, Tensor):
            wide = not value.is_floating_point() or (name in case.wide and dtype.itemsize < 4)
            return value.to(setting.device, value.dtype if wide else dtype)
        if isinstance(value, nn.Module):
            return value.to(setting.device, dtype)
        if isinstance(value, dict):
            return {key: placed(item, key) for key, item in value.items()}
        return [placed(item) for item in value] if isinstance(value, list) else value

    return placed(case.inputs(shape))


def _measure(
    case: Case, setting: Setting, result: Result, pairs: list[Pair], note: Note, *, full: bool, seconds: float
) -> None:
    inputs = inputs_of(case, setting.shape, setting)
    result.elements = math.prod(setting.shape[size] for size in case.elements) if case.elements else None
    result.tokens = math.prod(setting.shape[size] for size in case.tokens) if case.tokens else None
    result.targets = list(case.targets) if setting.shape == case.shape and setting.dtype == case.dtypes[0] else []
    timed = _warm_up(case, setting, result, inputs, pairs, note, full)
    note("timing")
    interleave([work for work, _ in timed], [row.samples for _, row in timed], seconds=seconds)
    if case.cost and setting.device == "cpu":
        result.cost = case.cost(setting.shape, inputs)
        note("probing the machine")
        result.limit, result.bound = limits(result.cost, setting.dtype, setting.threads) or (None, "")


def _warm_up(
    case: Case, setting: Setting, result: Result, inputs: Any, pairs: list[Pair], note: Note, full: bool
) -> list[tuple[Callable[[], object], Row]]:
    """Runs each candidate once, drops those that differ from the first peer, and returns those to be timed."""
    ready: list[tuple[Callable[[], object], Row, float]] = []
    outcomes: dict[str, dict[str, Tensor]] = {}
    for candidate, row in pairs:
        if row.status != "ok":
            continue
        if candidate.full and not full:
            row.status, row.reason = "skipped", "takes minutes: only in a full run"
            continue
        note(f"first run of {candidate.name}")
        with _attempt(row):
            work = candidate.start(inputs)
            if row is result.ours:
                result.inputs = sum(leaf.nbytes for leaf in work.leaves.values()) or None
            call: Callable[[], dict[str, Tensor]] = partial(finished, work, case.direction, setting.device)
            start = perf_counter()
            outcomes[row.name], row.memory = peak_of(call, setting.device)
            elapsed = perf_counter() - start
            if SLOW < elapsed <= MINUTE:  # the first run also pays for fresh memory
                elapsed = time_of(call, 1)
            ready.append((call, row, elapsed))
    yardstick = next((row.name for _, row in pairs[1:] if row.name in outcomes), None)
    if setting.dtype not in ("float32", "float64"):
        yardstick = None  # a peer that sums in 16 bits is no yardstick
    timed: list[tuple[Callable[[], object], Row]] = []
    for again, row, elapsed in ready:
        if yardstick not in (None, row.name):
            allowed, whom = case.allowed(setting.dtype), f" from {yardstick} at full size"
            _judge(row, outcomes[row.name], outcomes[yardstick], allowed, whom)
        if row.status == "wrong":
            continue
        if elapsed > SLOW:
            row.status, row.samples = "once", [elapsed]
        else:
            timed.append((again, row))
    return timed


def _skip_what_would_take_long(result: Result, earlier: list[Result]) -> None:
    """In a sweep, leaves out a candidate that would take minutes by what it took at the size before, or failed there.

    A failure may have been a lack of memory, and more is not tried.
    """
    series = (result.id, result.swept, result.dtype, result.device, result.threads)
    before = [r for r in earlier if result.swept and (r.id, r.swept, r.dtype, r.device, r.threads) == series]
    if not before:
        return
    growth = result.shape[result.swept] / before[-1].shape[result.swept]
    for row, last in zip(result.rows, before[-1].rows, strict=True):
        if last.samples and last.median * growth > MINUTE:
            row.status, row.reason = "skipped", f"would take about {last.median * growth:.0f} s: only in a full run"
        elif last.status in ("skipped", "failed") and growth > 1:
            row.status, row.reason = "skipped", f"{last.status} at {result.swept}{before[-1].shape[result.swept]}"


def interleave(
    calls: Sequence[Callable[[], object]],
    samples: Sequence[list[float]],
    *,
    seconds: float,
    rounds: tuple[int, int] = ROUNDS,
) -> None:
    """Times the calls in turn, A B C, B C A, C A B, and appends seconds per call to `samples`, one for each round.

    Each goes first, and follows each other, equally often: what a call leaves behind (a cold cache, a busy allocator)
    burdens no one alone. Garbage collection is off. Stops after `seconds`, but not before the first of `rounds`, and
    not after the second. A warm-up goes before.
    """
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        repeats = [max(1, math.ceil(SAMPLE / time_of(call, 1))) for call in calls]
        start = perf_counter()
        for done in range(rounds[1]):
            if done >= rounds[0] and perf_counter() - start > seconds:
                break
            for place in range(len(calls)):
                turn = (place + done) % len(calls)
                samples[turn].append(time_of(calls[turn], repeats[turn]))
    finally:
        if collecting:
            gc.enable()


def finished(work: Work, direction: Direction, device: str) -> dict[str, Tensor]:
    outcome = work.run(direction)
    if device == "cuda":
        torch.cuda.synchronize()
    return outcome


def time_of(call: Callable[[], object], times: int) -> float:
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
