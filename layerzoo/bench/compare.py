"""What changed between two records, and what of it is more than noise."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from layerzoo.bench.noise import Interval
from layerzoo.bench.report import Report, Result, Row
from layerzoo.bench.tables import seconds

FLOOR = 0.05  # a smaller change of the time is noise whatever the samples say: machines drift between two runs
SAME = ("cpu", "cores", "isa", "caps", "torch")  # of `report.machine`: where one differs, times say nothing of the code
TIMED = ("ok", "once")
BROKEN = ("wrong", "failed")

Verdict = Literal[
    "worse",  # gave the right result before, and does not now
    "slower",
    "within the noise",
    "faster",
    "works now",
    "too few samples",  # no bounds can be given, so no verdict
    "cannot be compared",
    "not timed",
    "new",
    "gone",
]
STYLES = {"worse": "bold red", "slower": "red", "faster": "green", "works now": "green", "within the noise": "yellow"}


@dataclass(frozen=True)
class Change:
    """What became of one case; of a side where it does not exist there is no row."""

    case: str  # `Result.key`
    verdict: Verdict
    before: Row | None = None
    after: Row | None = None
    reason: str = ""
    gain: Interval | None = None  # how many times longer it took before: over 1 is faster
    peer: str = ""  # whose ratio to ours was compared, where the times could not be
    figures: tuple[float, float] | None = None  # before, after: seconds, or how many times longer the peer took

    @property
    def times(self) -> Interval | None:
        """Time after over time before, with its bounds."""
        if self.gain is None:
            return None
        middle, low, high = self.gain
        return Interval(1 / middle, 1 / high, 1 / low if low else math.inf)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a bound that is not there is null."""
        times = [value if math.isfinite(value) and value > 0 else None for value in self.times or ()]
        figures = self.figures or (None, None)
        return {
            "case": self.case,
            "verdict": self.verdict,
            "reason": self.reason,
            "change": dict(zip(("median", "low", "high"), times, strict=True)) if times else None,
            "peer": self.peer or None,
            "before": self.before and asdict(self.before) | {"figure": figures[0]},
            "after": self.after and asdict(self.after) | {"figure": figures[1]},
        }


@dataclass
class Comparison:
    """All changes, the slowest first."""

    title: str
    rows: list[Change] = field(default_factory=list)
    interrupted: bool = False
    problems: list[str] = field(default_factory=list)  # what could not be measured at all

    def __post_init__(self) -> None:
        self.rows = sorted(self.rows, key=_order)

    @property
    def regressions(self) -> list[Change]:
        """What is slower, and what no longer gives a right result."""
        return [row for row in self.rows if row.verdict in ("slower", "worse")]

    @property
    def ok(self) -> bool:
        """Whether there is no regression."""
        return not self.regressions

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "ok": self.ok,
            "interrupted": self.interrupted,
            "problems": self.problems,
            "rows": [row.to_dict() for row in self.rows],
        }

    def __rich__(self) -> Group:
        return Group(Text(self.title + (", interrupted" if self.interrupted else "")), *self._parts())

    def _parts(self) -> Iterator[Table | Text]:
        table = Table(box=None, pad_edge=False)
        for column in ("case", "before", "after", "change", "verdict"):
            table.add_column(column, justify="left" if column in ("case", "verdict") else "right", overflow="fold")
        for row in self.rows:
            before, after = (_figure(row, side) for side in (0, 1))
            verdict = Text(row.verdict, style=STYLES.get(row.verdict, ""))
            if row.reason:
                verdict = Text.assemble(verdict, f": {row.reason}")
            table.add_row(Text(row.case), before, after, _percent(row.times), verdict)
        yield table
        for problem in self.problems:
            yield Text(problem, style="red")


def compare(before: Report, after: Report) -> Comparison:
    """Matches the results of two records, and says of each of ours how its time changed.

    Between different machines, threads or instruction sets it is not times that are compared, but how many times longer
    than ours the first peer took that both have: those two ran in turn in one process.

    A record is of one process, and two processes may differ in time with the same code: `against` settles what this
    only suspects.
    """
    rows, unlike = [], set()
    for old, new in _matched(before, after):
        if old is None or new is None:
            rows.append(_alone(old, new))
            continue
        differing = _differing(before, after, old, new)
        unlike.update(differing)
        rows.append(_by_ratio(old, new, differing) if differing else _by_time(old, new))
    title = f"{_name(after)} against {_name(before)}"
    if unlike:
        facts = ", ".join(sorted(unlike))
        title += f": ratios to a peer, since times cannot be compared where these differ: {facts}"
    return Comparison(title, rows, before.interrupted or after.interrupted, list(after.problems))


def judged(case: str, before: Row, after: Row, gain: Interval | None, **details: Any) -> Change:
    """The change of a case that both sides have; `gain` is None where they cannot be compared."""
    verdict, reason = _judgement(before, after, gain)
    return Change(case, verdict, before, after, reason, gain, **details)


