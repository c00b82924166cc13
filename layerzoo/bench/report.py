"""What was measured: rows, results and their figures, as data and as JSON. `tables` and `page` show it."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from layerzoo import __version__, _native, env
from layerzoo.bench.case import Cost, Target
from layerzoo.bench.noise import Interval, interval, ratio

SCHEMA = 2
Status = Literal["ok", "once", "wrong", "failed", "absent", "skipped"]


@dataclass
class Row:
    """One candidate: `samples` are the seconds of one call each; without samples, `status` and `reason` say why."""

    name: str
    status: Status = "ok"
    reason: str = ""
    samples: list[float] = field(default_factory=list)
    memory: float | None = None  # bytes that a call takes at its peak beyond what was taken before

    @property
    def interval(self) -> Interval:
        """Median of the seconds for one call, and its bounds."""
        return interval(self.samples)

    @property
    def median(self) -> float:
        """Median of the seconds for one call."""
        return self.interval.median


@dataclass
class Result:
    """One case with one choice of sizes, type, device and threads; the first row is ours."""

    name: str
    variant: str
    direction: str
    shape: dict[str, int]
    rows: list[Row]
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    swept: str = ""  # the size that `--sweep` varied
    elements: int | None = None
    tokens: int | None = None
    inputs: int | None = None  # bytes of the inputs of a call, those that may need a gradient
    cost: Cost | None = None
    limit: float | None = None  # seconds: no call can take less on this machine, by what was probed
    bound: str = ""  # what the limit comes from, such as "memory" or "arithmetic"
    targets: list[Target] = field(default_factory=list)

    @property
    def id(self) -> str:
        """As `Case.id`."""
        return "/".join(filter(None, (self.name, self.variant, self.direction)))

    @property
    def size(self) -> str:
        """The sizes in a word each."""
        return " ".join(f"{name}{value}" for name, value in self.shape.items())

    @property
    def key(self) -> str:
        """What makes two results comparable: everything but the machine and the code."""
        return f"{self.id} {self.size} {self.dtype} {self.device} {self.threads} threads"

    @property
    def ours(self) -> Row:
        """The first row."""
        return self.rows[0]

    def ratio(self, row: Row) -> Interval | None:
        """How many times longer than ours a row takes; None where one of the two has no time."""
        return ratio(row.samples, self.ours.samples) if row.samples and self.ours.samples else None

    def rate(self, row: Row) -> float | None:
        """ns per element or tokens per second, whichever the case counts."""
        if not row.samples or not (self.elements or self.tokens):
            return None
        return row.median * 1e9 / self.elements if self.elements else (self.tokens or 0) / row.median

    def share(self, row: Row) -> float | None:
        """How much of the machine's limit a row reaches; 1 is the limit."""
        return self.limit / row.median if self.limit and row.samples else None

    def metrics(self) -> dict[str, float]:
        """The figures that targets speak of, those that could be measured."""
        ours = self.ours
        figures: dict[str, float | None] = {"ns/element" if self.elements else "tokens/s": self.rate(ours)}
        figures["µs/call"] = ours.median * 1e6 if ours.samples else None
        if ours.memory is not None and self.inputs:
            figures["memory / inputs"] = ours.memory / self.inputs
        for row in self.rows[1:]:
            found = self.ratio(row)
            figures[f"x {row.name}"] = None if found is None else found.median
        figures["share of the limit"] = self.share(ours)
        return {name: value for name, value in figures.items() if value is not None}


@dataclass
class Report:
    """All results of one run on one machine."""

    machine: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    interrupted: bool = False
    problems: list[str] = field(default_factory=list)  # what could not be measured at all, such as a plugin's cases

    @property
    def ok(self) -> bool:
        """Whether ours ran everywhere, and nobody gave a wrong result. A peer that crashes is shown; it is no fault."""
        failed = any(result.ours.status == "failed" for result in self.results)
        return not failed and not any(row.status == "wrong" for row in self.rows())

    def rows(self) -> Iterator[Row]:
        """Every row of every result."""
        for result in self.results:
            yield from result.rows

    def save(self, path: Path) -> None:
        """Writes JSON; the derived figures are there for readers, `load` computes them again."""
        data = asdict(self) | {"schema": SCHEMA}
        for saved, result in zip(data["results"], self.results, strict=True):
            saved["metrics"] = result.metrics()
            for row, kept in zip(saved["rows"], result.rows, strict=True):
                row["median"] = kept.median if kept.samples else None
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads what `save` wrote. ValueError for anything else, OSError where the file cannot be read."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            schema = data.get("schema")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"bench: {path} must be a file that --json wrote: {error}") from error
        if schema != SCHEMA:
            raise ValueError(f"bench: {path} must have schema {SCHEMA}, got {schema}: measure again")
        report = cls(data["machine"], interrupted=data["interrupted"], problems=data["problems"])
        for saved in data["results"]:
            saved.pop("metrics")
            for row in saved["rows"]:
                row.pop("median")
            saved["rows"] = [Row(**row) for row in saved["rows"]]
            saved["targets"] = [Target(**target) for target in saved["targets"]]
            saved["cost"] = saved["cost"] and Cost(**saved["cost"])
            report.results.append(Result(**saved))
        return report


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "layerzoo": __version__,
        "commit": _commit(),
        "installed_bytes": _installed(),
        "isa": _native.status().isa,
        "caps": env.caps(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def describe(machine: dict[str, Any]) -> str:
    """`machine` in one line."""
    caps = " ".join(f"{name}={value}" for name, value in machine["caps"].items() if value) or "no caps"
    return (
        f"{machine['cpu']}, {machine['cores']} cores, layerzoo {machine['layerzoo']} ({machine['isa']}), "
        f"torch {machine['torch']} ({machine['torch_isa']}), {caps}"
    )


def _cpu_model() -> str:
    """Model, family and stepping: of one name there are several processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.machine()
    numbers = " ".join(f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts)
    return f"{facts['model name']} ({numbers})" if numbers else facts["model name"]


def _installed() -> int:
    """Bytes of the package on disk, native libraries included."""
    files = (path for path in Path(__file__).parents[1].rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if path.suffix != ".pyc")


def _commit() -> str | None:
    """Of the checkout that the package lies in, marked where it was changed since; None where it is no checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
