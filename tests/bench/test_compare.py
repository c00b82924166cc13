"""Two hand-made records against each other."""

import io
import json
import math

import pytest
from rich.console import Console

from layerzoo.bench.compare import Comparison, compare
from layerzoo.bench.report import Report, Result, Row

HERE = {"cpu": "A", "cores": 2, "isa": "avx2", "caps": {"LAYERZOO_CPU": None}, "torch": "2.14", "commit": "abc"}
SPREAD = (0.99, 0.995, 1.0, 1.0, 1.005, 1.01, 1.0)  # of seven samples the bounds are the least and the greatest


def row(name: str = "layerzoo", median: float = 1.0, spread=SPREAD, **rest) -> Row:
    return Row(name, samples=[median * factor for factor in spread], **rest)


def result(*rows: Row, name: str = "toy.double", threads: int = 1, **rest) -> Result:
    return Result(name, "", "forward", {"n": 5}, list(rows), threads=threads, **rest)


def report(*results: Result, **machine) -> Report:
    return Report(HERE | machine, list(results))


def printed(comparison: Comparison) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(comparison)
    return console.export_text()


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (row(median=1.2), "slower"),
        (row(median=0.8), "faster"),
        (row(median=1.001), "within the noise"),
        (row(median=1.045), "within the noise"),  # the bounds are apart, but the floor is 5 %
        (row(median=0.955), "within the noise"),
        (row(median=1.2, spread=(0.8, 0.9, 1, 1, 1, 1.1, 1.2)), "within the noise"),  # the bounds overlap
        (row(median=2.0, spread=(1,), status="once"), "too few samples"),
        (Row("layerzoo", "wrong", "output differs"), "worse"),
        (Row("layerzoo", "failed", "RuntimeError: no"), "worse"),
        (Row("layerzoo", "absent", "No module named 'x'"), "not timed"),
        (Row("layerzoo"), "not timed"),  # an interruption
    ],
)
def test_verdicts(after, verdict):
    comparison = compare(report(result(row())), report(result(after)))
    (change,) = comparison.rows
    assert change.verdict == verdict
    assert comparison.ok == (verdict not in ("slower", "worse"))
    assert comparison.regressions == ([] if comparison.ok else [change])
    assert f"{verdict}: {after.status}" in printed(comparison) or after.status in ("ok", "once", "absent")
    assert after.reason in printed(comparison)


def test_the_change_is_the_time_after_over_the_time_before_with_bounds():
    (change,) = compare(report(result(row())), report(result(row(median=1.2)))).rows
    assert change.times == pytest.approx((1.2, 1.2 * 0.99 / 1.01, 1.2 * 1.01 / 0.99))
    assert change.figures == pytest.approx((1.0, 1.2))
    assert "+20.0% (+17.6% to +22.4%)" in printed(Comparison("", [change]))


def test_what_was_wrong_and_is_right_is_no_regression():
    for before in (Row("layerzoo", "wrong", "output differs"), Row("layerzoo", "failed", "no")):
        comparison = compare(report(result(before)), report(result(row())))
        assert [change.verdict for change in comparison.rows] == ["works now"]
        assert comparison.ok
    still = Row("layerzoo", "wrong", "output differs")
    comparison = compare(report(result(still)), report(result(still)))
    assert [change.verdict for change in comparison.rows] == ["not timed"]


def test_what_is_on_one_side_only_is_listed():
    before = report(result(row(), name="toy.old"), result(row(), name="toy.kept"))
    after = report(
        result(row(), name="toy.kept"), result(Row("layerzoo", "failed", "ZeroDivisionError"), name="toy.new")
    )
    comparison = compare(before, after)
    assert {change.case.split("/")[0]: change.verdict for change in comparison.rows} == {
        "toy.kept": "within the noise",
        "toy.old": "gone",
        "toy.new": "new",
    }
    assert comparison.ok
    assert "new: failed, ZeroDivisionError" in printed(comparison)


def test_other_sizes_types_and_devices_are_other_results():
    before = report(result(row()))
    for changes in ({"dtype": "bfloat16"}, {"device": "cuda"}):
        comparison = compare(before, report(result(row(), **changes)))
        assert {change.verdict for change in comparison.rows} == {"gone", "new"}


