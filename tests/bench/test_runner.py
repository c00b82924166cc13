"""The runner on made-up cases of a few numbers, and one tiny run of every real case."""

import gc
import io
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from layerzoo.bench import runner
from layerzoo.bench.case import Candidate, Case, Target, Work
from layerzoo.bench.cases import all_cases
from layerzoo.bench.report import Report, Result, Row, machine

# Module-level functions, since cases are pickled for the process that measures memory.


def numbers(shape) -> Tensor:
    return torch.arange(1.0, shape["n"] + 1)


def doubled(x: Tensor, factor: float = 2.0) -> Work:
    leaf = x.clone().requires_grad_()
    return Work(lambda: leaf * factor, {"x": leaf}, torch.ones_like(x))


def right(x: Tensor) -> Work:
    return doubled(x)


def wrong(x: Tensor) -> Work:
    return doubled(x, 2.01)


def wrong_when_large(x: Tensor) -> Work:
    return doubled(x, 2.0 if len(x) < 10 else 2.01)


def wrong_gradient(x: Tensor) -> Work:
    leaf = x.clone().requires_grad_()
    return Work(lambda: leaf * 1.5 + leaf.detach() * 0.5, {"x": leaf}, torch.ones_like(x))


def not_a_number(x: Tensor) -> Work:
    return doubled(x, float("nan"))


def too_short(x: Tensor) -> Work:
    return Work(lambda: x[1:] * 2)


def absent(x: Tensor) -> Work:
    raise ImportError("No module named 'their_package'")


def crashing(x: Tensor) -> Work:
    return Work(lambda: torch.zeros(2) @ torch.zeros(3))


def case(*peers, ours=right, **changes) -> Case:
    fields = {
        "name": "toy.double",
        "variant": "",
        "direction": "forward",
        "shape": {"n": 50},
        "check": {"n": 5},
        "inputs": numbers,
        "ours": Candidate("ours", ours),
        "reference": Candidate("reference", right),
        "peers": tuple(Candidate(peer.__name__, peer) for peer in peers),
    }
    return Case(**fields | changes)


def measured(case: Case, **options) -> Result:
    return runner.run_case(case, [], seconds=0.01, **options)


def statuses(result: Result) -> dict[str, str]:
    return {row.name: row.status for row in result.rows}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("candidate", "direction", "reason"),
    [
        (wrong, "forward", "output differs by 5.0e-03, allowed 3e-05"),
        (wrong_when_large, "forward", "output differs by 5.0e-03 from right at full size, allowed 3e-05"),
        (wrong_gradient, "forward+backward", "gradient of x differs by 2.5e-01, allowed 3e-05"),
        (not_a_number, "forward", "output differs by nan, allowed 3e-05"),
        (too_short, "forward", "output differs by inf, allowed 3e-05"),
    ],
)
@pytest.mark.parametrize("role", ["ours", "peer"])
def test_a_wrong_candidate_is_shown_and_not_timed(role, candidate, direction, reason):
    if role == "ours":
        result = measured(case(right, ours=candidate, direction=direction))
        suspect, other = result.rows
    else:
        result = measured(case(right, candidate, direction=direction))
        _, other, suspect = result.rows
    assert (suspect.status, suspect.reason, suspect.samples) == ("wrong", reason, [])
    assert result.ratio(suspect) is None
    assert other.status == "ok"
    assert len(other.samples) >= runner.ROUNDS[0]
    assert not Report({}, [result]).ok


def test_absent_and_crashing_peers_are_shown_with_the_reason():
    result = measured(case(absent, crashing, right))
    assert statuses(result) == {"ours": "ok", "absent": "absent", "crashing": "failed", "right": "ok"}
    text = printed(Report(machine(1), [result]))
    assert "absent: absent, No module named 'their_package'" in text
    assert "crashing: failed, RuntimeError: " in text
    assert Report({}, [measured(case(absent))]).ok  # absence is no fault


def test_inputs_that_need_an_absent_host_make_the_whole_case_absent():
    result = measured(case(right, inputs=absent))
    assert statuses(result) == {"ours": "absent", "right": "absent"}


def test_slow_peers_run_once_and_those_of_minutes_on_demand(monkeypatch):
    monkeypatch.setattr(runner, "SLOW", 0.0)
    slow = case(peers=(Candidate("minutes", right, full=True),))
    result = measured(slow)
    assert statuses(result) == {"ours": "once", "minutes": "skipped"}
    assert len(result.rows[0].samples) == 1
    assert statuses(measured(slow, full=True)) == {"ours": "once", "minutes": "once"}
    assert statuses(measured(slow, peers=False)) == {"ours": "once"}


