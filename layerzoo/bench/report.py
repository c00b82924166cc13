"""What was measured: results, their figures, and how they are shown and kept."""

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from layerzoo import __version__, _native, env
from layerzoo.bench.case import Target

SCHEMA = 1
Status = Literal["ok", "once", "wrong", "failed", "absent", "skipped"]
STYLES = {"ok": "green", "once": "green", "wrong": "red", "failed": "red", "absent": "yellow", "skipped": "yellow"}


@dataclass
class Row:
    """One candidate: `samples` are the seconds of one call each; without samples, `status` and `reason` say why."""

    name: str
    status: Status = "ok"
    reason: str = ""
    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median of the seconds for one call."""
        return median(self.samples)

    @property
    def spread(self) -> float:
        """Distance of the quartiles in seconds."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = quantiles(self.samples, n=4, method="inclusive")
        return high - low


@dataclass
class Result:
    """One case; the first row is ours. Figures are computed from medians."""

    name: str
    variant: str
    direction: str
    shape: dict[str, int]
    rows: list[Row]
    elements: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    bandwidth: float | None = None  # bytes read per second, measured
    memory: float | None = None  # peak extra bytes of a call of ours / bytes of its inputs
    targets: list[Target] = field(default_factory=list)

    @property
    def id(self) -> str:
        """As `Case.id`."""
        return "/".join(filter(None, (self.name, self.variant, self.direction)))

    def ratio(self, row: Row) -> float | None:
        """How many times longer than ours a row takes; None where one of the two has no time."""
        ours = self.rows[0]
        return row.median / ours.median if row.samples and ours.samples else None

    def rate(self, row: Row) -> float | None:
        """ns per element or tokens per second, whichever the case counts."""
        if not row.samples or not (self.elements or self.tokens):
            return None
        return row.median * 1e9 / self.elements if self.elements else (self.tokens or 0) / row.median

    @property
    def limit(self) -> float | None:
        """Seconds that reading the bytes of the case takes on this machine."""
        return self.bytes / self.bandwidth if self.bytes and self.bandwidth else None

    def metrics(self) -> dict[str, float]:
        """The figures that targets speak of, those that could be measured."""
        ours = self.rows[0]
        figures = {"ns/element" if self.elements else "tokens/s": self.rate(ours), "memory / inputs": self.memory}
        figures |= {f"x {row.name}": self.ratio(row) for row in self.rows[1:]}
        if self.limit is not None and ours.samples:
            figures["share of the read limit"] = self.limit / ours.median
        return {name: value for name, value in figures.items() if value is not None}


@dataclass
class Report:
    """All results of one run on one machine."""

    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        """Whether every candidate that ran gave the right result (whatever its time)."""
        return not any(row.status in ("wrong", "failed") for result in self.results for row in result.rows)

    def save(self, path: Path) -> None:
        """Writes JSON; the derived figures are there for readers, `load` computes them again."""
        results = []
        for result in self.results:
            rows = [asdict(r) | ({"median": r.median, "spread": r.spread} if r.samples else {}) for r in result.rows]
            results.append(asdict(result) | {"rows": rows, "metrics": result.metrics()})
        data = {"schema": SCHEMA, "machine": self.machine, "interrupted": self.interrupted, "results": results}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads what `save` wrote. ValueError for another schema."""
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise ValueError(f"bench: {path} must have schema {SCHEMA}, got {data.get('schema')}")
        report = cls(data["machine"], interrupted=data["interrupted"])
        for saved in data["results"]:
            rows = [Row(**{key: row[key] for key in ("name", "status", "reason", "samples")}) for row in saved["rows"]]
            targets = [Target(**target) for target in saved["targets"]]
            rest = {key: value for key, value in saved.items() if key != "metrics"}
            report.results.append(Result(**rest | {"rows": rows, "targets": targets}))
        return report

    def save_html(self, path: Path) -> None:
        """Writes the tables as a page."""
        with open(os.devnull, "w") as nowhere:
            console = Console(record=True, width=140, file=nowhere)
            console.print(self)
        console.save_html(str(path))

    def __rich__(self) -> Group:
        return Group(*self._parts())

    def _parts(self) -> Iterator[Table | Text]:
        yield Text(describe(self.machine))
        yield Text("medians of interleaved runs" + (", interrupted" if self.interrupted else ""))
        for result in self.results:
            size = " ".join(f"{name}{value}" for name, value in result.shape.items())
            yield Text.assemble("\n", (result.id, "bold"), f"  {size}")
            if any(row.samples for row in result.rows):
                yield _table(result)
            for row in result.rows:
                if not row.samples:
                    yield Text.assemble(f"{row.name}: ", (row.status, STYLES[row.status]), f", {row.reason}")
            if result.limit is not None and result.tokens:
                bound = f"{result.tokens / result.limit:,.1f} tok/s, when only the weights are read"
                yield Text(f"limit: {bound}, at {(result.bandwidth or 0) / 1e9:.1f} GB/s")
        if any(result.targets for result in self.results):
            yield Text()
            yield self._targets()

    def _targets(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("target of", "figure", "measured", "wanted", ""):
            table.add_column(column, justify="right" if column in ("measured", "wanted") else "left")
        for result in self.results:
            metrics = result.metrics()
            for target in result.targets:
                value = metrics.get(target.metric)
                shown = "-" if value is None else f"{value:.3g}"
                verdict = Text("") if value is None else _verdict(target.met(value))
                table.add_row(Text(result.id), target.metric, shown, str(target), verdict)
        return table


def _verdict(met: bool) -> Text:
    return Text("met", style="green") if met else Text("missed", style="red")


def _table(result: Result) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", min_width=20, no_wrap=True)
    for column, width in (("median", 7), ("min", 7), ("IQR", 7), ("rate", 14), ("vs ours", 7), ("runs", 4)):
        table.add_column(column, justify="right", min_width=width, no_wrap=True)
    for row in result.rows:
        if row.samples:
            table.add_row(Text(row.name), *_cells(result, row))
    return table


def _cells(result: Result, row: Row) -> list[Text]:
    rate, ratio = result.rate(row), result.ratio(row)
    shown = f"{rate or 0:.3g} ns/elem" if result.elements else f"{rate or 0:,.1f} tok/s"
    return [
        Text(seconds(row.median)),
        Text(seconds(min(row.samples))),
        Text("" if len(row.samples) == 1 else seconds(row.spread)),
        Text("" if rate is None else shown),
        Text("" if ratio is None or row is result.rows[0] else f"{ratio:.3g}x"),
        Text("once" if row.status == "once" else str(len(row.samples))),
    ]


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "layerzoo": __version__,
        "isa": _native.status().isa,
        "caps": env.caps(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(machine: dict[str, Any]) -> str:
    """`machine` in one line."""
    caps = " ".join(f"{name}={value}" for name, value in machine["caps"].items() if value) or "no caps"
    return (
        f"{machine['cpu']}, {machine['threads']} threads, layerzoo {machine['layerzoo']} ({machine['isa']}), "
        f"torch {machine['torch']} ({machine['torch_isa']}), {caps}"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