@pytest.mark.parametrize("fact", ["cpu", "cores", "isa", "caps", "torch", "threads"])
def test_ratios_are_compared_where_times_cannot_be(fact):
    """Ours took a fifth of the peer, and now a fourth: slower, though the other machine is twice as fast."""
    before = report(result(row(), row("absent here", 9.0), row("peer", 5.0), row("other", 2.0)))
    rows = (row(median=0.5), Row("absent here", "absent"), row("peer", 2.0), row("other", 9.0))
    threads = 2 if fact == "threads" else 1
    after = report(result(*rows, threads=threads), **({} if fact == "threads" else {fact: "another"}))
    comparison = compare(before, after)
    (change,) = comparison.rows
    assert (change.verdict, change.peer) == ("slower", "peer")
    assert change.figures == pytest.approx((5.0, 4.0))
    assert change.times is not None
    assert change.times.median == pytest.approx(1.25)
    assert not comparison.ok
    text = " ".join(printed(comparison).split())
    assert f"ratios to a peer, since times cannot be compared where these differ: {fact}" in text
    assert "5x peer 4x peer +25.0%" in text


def test_without_a_common_peer_nothing_can_be_said():
    comparison = compare(report(result(row(), row("peer"))), report(result(row(median=9), row("other")), cpu="B"))
    (change,) = comparison.rows
    assert change.verdict == "cannot be compared"
    assert "no peer was timed on both sides, and these differ: cpu" in printed(comparison)
    assert comparison.ok
    broken = Row("layerzoo", "wrong", "output differs")  # but whether a result is right does not depend on the machine
    assert not compare(report(result(row())), report(result(broken), cpu="B")).ok


def test_threads_are_only_ignored_where_that_leaves_no_choice():
    before = report(result(row(), threads=1), result(row(), threads=2))
    comparison = compare(before, report(result(row(), threads=4)))
    assert sorted(change.verdict for change in comparison.rows) == ["gone", "gone", "new"]
    comparison = compare(before, report(result(row(median=2.0), threads=2), result(row(), threads=4)))
    assert [(change.verdict, change.case) for change in comparison.rows] == [
        ("slower", "toy.double/forward n5 float32 cpu 2 threads"),
        ("cannot be compared", "toy.double/forward n5 float32 cpu 4 threads (before: 1)"),
    ]


def test_a_gpu_matters_to_what_ran_on_it():
    before, after = report(result(row())), report(result(row(median=2)), gpu="H")
    assert compare(before, after).rows[0].verdict == "slower"
    before, after = report(result(row(), device="cuda")), report(result(row(median=2), device="cuda"), gpu="H")
    assert compare(before, after).rows[0].verdict == "cannot be compared"


def test_the_worst_comes_first():
    names = ("a", "b", "c", "d", "e")
    before = report(*(result(row(), name=f"toy.{name}") for name in names))
    after = report(
        result(row(median=0.5), name="toy.a"),
        result(row(median=1.5), name="toy.b"),
        result(Row("layerzoo", "wrong"), name="toy.c"),
        result(Row("layerzoo", "absent"), name="toy.d"),
        result(row(median=3.0), name="toy.e"),
    )
    assert "".join(change.case[4] for change in compare(before, after).rows) == "cebad"


def test_json_has_no_infinity_and_what_could_not_be_measured_is_told():
    before, after = report(result(row(spread=(1, 1)))), report(result(row(spread=(1, 1))))
    after.problems, before.interrupted = ["the cases of plugin mine: [broken]"], True
    comparison = compare(before, after)
    assert comparison.ok  # as of a report: what a plugin could not add is told, and is no regression
    assert "the cases of plugin mine: [broken]" in printed(comparison)
    assert "against abc, interrupted" in printed(comparison)
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert (data["ok"], data["interrupted"], data["problems"]) == (True, True, after.problems)
    assert data["rows"][0]["change"] == {"median": 1.0, "low": None, "high": None}
    assert data["rows"][0]["before"]["samples"] == [1, 1]
    change = comparison.rows[0]
    assert change.gain is not None
    assert (change.gain.low, change.gain.high) == (0, math.inf)
