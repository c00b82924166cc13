"""Plots as SVG for pages that need no network."""

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from statistics import linear_regression
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from layerzoo.bench.markdown import setting, times
from layerzoo.bench.noise import Interval
from layerzoo.bench.report import Result, Row
from layerzoo.bench.tables import seconds, size

GREY, BLUE, RED = "#9aa5b1", "#2563eb", "#dc2626"
INK = "#1f2933"
VERDICTS = {"faster": BLUE, "slower": RED, "within the noise": GREY}
# Ours, then the peers; marker and dash differ too, for those who do not see the colours.
LINES = [(BLUE, "o", "-"), ("#d97706", "s", "--"), ("#047857", "^", "-."), ("#7e22ce", "D", ":"), (INK, "v", "--")]
WIDTH = 5.0  # inches: on a phone about its natural size, so that 10 points can be read there
LAST = 3  # sizes of a sweep that its slope is taken over: what a call costs whatever its size tells at the small ones
NAME = 30  # characters of a name in a plot; the tables have all of it
# Of the rates that were measured: those in bytes/s are slopes, the others are flat.
SLOPES = {"cache_bandwidth": "cache", "read_bandwidth": "read", "copy_bandwidth": "copy", "gather_bandwidth": "gather"}
ROOFS = {"gemm_rate": "matrix products", "fma_peak": "multiply-add", "exp_rate": "exponentials"}


@contextmanager
def plain_text() -> Iterator[None]:
    """Inside, a name with dollar signs is drawn as it is, and not read as a formula."""
    with mpl.rc_context({"text.parse_math": False, "font.size": 10, "axes.edgecolor": GREY}):
        yield


