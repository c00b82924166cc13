"""The table of the README: its words, and that README.md is what the stored records give."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from layerzoo.bench.markdown import markdown
from layerzoo.bench.report import Report, Result, Row

ROOT = Path(__file__).parents[2]
NAMES = ("LAYERZOO_CPU", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
AVX2 = dict(zip(NAMES, ("avx2", "avx2", "AVX2", "AVX2"), strict=True))


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "tools" / "readme_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme_table = tool()


def times(median: float, count: int = 9) -> list[float]:
    return [median * (1 + 0.01 * (i - count // 2)) for i in range(count)]


def record(*results: Result, caps: dict[str, str] | None = None, day: int = 24, **facts) -> Report:
    machine = {
        "cpu": "Made-up CPU",
        "cores": 2,
        "gpu": None,
        "torch": "2.14.1",
        "isa": "avx2" if caps else "avx512",
        "caps": dict.fromkeys(NAMES) | (caps or {}),
        "date": f"2026-11-{day:02}T10:00:00+00:00",
    }
    return Report(machine | facts, list(results) or [result(4e-3)])


def result(ours: float, *peers: Row, **changes) -> Result:
    fields = {"variant": "flat", "direction": "forward", "shape": {"n": 50}, "threads": 2}
    rows = [Row("layerzoo", "ok", "", times(ours)), *(peers or [Row("torch", "ok", "", times(3 * ours))])]
    return Result("toy.double", rows=rows, **fields | changes)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]


def words(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def test_one_report():
    text = markdown([record(result(4e-3, limit=3e-3, bound="memory"))])
    assert words(text).startswith(
        "Made-up CPU, 2 cores, torch 2.14.1, float32, 2 threads, 24 November 2026. Medians of"
    )
    assert cells(text) == [
        ["case", "layerzoo, AVX-512", "peers, everything the machine has"],
        ["---"] * 3,
        ["`toy.double/flat/forward` n50", "4 ms, 75 % (memory)", "torch 3x"],
    ]


def test_a_pair_of_columns_for_each_report_of_a_machine():
    capped = record(result(8e-3), result(1e-3, direction="decode"), caps=AVX2)
    free = record(result(4e-3), result(2e-3, variant="deep"), day=25)
    text = markdown([capped, free])
    assert ", 24 November 2026 and 25 November 2026. " in words(text)
    assert cells(text)[0][1:] == [
        "layerzoo, AVX2",
        "peers, AVX2 on both sides",
        "layerzoo, AVX-512",
        "peers, everything the machine has",
    ]
    assert cells(text)[2:] == [
        ["`toy.double/flat/forward` n50", "8 ms", "torch 3x", "4 ms", "torch 3x"],
        ["`toy.double/flat/decode` n50", "1 ms", "torch 3x", "", ""],
        ["`toy.double/deep/forward` n50", "", "", "2 ms", "torch 3x"],
    ]


def test_other_caps_are_spelled_out():
    assert cells(markdown([record(caps={"LAYERZOO_CPU": "avx2"})]))[0][2] == "peers, LAYERZOO_CPU=avx2"


def test_only_what_bounds_allow_is_called_faster_or_slower():
    peers = (
        Row("quick", "ok", "", times(2e-3)),
        Row("alike", "ok", "", [4e-3 * (1 + 0.02 * (i % 3 - 1)) for i in range(9)]),
        Row("slow", "ok", "", times(5)),
        Row("slowest", "once", "", [6.0]),
        Row("started", "ok", "", [8e-3, 8e-3]),
        Row("off", "wrong", "differs"),
        Row("broken", "failed", "RuntimeError"),
        Row("elsewhere", "absent", "No module"),
        Row("patient", "skipped", "takes minutes"),
    )
    assert cells(markdown([record(result(4e-3, *peers))]))[2][2] == (
        "slower than quick (0.5x), as fast as alike, slow 1,250x, slowest 1,500x (once), started 2x (too few runs), "
        "off wrong, broken failed, elsewhere absent, patient skipped"
    )


def test_ours_without_a_time_says_why():
    failed = Result(
        "toy.x", "", "forward", {"n": 1}, [Row("layerzoo", "failed", "no"), Row("torch", "ok", "", times(1))]
    )
    smoke = Result("toy.y", "", "forward", {"n": 1}, [Row("layerzoo"), Row("torch")])
    once = Result("toy.z", "", "forward", {"n": 1}, [Row("layerzoo", "once", "", [7.0])])
    assert cells(markdown([record(failed, smoke, once)]))[2:] == [
        ["`toy.x/forward` n1", "failed", "torch not timed"],
        ["`toy.y/forward` n1", "checked only", "torch not timed"],
        ["`toy.z/forward` n1", "7 s (once)", ""],
    ]


def test_types_threads_and_devices_stand_in_the_line_where_they_differ():
    text = markdown([record(result(4e-3), result(2e-3, dtype="bfloat16"), result(1e-3, threads=1, device="cuda"))])
    assert "float32" not in words(text)
    assert [line[0].partition(" n50, ")[2] for line in cells(text)[2:]] == [
        "float32, 2 threads",
        "bfloat16, 2 threads",
        "float32, 1 thread, cuda",
    ]


def test_machines_have_tables_of_their_own():
    text = markdown([record(), record(cpu="Another CPU"), record(gpu="A GPU"), record(caps=AVX2)])
    assert text.count("| case |") == 3
    assert [len(line) for line in cells(text) if line[0] == "case"] == [5, 3, 3]
    assert "Made-up CPU, 2 cores, A GPU, torch" in text


def test_interruption_problems_and_bars():
    report = record(result(4e-3, Row("a|b", "absent", "")))
    report.interrupted, report.problems = True, ["plugin mine: <broken>"]
    text = markdown([report])
    assert "Interrupted, so not complete: everything the machine has." in words(text)
    assert "Not measured with everything the machine has: plugin mine: &lt;broken>." in words(text)
    assert r"| a\|b absent |" in text


@pytest.mark.parametrize("reports", [[], [Report({"cpu": "x"})]])
def test_nothing_to_show(reports):
    with pytest.raises(ValueError, match="reports must have results, got none"):
        markdown(reports)


# ---- tools/readme_table.py ----

README = "# toy\n\n<!-- measured:begin -->\nold\n<!-- measured:end -->\n\nrest\n"


def checkout(folder: Path, **records: Report) -> Path:
    baselines = folder / readme_table.FOLDER
    baselines.mkdir(parents=True)
    for name, report in records.items():
        report.save(baselines / f"{name}.json")
    (folder / "README.md").write_text(README, encoding="utf-8")
    return folder


def test_the_tool_writes_the_newest_of_each_machine_and_caps(tmp_path):
    records = {"free": record(day=9), "later": record(day=10), "held": record(caps=AVX2, day=2)}
    root = checkout(tmp_path, **records)
    assert readme_table.main(root, check=True) == "README.md is not what benchmarks/baselines says: make readme-table"
    assert (root / "README.md").read_text() == README
    assert readme_table.main(root, check=False) == ""
    text = (root / "README.md").read_text()
    assert text.startswith("# toy\n\n<!-- measured:begin -->\nMade-up CPU")
    assert text.endswith("`layerzoo bench --json FILE`.\n<!-- measured:end -->\n\nrest\n")
    assert markdown([records["held"], records["later"]]) in text
    assert re.findall(r"`benchmarks/baselines/(\w+)\.json`", text) == ["held", "later"]
    assert readme_table.main(root, check=True) == ""
    (root / "README.md").write_text(text.replace("3x", "4x"), encoding="utf-8")
    assert "is not what" in readme_table.main(root, check=True)


def test_the_tool_needs_records_and_markers(tmp_path):
    root = checkout(tmp_path)
    for check in (True, False):
        assert readme_table.main(root, check).startswith("benchmarks/baselines has no record")
    record().save(root / readme_table.FOLDER / "one.json")
    for text in ("no markers", "<!-- measured:end --> <!-- measured:begin -->"):
        (root / "README.md").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="must have <!-- measured:begin --> and, below it"):
            readme_table.main(root, check=False)
        assert (root / "README.md").read_text() == text
    (root / readme_table.FOLDER / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="must have schema"):
        readme_table.main(root, check=False)


def test_readme_is_what_the_stored_records_give():
    assert readme_table.main(ROOT, check=True) == ""
