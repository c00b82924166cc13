"""A report as one page that needs no network: tables, ratios to the peers, growth, and the machine's limits."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from layerzoo.bench.markdown import digits, setting, times
from layerzoo.bench.noise import Interval
from layerzoo.bench.report import Report, Result, Row, describe
from layerzoo.bench.tables import bounds, seconds, size

try:
    from jinja2 import Environment, StrictUndefined

    from layerzoo.bench.plots import LAST, growth, plain_text, ratio_bars, roofline
except ImportError as error:
    raise ImportError(f"the page needs the extra [bench]: pip install 'layerzoo[bench]' ({error})") from error

# What `rates` may hold, in words. Bandwidths are in bytes.
RATES = {
    "read_bandwidth": "reading memory",
    "copy_bandwidth": "copying memory, read and written bytes",
    "gather_bandwidth": "reading rows from random places",
    "cache_bandwidth": "reading the cache",
    "fma_peak": "multiply-adds, two operations each",
    "gemm_rate": "matrix products, operations",
    "exp_rate": "exponentials",
}
SLOPE = f"Slope: over the last {LAST} sizes; 1 is linear growth."
TIMED = ("faster", "within the noise", "slower", "run once", "too few runs")
VERDICTS = (*TIMED, "wrong", "failed", "absent", "skipped", "not timed")  # in this order they are counted


@dataclass
class Section:
    """All results of one case name."""

    name: str
    results: list[tuple[int, Result]]  # with their numbers in the overview
    bars: str = ""
    curves: list[tuple[str, str]] = field(default_factory=list)  # (words, plot)


def write_page(report: Report, path: Path, rates: Mapping[str, float] | None) -> None:
    """Writes `path`, one HTML file. `rates` are what was probed of the machine, per second; None where nothing was.

    Raises OSError where the file cannot be written.
    """
    template = files("layerzoo.bench").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"seconds": seconds, "size": size, "times": times, "sureness": sureness, "against": against}
    environment.filters |= {"bounds": bounds, "rate": rate, "setting": setting, "digits": digits}
    with plain_text():
        page = environment.from_string(template).render(
            report=report,
            summary=describe(report.machine),
            facts=_facts(report.machine),
            rates=_rates(rates or {}),
            counts=_counts(report),
            sections=_sections(report),
            targets=[(r, target, r.metrics().get(target.metric)) for r in report.results for target in r.targets],
            roofline=_roofline(report, rates or {}),
        )
    path.write_text(page, encoding="utf-8")


# ---- words ----


class Against(NamedTuple):
    """How a row compares with ours: the mark and the style say the verdict without colours, and with them."""

    ratio: Interval | None
    verdict: str
    mark: str
    style: str


def against(result: Result, row: Row) -> Against:
    """A row without a time has its status as the verdict, so it never looks like a win."""
    ratio = result.ratio(row)
    if ratio is None:
        status = "not timed" if row.status in ("ok", "once") else row.status
        return Against(None, status, "○", "open")
    if ratio.low == 0:
        return Against(ratio, "run once" if "once" in (row.status, result.ours.status) else "too few runs", "◇", "open")
    mark, style = {"faster": ("▲", "won"), "slower": ("▼", "lost")}.get(ratio.verdict, ("≈", "open"))
    return Against(ratio, ratio.verdict, mark, style)


def sureness(ratio: Interval) -> str:
    """The bounds of a ratio; empty where there are too few samples for any."""
    return f"{digits(ratio.low)} to {digits(ratio.high)}" if ratio.low > 0 else ""


def rate(result: Result, row: Row) -> str:
    """What the case counts: ns per element, or tokens per second."""
    found = result.rate(row)
    if found is None:
        return ""
    return f"{digits(found)} ns/element" if result.elements else f"{found:,.1f} tok/s"


def _facts(machine: Mapping[str, Any]) -> dict[str, str]:
    """Every fact, those in groups (the caps) each on a line of its own."""
    facts: dict[str, str] = {}
    for name, value in machine.items():
        for part, inner in value.items() if isinstance(value, dict) else [("", value)]:
            facts[f"{name}: {part}" if part else name.replace("_", " ")] = "none" if inner is None else str(inner)
    return facts


def _rates(rates: Mapping[str, float]) -> dict[str, str]:
    shown = {key: rates[key] for key in RATES if rates.get(key)}
    return {RATES[key]: f"{size(r) if 'bandwidth' in key else f'{r / 1e9:.3g} G'}/s" for key, r in shown.items()}


def _counts(report: Report) -> dict[str, int]:
    """How often each verdict was given; what has no time counts too."""
    given = Counter(against(result, row).verdict for result in report.results for row in result.rows[1:])
    return {verdict: given[verdict] for verdict in sorted(given, key=VERDICTS.index)}


# ---- plots ----


def _sections(report: Report) -> list[Section]:
    numbered = list(enumerate(report.results, 1))
    sections = []
    for name in dict.fromkeys(result.name for result in report.results):
        section = Section(name, [(number, result) for number, result in numbered if result.name == name])
        single = [(number, result) for number, result in section.results if not result.swept]
        if any(result.ratio(row) for _, result in single for row in result.rows[1:]):
            section.bars = ratio_bars(single, f"{name} ratios")
        section.curves = list(_curves([result for _, result in section.results if result.swept]))
        sections.append(section)
    return sections


def _curves(results: Iterable[Result]) -> Iterator[tuple[str, str]]:
    """Words and a plot for time and for memory of every sweep, where there are at least two sizes with a figure."""
    sweeps: dict[str, list[Result]] = {}
    for result in results:
        words = f"{result.id}, {setting(result)}"
        rest = " ".join(f"{name}{value}" for name, value in result.shape.items() if name != result.swept)
        sweeps.setdefault(f"{words}, {rest}" if rest else words, []).append(result)
    for words, sweep in sweeps.items():
        for what, value in (("time", _time), ("memory", _memory)):
            if sum(any(map(value, result.rows)) for result in sweep) > 1:
                plot = growth(sweep, value, what, f"{words} {what}")
                yield f"{what.capitalize()} by {sweep[0].swept}: {words}. {SLOPE}", plot


def _time(row: Row) -> float | None:
    return row.median if row.samples else None


def _memory(row: Row) -> float | None:
    return row.memory if row.samples else None


def _roofline(report: Report, rates: Mapping[str, float]) -> str:
    points = [
        (place, result)
        for place, result in enumerate(report.results, 1)
        if result.ours.samples and result.cost and result.cost.bytes and result.cost.operations
    ]
    return roofline(points, rates, "roofline") if points and _rates(rates) else ""
