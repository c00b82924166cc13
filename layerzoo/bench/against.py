"""This tree against another commit: both measured in turn, so that what slows the machine down slows both."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

from layerzoo import _native
from layerzoo.bench import builds
from layerzoo.bench.case import Case
from layerzoo.bench.compare import Change, Comparison, judged
from layerzoo.bench.noise import interval
from layerzoo.bench.process import Worker, WorkerDied, packed
from layerzoo.bench.report import Result, Row, Status
from layerzoo.bench.runner import SECONDS, SLOW, planned, progress_bar
from layerzoo.bench.settings import Setting, Sweep

# One process may be faster than another for as long as it lives, with the same code in both, by a third at times: it
# depends on how its memory happens to lie. So a pair of processes is one observation; fewer than six give no bounds.
LAUNCHES = 6
ROUNDS = (1, 4)  # of A B B A in each, at least, at most

Note = Callable[[str, int], None]


@dataclass
class Measured:
    """What a case, by its `Result.key`, took in the two trees."""

    key: str
    before: Row
    after: Row
    gains: list[float] = field(default_factory=list)  # of each launch: the median of before/after over neighbours


class Side(NamedTuple):
    """One of the two trees at the case at hand."""

    worker: Worker
    row: Row


def against(
    ref: str,
    pattern: str = "*",
    *,
    threads: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    sweep: Sweep | None = None,
    seconds: float = SECONDS,
) -> Comparison:
    """Builds the commit `ref` of this checkout, and measures the cases of `pattern` in it and in this tree, in turn.

    The other arguments are those of `runner.run`. Cases and their inputs are this tree's; peers are not measured. The
    commit is built without kernels where this process has none. `seconds` is what a case may take in all launches
    together. Ctrl-C keeps what was measured so far.

    Raises ValueError as `run` does, and for a commit that git does not know, that does not build, or that these
    benchmarks cannot drive; also where layerzoo is no checkout, or there is no git.
    """
    plan, problems = planned(pattern, threads, dtypes, "cpu", sweep)
    commit = builds.commit_of(ref)
    measured: list[Measured] = []
    interrupted = False
    with progress_bar() as progress:
        task = progress.add_task("", total=len(plan) * LAUNCHES)

        def note(what: str, done: int = 0) -> None:
            progress.update(task, description=what, completed=done, refresh=True)

        try:
            base = builds.build(commit, native=_native.status().loaded, note=note)
            in_turn(plan, base, builds.TREE, measured, note, seconds=seconds)
        except KeyboardInterrupt:
            interrupted = True
    title = f"this tree against {ref} ({commit[:12]}): medians and bounds of {LAUNCHES} pairs of processes, run in turn"
    return Comparison(title, [changed(each) for each in measured], interrupted, problems)


def in_turn(
    plan: Sequence[tuple[Case, Setting]],
    before: Path,
    after: Path,
    measured: list[Measured],
    note: Note = lambda what, done: None,
    *,
    seconds: float = SECONDS,
) -> None:
    """Measures what is planned in two trees, and appends to `measured` before anything runs.

    `note` is told what happens and how many of the cases, times `LAUNCHES`, are done. Raises ValueError where a tree
    cannot be used at all, or only one of the two has kernels.
    """
    measured += [Measured(_key(*each), Row(each[0].ours.name), Row(each[0].ours.name)) for each in plan]
    try:
        for launch in range(LAUNCHES):
            done = launch * len(plan)
            note("starting two processes", done)
            with Worker(before) as old, Worker(after) as new:
                old.ready()
                new.ready()
                if "none" in (old.isa, new.isa) and old.isa != new.isa:
                    raise ValueError(f"bench: against needs kernels in both trees or none: {old.state}; {new.state}")
                for number, ((case, setting), each) in enumerate(zip(plan, measured, strict=True)):
                    if each.before.status == each.after.status == "ok":
                        note(f"{case.id}: launch {launch + 1} of {LAUNCHES}", done + number)
                        sides = (Side(old, each.before), Side(new, each.after))
                        _measure(case, setting, sides, each.gains, seconds / LAUNCHES)
    except WorkerDied as error:
        raise ValueError(f"bench: against cannot use one of the two trees: {error}") from error


def changed(measured: Measured) -> Change:
    """What the launches say."""
    key, before, after = measured.key, measured.before, measured.after
    if before.status == "absent" and after.status == "ok":
        return Change(key, "new", after=after, reason=before.reason)
    if not (before.samples and after.samples and measured.gains):
        return judged(key, before, after, None)
    return judged(key, before, after, interval(measured.gains), figures=(before.median, after.median))


def _key(case: Case, setting: Setting) -> str:
    sizes, rest = dict(setting.shape), (setting.dtype, setting.device, setting.threads)
    return Result(case.name, case.variant, case.direction, sizes, [], *rest).key


def _measure(case: Case, setting: Setting, sides: tuple[Side, Side], gains: list[float], seconds: float) -> None:
    """One launch of a case."""
    if case.ours.full:
        _mark(sides, "skipped", "takes minutes")
        return
    try:
        message = packed(case, setting)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # a plugin's case with a lambda in it
        _mark(sides, "failed", f"cannot be sent to another process: {error}")
        return
    if not _both(sides, "check", message):
        return
    prepared = _both(sides, "prepare")
    if not prepared:
        return
    slow = max(answer["seconds"] for answer in prepared) > SLOW
    kept = [len(side.row.samples) for side in sides]
    try:
        _sample(sides, (1, 1) if slow else ROUNDS, seconds)
    finally:  # an interruption may leave a sample alone
        new = [side.row.samples[start:] for side, start in zip(sides, kept, strict=True)]
        pairs = list(zip(*new, strict=False))
        if pairs:
            gains.append(median(before / after for before, after in pairs))
    if slow and all(side.row.status == "ok" for side in sides):
        _mark(sides, "once", sides[0].row.reason)  # one launch, that is


def _mark(sides: tuple[Side, Side], status: Status, reason: str) -> None:
    for side in sides:
        side.row.status, side.row.reason = status, reason


def _sample(sides: tuple[Side, Side], rounds: tuple[int, int], seconds: float) -> None:
    start = perf_counter()
    for done in range(rounds[1]):
        if done >= rounds[0] and perf_counter() - start > seconds:
            return
        for side in (*sides, *reversed(sides)):
            answer = _ask(side, "sample")
            if answer is None:
                return
            side.row.samples.append(answer["seconds"])


def _both(sides: tuple[Side, Side], command: str, *arguments: str) -> list[dict[str, Any]]:
    """The answers of both trees, also of one after the other failed; none at all where one did."""
    answers = [_ask(side, command, *arguments) for side in sides]
    found = [answer for answer in answers if answer is not None]
    return found if len(found) == len(sides) else []


def _ask(side: Side, command: str, *arguments: str) -> dict[str, Any] | None:
    """The answer; what went wrong instead becomes the status of the row, and a process that died is started again."""
    try:
        answer = side.worker.ask(command, *arguments)
    except WorkerDied as error:
        answer = {"status": "failed", "reason": str(error)}
        side.worker.restart()
    side.row.status = answer.get("status", side.row.status)
    side.row.reason = answer.get("reason", side.row.reason)
    if side.row.status == "ok":
        return answer
    side.row.samples.clear()
    return None
