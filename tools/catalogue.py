"""Run the check of every catalogue row that claims to work; a skip, or a check that did not run, is not green.

Usage: python tools/catalogue.py [docs/catalogue.tsv]
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import pytest

COLUMNS = ["n", "name", "status", "where", "check_command"]
STATUSES = ("works", "planned")


def read(path: Path) -> list[dict[str, str]]:
    """The rows; raises ValueError naming the line that breaks the format."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: columns must be {COLUMNS}, got {reader.fieldnames}")
        rows = list(reader)
    for line, row in enumerate(rows, start=2):
        works = row["status"] == "works"
        if row["status"] not in STATUSES or None in row or (works and not (row["where"] and row["check_command"])):
            rule = f"status must be one of {STATUSES}, and works needs where and check_command"
            raise ValueError(f"{path}:{line}: {rule}, got {row}")
    numbers = [int(row["n"]) for row in rows]
    if numbers != sorted(set(numbers)):
        raise ValueError(f"{path}: n must rise from row to row")
    return rows


class Recorder:
    """A pytest plugin: the outcomes of each test, set-up and tear-down included, by node id."""

    def __init__(self) -> None:
        self.outcomes: dict[str, set[str]] = defaultdict(set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        expected = hasattr(report, "wasxfail")
        self.outcomes[report.nodeid].add("expected failure" if expected else report.outcome)


def verdict(node: str, outcomes: dict[str, set[str]]) -> str:
    """ "passed", or why the row is not green; a node stands for all its parametrised cases."""
    runs = [seen for nodeid, seen in outcomes.items() if nodeid == node or nodeid.startswith((f"{node}[", f"{node}::"))]
    if not runs:
        return "did not run"
    return ", ".join(sorted(set.union(*runs) - {"passed"})) or "passed"


def main(path: Path) -> int:
    rows = [row for row in read(path) if row["status"] == "works"]
    recorder = Recorder()
    nodes = sorted({row["check_command"] for row in rows})
    if nodes:
        pytest.main([*nodes, "-q", "--import-mode=importlib", "-p", "no:cacheprovider"], plugins=[recorder])
    failed = 0
    for row in rows:
        result = verdict(row["check_command"], recorder.outcomes)
        failed += result != "passed"
        print(f"{row['n']:>3} {row['name']}: {result} ({row['check_command']})")
    print(f"{len(rows) - failed} of {len(rows)} rows that claim to work do")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/catalogue.tsv")))