def svg(figure: Figure, name: str) -> str:
    """The plot as an element for a page; `name` keeps the ids of several plots apart."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    element = text.getvalue()[text.getvalue().index("<svg") :]
    # The ids of groups are only numbers, the same in every plot, and nothing refers to them.
    return re.sub(r'<g id="[^"]*"', "<g", element)


# ---- ratios ----


def ratio_bars(results: Sequence[tuple[int, Result]], name: str) -> str:
    """A bar for each peer, from 1 to how many times as long as ours it takes; to the right ours is faster.

    Results come with their numbers in the overview.
    """
    alike = len({setting(result) for _, result in results}) == 1
    lines: list[tuple[str, Result, Row | None]] = []
    for number, result in results:
        words = [f"{number}  {'/'.join(filter(None, (result.variant, result.direction)))}"]
        heading = ", ".join(words if alike else [*words, setting(result)])
        lines += [(heading, result, None), *((row.name, result, row) for row in result.rows[1:])]
    figure = Figure(figsize=(WIDTH, 0.24 * len(lines) + 0.7), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", ylim=(len(lines) - 0.4, -0.6), xlabel="time of the peer / time of ours")
    axes.axvline(1, color=INK, linewidth=1)
    axes.grid(axis="x", color="#e4e8ec", linewidth=0.6)
    axes.set_axisbelow(True)
    medians = [1.0]
    for place, (label, result, row) in enumerate(lines):
        if row is None:
            # over the whole width, so the layout must not make room for it
            at = (0.01, place)
            text = axes.annotate(_short(label, 2 * NAME), at, xycoords=("figure fraction", "data"), va="center")
            text.set(weight="bold", in_layout=False, bbox={"facecolor": "white", "linewidth": 0, "pad": 1})
        else:
            medians += _bar(axes, place, result, row)
    axes.set_yticks(
        [place for place, (_, _, row) in enumerate(lines) if row],
        [_short(label) for label, _, row in lines if row],
    )
    axes.tick_params(axis="y", length=0)
    axes.spines.left.set_visible(False)
    least, most = min(medians), max(medians)
    axes.set_xlim(least / 1.6, most * (most / least) ** 0.3 * 1.6)  # on the right there is text behind the bars
    _plain_ticks(axes.xaxis, times, most / least)
    return svg(figure, name)


def _bar(axes: Axes, place: int, result: Result, row: Row) -> list[float]:
    """Draws one bar, or says why there is none; returns what the axis has to hold."""
    ratio = result.ratio(row)
    if ratio is None:
        why = row.status if row.status not in ("ok", "once") else "no time of ours" if row.samples else "not timed"
        axes.annotate(why, (1, place), (4, 0), textcoords="offset points", va="center", style="italic")
        return []
    sure = ratio.low > 0
    style: dict[str, Any] = {} if sure else {"hatch": "////", "edgecolor": GREY, "linewidth": 0.6}
    colour = VERDICTS[ratio.verdict] if sure else "white"
    axes.barh(place, ratio.median - 1, left=1, height=0.7, color=colour, **style)
    text = f"{times(ratio.median)} {_remark(ratio, 'once' in (row.status, result.ours.status))}"
    end = max(ratio.median, 1)
    if sure:
        axes.plot([ratio.low, ratio.high], [place, place], color=INK, linewidth=1.2, solid_capstyle="butt")
        end = max(ratio.high, 1)
    axes.annotate(text, (end, place), (4, 0), textcoords="offset points", va="center")
    return [ratio.median, end] + ([ratio.low] if sure else [])


def _remark(ratio: Interval, once: bool) -> str:
    """Why a bar is no verdict, for those who do not see its colour or hatch."""
    if ratio.low > 0:
        return "noise" if ratio.verdict == "within the noise" else ""
    return "once" if once else "too few runs"


# ---- growth ----


def growth(results: Sequence[Result], value: Callable[[Row], float | None], unit: str, name: str) -> str:
    """One line per candidate against the size that was swept, both axes in logarithms, with its slope in the legend.

    `unit` is "time" or "memory"; `value` gives None where a row has none.
    """
    results = sorted(results, key=lambda result: result.shape[result.swept])
    sizes = [result.shape[result.swept] for result in results]
    figure = Figure(figsize=(WIDTH, 2.8 + 0.2 * len(results[0].rows)), layout="constrained")
    axes = figure.add_subplot()
    if unit == "time" and all(result.limit for result in results):
        axes.plot(sizes, [result.limit or 0 for result in results], color=GREY, linewidth=1, label="limit")
    for (colour, marker, dash), rows in zip(cycle(LINES), zip(*(r.rows for r in results), strict=True), strict=False):
        points = [(at, found) for at, row in zip(sizes, rows, strict=True) if (found := value(row))]
        label = _short(rows[0].name) + _ending(rows, len(points))
        if (steep := slope(points)) is not None:
            label += f", slope {steep:.2f}"
        axes.plot(
            [at for at, _ in points],
            [found for _, found in points],
            color=colour,
            marker=marker,
            linestyle=dash,
            markersize=4,
            linewidth=2.2 if rows[0] is results[0].ours else 1.2,
            label=label,
        )
    axes.set(xscale="log", yscale="log", xlabel=results[0].swept)
    axes.set_ylabel("time of a call" if unit == "time" else "peak memory of a call")
    shown = sizes[:: math.ceil(len(sizes) / 6)]  # more would overlap
    axes.set_xticks(shown, [str(at) for at in shown])
    axes.minorticks_off()
    _plain_ticks(axes.yaxis, seconds if unit == "time" else size, _spread(axes))
    axes.grid(color="#e4e8ec", linewidth=0.6)
    figure.legend(loc="outside upper left", frameon=False)
    return svg(figure, name)


def slope(points: Sequence[tuple[int, float]]) -> float | None:
    """Of a line through the last `LAST` points in logarithms, so 1 where growth is linear; None for a single size."""
    last = [(math.log(at), math.log(found)) for at, found in points[-LAST:]]
    return linear_regression(*zip(*last, strict=True)).slope if len({at for at, _ in last}) > 1 else None


def _ending(rows: Sequence[Row], points: int) -> str:
    """Why a line has fewer points than there are sizes."""
    reasons = dict.fromkeys(row.status for row in rows if not row.samples and row.status != "ok")
    return f" ({', '.join(reasons)})" if reasons and points < len(rows) else ""


# ---- roofline ----


def roofline(points: Sequence[tuple[int, Result]], rates: Mapping[str, float], name: str) -> str:
    """What ours reaches of operations per second, below what memory and arithmetic allow.

    A number is that of the result in the overview. The dash above a point is its own limit, which knows of what kind
    the operations are. Every result has a cost of bytes and operations, and a time of ours.
    """
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel="operations / byte", ylabel="operations / s")
    slopes = {label: rates[key] for key, label in SLOPES.items() if rates.get(key)}
    roofs = {label: rates[key] for key, label in ROOFS.items() if rates.get(key)}
    places = [_place(result) for _, result in points]
    across = [x for x, _, _ in places] + [max(roofs.values()) / slope for slope in slopes.values() if roofs]
    up = [y for place in places for y in place[1:]] + list(roofs.values())
    left, right = min(across) / 6, max(across) * 6
    axes.set(xlim=(left, right), ylim=(min(up) / 4, max(up) * 3))
    _plain_ticks(axes.xaxis, lambda value: f"{value:g}", right / left)
    _plain_ticks(axes.yaxis, _per_second, _spread(axes))
    styles = dict(zip(dict.fromkeys(result.name for _, result in points), cycle(LINES), strict=False))
    for case, (colour, marker, _) in styles.items():
        axes.plot([], [], color=colour, marker=marker, linestyle="", markersize=5, label=_short(case))
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    _roofs(axes, slopes, roofs)
    for (_, result), (x, y, most) in zip(points, places, strict=True):
        colour, marker, _ = styles[result.name]
        axes.plot(x, y, color=colour, marker=marker, markersize=5, linestyle="")
        if most > y:
            axes.plot([x, x], [y, most], color=colour, linewidth=0.6)
            axes.plot(x, most, color=colour, marker="_", markersize=8)
    for (x, y), numbers in _crowds([(number, x, y) for (number, _), (x, y, _) in zip(points, places, strict=True)]):
        axes.annotate(_ranges(numbers), (x, y), (6, -3), textcoords="offset points", size=8)
    return svg(figure, name)


def _place(result: Result) -> tuple[float, float, float]:
    """Operations per byte and per second, and how many per second there could be."""
    cost, time = result.cost, result.ours.median
    if cost is None:
        raise ValueError(f"bench: {result.id} has no cost")
    return cost.operations / cost.bytes, cost.operations / time, cost.operations / (result.limit or time)


def _roofs(axes: Axes, slopes: Mapping[str, float], roofs: Mapping[str, float]) -> None:
    """Each as far as no other is below all of the same kind; the names of alike ones stand on different sides."""
    left, right = axes.get_xlim()
    top = max(roofs.values(), default=axes.get_ylim()[1])
    angle = _diagonal(axes)
    style: dict[str, Any] = {"size": 8, "color": "#52606d", "in_layout": False}
    for place, (label, slope) in enumerate(sorted(slopes.items(), key=lambda item: -item[1])):
        axes.plot([left, top / slope], [left * slope, top], color=GREY, linewidth=1, linestyle="--")
        below = place >= len(slopes) // 2
        start = max(left, axes.get_ylim()[0] / slope) * (1.4 + place)
        text = axes.text(start, start * slope * (0.9 if below else 1.1), f"{label} {size(slope)}/s", **style)
        text.set(rotation=angle, rotation_mode="anchor", va="top" if below else "bottom")
    for place, (label, roof) in enumerate(sorted(roofs.items(), key=lambda item: -item[1])):
        axes.plot([roof / max(slopes.values(), default=roof / left), right], [roof, roof], color=GREY, linewidth=1)
        below = place >= len(roofs) // 2
        text = axes.text(right, roof * (0.93 if below else 1.07), f"{label} {_per_second(roof)}/s", **style)
        text.set(ha="right", va="top" if below else "bottom")


def _diagonal(axes: Axes) -> float:
    """Degrees of a line that rises by ten where it goes right by ten."""
    axes.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]  # places the axes
    (left, low), (right, high) = axes.transData.transform([(1, 1), (10, 10)])
    return math.degrees(math.atan2(high - low, right - left))


def _crowds(points: Sequence[tuple[int, float, float]]) -> list[tuple[tuple[float, float], list[int]]]:
    """Numbers of points whose labels would cover each other, with the place of the first."""
    crowds: list[tuple[tuple[float, float], list[int]]] = []
    for number, x, y in points:
        for (x0, y0), numbers in crowds:
            if abs(math.log10(x / x0)) < 0.15 and abs(math.log10(y / y0)) < 0.12:
                numbers.append(number)
                break
        else:
            crowds.append(((x, y), [number]))
    return crowds


def _ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


# ---- axes ----


def _plain_ticks(axis: Any, words: Callable[[float], str], spread: float) -> None:
    """Ticks in words, at 1, 2 and 5 where the axis has few powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if spread < 100 else (1.0,), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))
    axis.set_minor_formatter(NullFormatter())


def _spread(axes: Axes) -> float:
    low, high = axes.get_ylim()
    return high / low


def _per_second(value: float) -> str:
    for letter, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g}"


def _short(name: str, most: int = NAME) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
