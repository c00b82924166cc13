"""The table of a README, from reports that were stored."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from textwrap import fill
from typing import Any

from layerzoo.bench.report import Report, Result, Row
from layerzoo.bench.tables import seconds

SETS = {"avx2": "AVX2", "avx512": "AVX-512", "default": "the baseline set", "none": "no kernels"}
MEANING = (
    "Medians of interleaved runs in one process, each candidate first checked against the reference. "
    '"5x" means that the peer took five times as long; "as fast as", that 1 lies within the 95 % bounds of the ratio; '
    "(once), that a run takes too long for more, so there are no bounds. A percentage says how much of the machine's "
    "own limit is reached, and what sets that limit."
)
COLUMNS = 120


def markdown(reports: Sequence[Report]) -> str:
    """A paragraph and a table for each machine, with a pair of columns for each of its reports.

    Raises ValueError where there is nothing to show.
    """
    if not any(report.results for report in reports):
        raise ValueError("bench: reports must have results, got none")
    machines: dict[tuple[Any, ...], list[Report]] = {}
    for report in reports:
        machines.setdefault(tuple(report.machine[fact] for fact in ("cpu", "cores", "gpu")), []).append(report)
    return "\n\n".join(f"{_paragraph(group)}\n\n{_table(group)}" for group in machines.values())


def setting(result: Result) -> str:
    """Type, threads, and the device where it is not the CPU."""
    threads = f"{result.threads} thread" + ("s" if result.threads != 1 else "")
    return ", ".join([result.dtype, threads] + ([result.device] if result.device != "cpu" else []))


def times(value: float) -> str:
    """A ratio."""
    return f"{digits(value)}x"


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _paragraph(reports: Sequence[Report]) -> str:
    machine = reports[0].machine
    where = [f"{machine['cpu']}, {machine['cores']} cores", *filter(None, (machine["gpu"],))]
    where += _unless_many([f"torch {report.machine['torch']}" for report in reports])
    where += _unless_many([setting(result) for report in reports for result in report.results])
    dates = sorted({_day(report.machine["date"]) for report in reports})
    words = [f"{_escaped(', '.join(where))}, {' and '.join(dates)}.", MEANING]
    for report in reports:
        name = _caps(report.machine)
        words += [f"Interrupted, so not complete: {name}."] if report.interrupted else []
        words += [f"Not measured with {name}: {_escaped(problem)}." for problem in report.problems]
    return fill(" ".join(words), COLUMNS, break_long_words=False, break_on_hyphens=False)


def _table(reports: Sequence[Report]) -> str:
    settings = {setting(result) for report in reports for result in report.results}
    columns = ["case"]
    for report in reports:
        columns += [f"layerzoo, {_set(report.machine)}", f"peers, {_caps(report.machine)}"]
    found = [{result.key: result for result in report.results} for report in reports]
    lines = [columns, ["---"] * len(columns)]
    for key in dict.fromkeys(key for results in found for key in results):
        results = [by_key.get(key) for by_key in found]
        some = next(filter(None, results))
        cells = [f"`{some.id}` {some.size}" + (f", {setting(some)}" if len(settings) > 1 else "")]
        for result in results:
            cells += [_ours(result), ", ".join(_peer(result, row) for row in result.rows[1:])] if result else ["", ""]
        lines.append([_escaped(cell) for cell in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ours(result: Result) -> str:
    ours, share = result.ours, result.share(result.ours)
    if not ours.samples:
        return "checked only" if ours.status == "ok" else ours.status
    once = " (once)" if ours.status == "once" else ""
    return seconds(ours.median) + once + (f", {share:.0%} ({result.bound})".replace("%", " %") if share else "")


def _peer(result: Result, row: Row) -> str:
    """What cannot be called a difference is not called one, and a peer without a time is named too."""
    ratio = result.ratio(row)
    if ratio is None:
        return f"{row.name} {'not timed' if row.status in ('ok', 'once') else row.status}"
    figure = times(ratio.median)
    if ratio.low == 0:
        return f"{row.name} {figure} ({'once' if 'once' in (row.status, result.ours.status) else 'too few runs'})"
    if ratio.verdict == "within the noise":
        return f"as fast as {row.name}"
    return f"{row.name} {figure}" if ratio.verdict == "faster" else f"slower than {row.name} ({figure})"


def _set(machine: Mapping[str, Any]) -> str:
    return SETS.get(machine["isa"], str(machine["isa"]))


def _caps(machine: Mapping[str, Any]) -> str:
    """What both sides were held to."""
    caps = {name: value for name, value in machine["caps"].items() if value}
    if not caps:
        return "everything the machine has"
    if len(caps) == len(machine["caps"]) and len({value.lower() for value in caps.values()}) == 1:
        return f"{_set(machine)} on both sides"
    return " ".join(f"{name}={value}" for name, value in caps.items())


def _unless_many(words: Sequence[str]) -> list[str]:
    """What all have in common; where they differ, each line of the table says its own."""
    return list(words[:1]) if len(set(words)) == 1 else []


def _day(date: str) -> str:
    day = datetime.fromisoformat(date)
    return f"{day.day} {day:%B %Y}"


def _escaped(text: str) -> str:
    """A bar would end the cell."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
