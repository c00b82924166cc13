"""`make catalogue` is green only where a check ran and passed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "catalogue.py"
HEADER = "n\tname\tstatus\twhere\tcheck_command\n"
CHECKS = """
import pytest

def test_passes(): pass
def test_fails(): assert False, "no"
@pytest.mark.skip(reason="not here")
def test_skips(): pass
@pytest.mark.xfail
def test_is_expected_to_fail(): assert False, "known"
@pytest.fixture
def broken(): raise RuntimeError("set-up")
def test_has_a_broken_set_up(broken): pass
@pytest.mark.parametrize("n", [1, 2])
def test_partly_fails(n): assert n == 1
@pytest.mark.parametrize("n", [1, 2])
def test_all_pass(n): assert n
"""


def catalogue(folder: Path, *rows: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_checks.py").write_text(CHECKS)
    (folder / "catalogue.tsv").write_text(HEADER + "".join(f"{row}\n" for row in rows))
    command = [sys.executable, str(TOOL), "catalogue.tsv"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_passing_checks_are_green(tmp_path: Path) -> None:
    rows = ["1\ta\tplanned\t\t", "2\tb\tworks\tx.py\ttest_checks.py::test_passes"]
    result = catalogue(tmp_path, *rows, "3\tc\tworks\tx.py\ttest_checks.py::test_all_pass")
    assert result.returncode == 0, result.stdout
    assert "2 of 2 rows that claim to work do" in result.stdout


@pytest.mark.parametrize(
    ("test", "word"),
    [
        ("test_fails", "failed"),
        ("test_skips", "skipped"),
        ("test_is_expected_to_fail", "expected failure"),
        ("test_has_a_broken_set_up", "failed"),
        ("test_partly_fails", "failed"),
        ("test_is_not_there", "did not run"),
    ],
)
def test_anything_else_is_not(tmp_path: Path, test: str, word: str) -> None:
    result = catalogue(tmp_path, f"5\te\tworks\tx.py\ttest_checks.py::{test}")
    assert result.returncode == 1
    assert f"5 e: {word} (test_checks.py::{test})" in result.stdout
    assert "0 of 1 rows" in result.stdout


@pytest.mark.parametrize(
    "row",
    ["1\ta\tdone\t\t", "1\ta\tworks\tx.py\t", "1\ta\tworks\t\ttest_checks.py::test_passes", "1\ta\tplanned\t\t\t"],
)
def test_a_malformed_row_is_named(tmp_path: Path, row: str) -> None:
    result = catalogue(tmp_path, row)
    assert result.returncode != 0
    assert "catalogue.tsv:2: status must be one of" in result.stderr


def test_the_catalogue_has_every_paper_once() -> None:
    lines = (ROOT / "docs" / "catalogue.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0] + "\n" == HEADER
    assert [line.split("\t")[0] for line in lines[1:]] == [str(n) for n in range(1, 400)]
    works = [line.split("\t") for line in lines if line.split("\t")[2] == "works"]
    assert all((ROOT / where).exists() for _, _, _, where, _ in works)