def test_calls_are_interleaved_without_garbage_collection(monkeypatch):
    monkeypatch.setattr(runner, "SAMPLE", 0.0)
    order: list[str] = []

    def call(name: str):
        order.append(name)
        assert not gc.isenabled()

    samples = ([], [])
    calls = [lambda: call("A"), lambda: call("B")]
    runner.interleave(calls, samples, seconds=0, rounds=(3, 9))
    assert "".join(order) == "AB" * 4  # once to find the length of a sample
    assert [len(kept) for kept in samples] == [3, 3]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        runner.interleave([lambda: 1 // 0], [[]], seconds=0)
    assert gc.isenabled()


def test_figures_come_from_medians():
    ours, peer = Row("ours", samples=[1.0, 1.2, 50.0]), Row("peer", samples=[3.6, 3.0, 90.0])
    result = Result("toy.double", "", "forward", {}, [ours, peer, Row("gone", "absent")], elements=600_000_000)
    assert result.ratio(peer) == pytest.approx(3.0)
    assert ours.spread == pytest.approx(24.5)
    assert result.metrics() == pytest.approx({"ns/element": 2.0, "x peer": 3.0})
    decode = replace(result, elements=None, tokens=6, bytes=300, bandwidth=1000.0, memory=2.5)
    assert decode.metrics() == pytest.approx(
        {"tokens/s": 5.0, "memory / inputs": 2.5, "x peer": 3.0, "share of the read limit": 0.25}
    )
    assert Target("x peer", at_least=3).met(3.0)
    assert not Target("x peer", at_least=3).met(2.9)
    assert not Target("ns/element", at_most=1.9).met(2.0)


def test_targets_and_the_limit_are_printed():
    result = Result("toy.double", "", "decode", {}, [Row("ours", samples=[1.0])], tokens=6, bytes=3, bandwidth=6.0)
    result.targets = [Target("tokens/s", at_least=5), Target("tokens/s", at_least=7), Target("x peer", at_least=2)]
    lines = [" ".join(line.split()) for line in printed(Report(machine(1), [result])).splitlines()]
    assert "limit: 12.0 tok/s, when only the weights are read, at 0.0 GB/s" in lines
    assert "toy.double/decode tokens/s 6 >= 5 met" in lines
    assert "toy.double/decode tokens/s 6 >= 7 missed" in lines
    assert "toy.double/decode x peer - >= 2" in lines


def test_json_keeps_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    target = Target("ns/element", at_most=1e9)
    report = Report(machine(3), [measured(case(right, wrong, elements=("n",), targets=(target,)))], interrupted=True)
    path = tmp_path / "bench.json"
    report.save(path)
    assert Report.load(path) == report
    assert report.machine["caps"]["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert {"torch", "cpu", "isa", "threads"} <= report.machine.keys()
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0'))
    with pytest.raises(ValueError, match="must have schema 1, got 0"):
        Report.load(path)


def test_ctrl_c_keeps_what_there_is(tmp_path, monkeypatch, capsys):
    calls = iter(range(20))

    def interrupted(x: Tensor) -> Work:
        def call() -> Tensor:
            if next(calls) == 15:
                raise KeyboardInterrupt
            return x * 2

        return Work(call)

    cases = [case(right), case(interrupted, name="toy.stopped"), case(name="toy.never")]
    monkeypatch.setattr(runner, "all_cases", lambda: cases)
    monkeypatch.setattr(runner, "SAMPLE", 0.0)
    path = tmp_path / "bench.json"
    report = runner.run("toy.*", threads=1, json_path=path, html_path=tmp_path / "bench.html")
    assert report.interrupted
    assert [result.name for result in report.results] == ["toy.double", "toy.stopped"]
    assert len(report.results[1].rows[1].samples) == 12  # after check, first run and the length of a sample
    assert Report.load(path) == report
    assert "toy.stopped" in (tmp_path / "bench.html").read_text()
    assert "medians of interleaved runs, interrupted" in capsys.readouterr().out


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"pattern must match a case, got 'nothing'; there are .*ssm.selective_scan"):
        runner.run("nothing")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        runner.run(threads=0)
    with pytest.raises(ValueError, match="must be in a folder that exists"):
        runner.run(json_path=tmp_path / "no" / "bench.json")


def test_patterns_match_names_and_ids():
    assert len(runner.select("ssm.selective_scan")) == 4
    assert [case.direction for case in runner.select("ssm.selective_scan/time-last/forward")] == ["forward"]
    assert runner.select("*") == all_cases()


def test_cases_are_data():
    cases = all_cases()
    assert [case.id for case in pickle.loads(pickle.dumps(cases))] == [case.id for case in cases]
    for each in cases:
        assert each.check.keys() == each.shape.keys(), each.id


def repeated(x: Tensor) -> Work:
    leaf = x.clone().requires_grad_()
    return Work(lambda: leaf.repeat(4)[:1], {"x": leaf})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_peak_memory_counts_what_a_call_takes():
    assert runner.peak_memory(case(ours=repeated, shape={"n": 5_000_000})) == pytest.approx(4, rel=0.1)


def test_every_case_is_right_at_its_small_shape(capsys):
    report = runner.run(smoke=True, threads=1)
    assert len(report.results) == len(all_cases())
    for result in report.results:
        for row in result.rows:
            assert row.status in ("ok", "absent"), f"{result.id} {row.name}: {row.reason}"
            assert not row.samples
            assert row.reason
    assert "agrees to" in capsys.readouterr().out


def printed(report: Report) -> str:
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(report)
    return console.export_text()
