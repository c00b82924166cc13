"""Reports for the terminal."""

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from layerzoo.bench.report import Report, Result, Row, describe

STYLES = {"ok": "green", "once": "green", "wrong": "red", "failed": "red", "absent": "yellow", "skipped": "yellow"}
VERDICTS = {"faster": "green", "slower": "red", "within the noise": "yellow"}


def tables(report: Report) -> Group:
    """A table for each result, then the targets."""
    return Group(*_parts(report))


def _parts(report: Report) -> Iterator[Table | Text]:
    yield Text(describe(report.machine))
    how = "medians of interleaved runs, with the bounds of 95 % confidence"
    yield Text(how + (", interrupted" if report.interrupted else ""))
    for problem in report.problems:
        yield Text(problem, style="red")
    for result in report.results:
        where = f"{result.size}  {result.dtype}, {result.device}, {result.threads} threads"
        yield Text.assemble("\n", (result.id, "bold"), f"  {where}")
        if any(row.samples for row in result.rows):
            yield _table(result)
        for row in result.rows:
            if not row.samples:
                yield Text.assemble(f"{row.name}: ", (row.status, STYLES[row.status]), f", {row.reason}")
        share = result.share(result.ours)
        if share is not None and result.limit is not None:
            yield Text(f"limit: {seconds(result.limit)} by {result.bound}; layerzoo reaches {share:.0%} of it")
    if any(result.targets for result in report.results):
        yield Text()
        yield _targets(report)


def _table(result: Result) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", min_width=20, no_wrap=True)
    columns = {"median": 7, "95 %": 16, "rate": 14, "memory": 7, "runs": 4, "vs ours": 7}
    for column, width in columns.items():
        table.add_column(column, justify="right", min_width=width, no_wrap=True)
    table.add_column("layerzoo is", min_width=16, no_wrap=True)
    for row in result.rows:
        if row.samples:
            table.add_row(Text(row.name), *_cells(result, row))
    return table


def _cells(result: Result, row: Row) -> list[Text]:
    rate, ratio = result.rate(row), None if row is result.ours else result.ratio(row)
    verdict = ratio.verdict if ratio is not None and ratio.low > 0 else ""  # none without bounds
    return [
        Text(seconds(row.median)),
        Text(bounds(row)),
        Text("" if rate is None else f"{rate:.3g} ns/elem" if result.elements else f"{rate:,.1f} tok/s"),
        Text("" if row.memory is None else size(row.memory)),
        Text("once" if row.status == "once" else str(len(row.samples))),
        Text("" if ratio is None else f"{ratio.median:.3g}x"),
        Text(verdict, style=VERDICTS.get(verdict, "")),
    ]


def _targets(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("target of", "figure", "measured", "wanted", ""):
        table.add_column(column, justify="right" if column in ("measured", "wanted") else "left", overflow="fold")
    for result in report.results:
        metrics = result.metrics()
        for target in result.targets:
            value = metrics.get(target.metric)
            shown = "-" if value is None else f"{value:.3g}"
            verdict = Text("") if value is None else _verdict(target.met(value))
            table.add_row(Text(result.id), target.metric, shown, str(target), verdict)
    return table


def _verdict(met: bool) -> Text:
    return Text("met", style="green") if met else Text("missed", style="red")


def bounds(row: Row) -> str:
    """The interval of a median in words; empty where there are too few samples for one."""
    return f"{seconds(row.interval.low)} - {seconds(row.interval.high)}" if row.interval.low > 0 else ""


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def size(value: float) -> str:
    """Bytes with three digits and their unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"
