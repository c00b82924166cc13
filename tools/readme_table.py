"""Write the measured part of README.md from benchmarks/baselines: of each machine with its caps the newest record.

Usage: python tools/readme_table.py [--check]    (--check writes nothing, and fails where README.md is out of date)
"""

import argparse
import sys
from pathlib import Path

from layerzoo.bench.markdown import markdown
from layerzoo.bench.report import Report

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
FOLDER = "benchmarks/baselines"


def main(root: Path, check: bool) -> str:
    """Returns what is wrong, and an empty string where nothing is."""
    records = newest(root / FOLDER)
    if not records:
        return f"{FOLDER} has no record: store one with layerzoo bench --json {FOLDER}/NAME.json"
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    wanted = replaced(text, records)
    if check:
        return "" if text == wanted else f"README.md is not what {FOLDER} says: make readme-table"
    readme.write_text(wanted, encoding="utf-8")
    return ""


def newest(folder: Path) -> dict[str, Report]:
    """The records to show, by file name; those with caps first. ValueError for a file that --json did not write."""
    chosen: dict[str, tuple[str, Report]] = {}
    for path in sorted(folder.glob("*.json")):
        report = Report.load(path)
        key = repr([report.machine[fact] for fact in ("cpu", "cores", "gpu", "caps")])
        if key not in chosen or report.machine["date"] > chosen[key][1].machine["date"]:
            chosen[key] = (path.name, report)
    found = sorted(chosen.values(), key=lambda item: (not any(item[1].machine["caps"].values()), item[0]))
    return dict(found)


def replaced(readme: str, records: dict[str, Report]) -> str:
    """The README with the table between its markers. ValueError where it has not one of each, in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have {BEGIN} and, below it, {END}")
    files = ", ".join(f"`{FOLDER}/{name}`" for name in records)
    made = f"Made by `make readme-table` from {files}, stored by `layerzoo bench --json FILE`."
    return f"{before}{BEGIN}\n{markdown(list(records.values()))}\n\n{made}\n{END}{after}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    try:
        sys.exit(main(Path(__file__).parents[1], parser.parse_args().check) or None)
    except ValueError as error:
        sys.exit(str(error))