def _judgement(before: Row, after: Row, gain: Interval | None) -> tuple[Verdict, str]:
    if after.status in BROKEN and before.status in TIMED:
        return "worse", _in_words(after)
    if before.status in BROKEN and after.status in TIMED:
        return "works now", f"before: {_in_words(before)}"
    if not before.samples or not after.samples:
        sides = (("before", before), ("after", after))
        return "not timed", "; ".join(f"{side}: {_in_words(row)}" for side, row in sides if not row.samples)
    if gain is None:
        return "cannot be compared", ""
    if gain.low == 0 and gain.high == math.inf:
        return "too few samples", ""
    certain = gain.low > 1 + FLOOR or gain.high < 1 / (1 + FLOOR)
    return (gain.verdict if certain else "within the noise"), ""


def _matched(before: Report, after: Report) -> list[tuple[Result | None, Result | None]]:
    """Pairs with the same key, and of those left, pairs that differ in nothing but the threads.

    By default a run takes every core, so the records of two machines may have no key in common.
    """
    pairs: list[tuple[Result | None, Result | None]] = []
    old, new = ({result.key: result for result in report.results} for report in (before, after))
    for key in [key for key in old if key in new]:
        pairs.append((old.pop(key), new.pop(key)))
    for result in list(new.values()):
        like = [found for found in old.values() if _any_threads(found) == _any_threads(result)]
        rivals = [found for found in new.values() if _any_threads(found) == _any_threads(result)]
        if len(like) == len(rivals) == 1:
            pairs.append((old.pop(like[0].key), new.pop(result.key)))
    return [*pairs, *((result, None) for result in old.values()), *((None, result) for result in new.values())]


def _any_threads(result: Result) -> str:
    return replace(result, threads=0).key


def _differing(before: Report, after: Report, old: Result, new: Result) -> list[str]:
    """The facts, other than the code, that times depend on and that differ."""
    facts = [*SAME, "gpu"] if new.device == "cuda" else SAME
    names = [name for name in facts if before.machine.get(name) != after.machine.get(name)]
    return names if old.threads == new.threads else [*names, "threads"]


def _alone(old: Result | None, new: Result | None) -> Change:
    result = old or new
    assert result is not None
    row = result.ours
    reason = "" if row.samples else _in_words(row)
    if old is not None:
        return Change(old.key, "gone", before=row, reason=reason)
    return Change(result.key, "new", after=row, reason=reason)


def _by_time(old: Result, new: Result) -> Change:
    if not old.ours.samples or not new.ours.samples:
        return judged(new.key, old.ours, new.ours, None)
    before, after = old.ours.interval, new.ours.interval
    return judged(new.key, old.ours, new.ours, _quotient(before, after), figures=(before.median, after.median))


def _by_ratio(old: Result, new: Result, differing: list[str]) -> Change:
    case = f"{new.key} (before: {old.threads})" if old.threads != new.threads else new.key
    earlier = {row.name: row for row in old.rows[1:]}
    for row in new.rows[1:]:
        if row.name not in earlier:
            continue
        before, after = old.ratio(earlier[row.name]), new.ratio(row)
        if before is not None and after is not None:
            figures = (before.median, after.median)
            return judged(case, old.ours, new.ours, _quotient(after, before), peer=row.name, figures=figures)
    change = judged(case, old.ours, new.ours, None)
    if change.verdict != "cannot be compared":
        return change
    return replace(change, reason=f"no peer was timed on both sides, and these differ: {', '.join(differing)}")


def _quotient(above: Interval, below: Interval) -> Interval:
    """Its bounds keep 1 outside exactly where the two intervals do not overlap."""
    high = above.high / below.low if below.low else math.inf
    return Interval(above.median / below.median, above.low / below.high, high)


def _in_words(row: Row) -> str:
    return ", ".join(filter(None, (row.status, row.reason)))


def _order(row: Change) -> tuple[int, float]:
    if row.verdict == "worse":
        return 0, 0.0
    return (1, row.gain.median) if row.gain is not None else (2, 0.0)


def _name(report: Report) -> str:
    machine = report.machine
    code = machine.get("commit") or machine.get("layerzoo") or "?"
    return f"{code} ({machine['date']})" if machine.get("date") else str(code)


def _figure(row: Change, side: int) -> Text:
    if row.figures is not None:
        value = row.figures[side]
        return Text(f"{value:.3g}x {row.peer}" if row.peer else seconds(value))
    alone = (row.before, row.after)[side]
    return Text(seconds(alone.median) if alone is not None and alone.samples else "-")


def _percent(times: Interval | None) -> Text:
    if times is None:
        return Text("-")
    middle, low, high = (f"{value - 1:+.1%}" for value in times)
    return Text(f"{middle} ({low} to {high})" if math.isfinite(times.high) and times.low > 0 else middle)
