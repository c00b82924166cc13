"""The runner on made-up cases of a few numbers, and one tiny run of every real case."""

import gc
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from layerzoo.bench import runner
from layerzoo.bench.case import Candidate, Case, Cost, Target, Work
from layerzoo.bench.cases import all_cases, select
from layerzoo.bench.memory import peak_of
from layerzoo.bench.noise import interval
from layerzoo.bench.report import Report, Result, Row, machine
from layerzoo.bench.settings import Setting, Sweep
from layerzoo.bench.tables import tables


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


def absent(x: Tensor, theirs: object = None) -> Work:
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
    return runner.run_case(case, seconds=0.01, **options)


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
    text = printed(Report(machine(), [result]))
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


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        ("no_such_package.inside:thing", "No module named 'no_such_package'"),
        ("math:no.such", "math has no no.such"),
    ],
)
def test_a_peer_whose_import_string_names_nothing_is_absent(needs, reason):
    peer = Candidate("theirs", lambda x, theirs: right(x), needs)
    row = measured(case(peers=(peer,))).rows[1]
    assert (row.status, row.reason) == ("absent", reason)


def test_a_peer_gets_what_its_import_string_names():
    peer = Candidate("theirs", lambda x, multiply: Work(lambda: multiply(x, 2)), "torch:mul")
    assert measured(case(peers=(peer,))).rows[1].status == "ok"


def test_calls_are_interleaved_without_garbage_collection(monkeypatch):
    monkeypatch.setattr(runner, "SAMPLE", 0.0)
    order: list[str] = []

    def call(name: str):
        order.append(name)
        assert not gc.isenabled()

    samples = ([], [], [])
    calls = [lambda: call("A"), lambda: call("B"), lambda: call("C")]
    runner.interleave(calls, samples, seconds=0, rounds=(4, 9))
    assert "".join(order) == "ABC" + "ABC" + "BCA" + "CAB" + "ABC"  # once to find the length of a sample
    assert [len(kept) for kept in samples] == [4, 4, 4]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        runner.interleave([lambda: 1 // 0], [[]], seconds=0)
    assert gc.isenabled()


def test_bounds_of_a_median_hold_in_19_of_20_cases():
    generator = torch.Generator().manual_seed(0)
    for n in (6, 7, 40):
        samples = torch.empty(2000, n).exponential_(generator=generator)  # its median is ln 2
        inside = [found.low <= 0.6931 <= found.high for found in map(interval, samples.tolist())]
        assert sum(inside) / len(inside) >= 0.94, n
    assert interval([1.0, 2.0, 3.0, 4.0, 5.0])[1:] == (0.0, float("inf"))  # of five none can be that sure


@pytest.mark.parametrize(
    ("theirs", "verdict"), [(2.0, "faster"), (0.5, "slower"), (1.0, "within the noise"), (1.001, "within the noise")]
)
def test_nobody_wins_within_the_noise(theirs, verdict):
    noise = [1.0, 1.02, 0.97, 1.01, 0.99, 1.03, 0.98, 1.0]
    ours, peer = Row("ours", samples=noise), Row("peer", samples=[theirs * x for x in reversed(noise)])
    result = Result("toy.double", "", "forward", {}, [ours, peer])
    found = result.ratio(peer)
    assert found.verdict == verdict
    assert found.median == pytest.approx(theirs, rel=0.03)
    assert verdict in printed(Report(machine(), [result]))


def test_what_slows_the_whole_machine_down_cancels_out():
    drift = [1.0, 5.0, 2.0, 9.0, 1.0, 3.0, 7.0]
    ours, peer = Row("ours", samples=drift), Row("peer", samples=[1.5 * x for x in drift])
    assert Result("toy.double", "", "forward", {}, [ours, peer]).ratio(peer) == (1.5, 1.5, 1.5)


def test_figures_of_a_result():
    ours, peer = Row("ours", samples=[1.0, 1.2, 50.0], memory=750.0), Row("peer", "once", samples=[3.6])
    result = Result("toy.double", "", "forward", {}, [ours, peer, Row("gone", "absent")], elements=600_000_000)
    assert result.metrics() == pytest.approx({"ns/element": 2.0, "x peer": 3.0, "µs/call": 1.2e6})
    decode = replace(result, elements=None, tokens=6, inputs=300, limit=0.3, bound="memory")
    assert decode.metrics() == pytest.approx(
        {"tokens/s": 5.0, "memory / inputs": 2.5, "x peer": 3.0, "share of the limit": 0.25, "µs/call": 1.2e6}
    )
    assert Target("x peer", at_least=3).met(3.0)
    assert not Target("x peer", at_least=3).met(2.9)
    assert not Target("ns/element", at_most=1.9).met(2.0)


def test_targets_and_the_limit_are_printed():
    result = Result("toy.double", "", "decode", {}, [Row("ours", samples=[1.0])], tokens=6, limit=0.5, bound="memory")
    result.targets = [Target("tokens/s", at_least=5), Target("tokens/s", at_least=7), Target("x peer", at_least=2)]
    lines = [" ".join(line.split()) for line in printed(Report(machine(), [result])).splitlines()]
    assert "limit: 500 ms by memory; layerzoo reaches 50% of it" in lines
    assert "toy.double/decode tokens/s 6 >= 5 met" in lines
    assert "toy.double/decode tokens/s 6 >= 7 missed" in lines
    assert "toy.double/decode x peer - >= 2" in lines


def test_the_limit_of_a_case_with_a_cost(monkeypatch):
    monkeypatch.setattr(runner, "limits", lambda cost, dtype, threads: (cost.read * 1e-9, "memory"))
    result = measured(case(right, cost=lambda shape, x: Cost(read=x.nbytes, flops=shape["n"])))
    assert (result.limit, result.bound, result.cost) == (pytest.approx(200e-9), "memory", Cost(read=200, flops=50))
    monkeypatch.setattr(runner, "limits", lambda cost, dtype, threads: None)
    assert measured(case(cost=lambda shape, x: Cost(read=1))).limit is None


def test_json_keeps_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    target = Target("ns/element", at_most=1e9)
    one = measured(case(right, wrong, elements=("n",), targets=(target,), cost=lambda shape, x: Cost(read=x.nbytes)))
    report = Report(machine(), [one], interrupted=True, problems=["a plugin"])
    path = tmp_path / "bench.json"
    report.save(path)
    assert Report.load(path) == report
    assert report.machine["caps"]["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"
    assert {"torch", "cpu", "isa", "commit", "installed_bytes"} <= report.machine.keys()
    path.write_text(path.read_text().replace('"schema": 2', '"schema": 0'))
    with pytest.raises(ValueError, match="must have schema 2, got 0: measure again"):
        Report.load(path)
    for text in ("[]", "no JSON"):
        path.write_text(text)
        with pytest.raises(ValueError, match="must be a file that --json wrote"):
            Report.load(path)


def use(monkeypatch, *cases: Case) -> None:
    monkeypatch.setattr(runner, "select", lambda pattern: (list(cases), []))


def test_ctrl_c_keeps_what_there_is(monkeypatch):
    calls = iter(range(20))

    def interrupted(x: Tensor) -> Work:
        def call() -> Tensor:
            if next(calls) == 15:
                raise KeyboardInterrupt
            return x * 2

        return Work(call)

    use(monkeypatch, case(right), case(interrupted, name="toy.stopped"), case(name="toy.never"))
    monkeypatch.setattr(runner, "SAMPLE", 0.0)
    report = runner.run("toy.*", threads=[1])
    assert report.interrupted
    assert [result.name for result in report.results] == ["toy.double", "toy.stopped"]
    assert len(report.results[1].rows[1].samples) == 12  # after check, first run and the length of a sample
    assert "with the bounds of 95 % confidence, interrupted" in printed(report)


def test_threads_types_and_sizes_in_turn(monkeypatch):
    use(monkeypatch, case(right, dtypes=("float32", "float64")), case(name="toy.other"))
    monkeypatch.setattr(runner, "SAMPLE", 0.0)
    sweep = Sweep.parse("n=2:8:x2")
    report = runner.run(threads=[1, 2], dtypes=["float64"], sweep=sweep, seconds=0.01)
    seen = [(r.name, r.threads, r.dtype, r.shape["n"], r.swept) for r in report.results]
    assert seen == [("toy.double", threads, "float64", n, "n") for threads in (1, 2) for n in (2, 4, 8)]
    assert report.ok
    with pytest.raises(ValueError, match="no case of 'toy' has a size m, cpu; their sizes are n"):
        runner.run("toy", sweep=Sweep.parse("m=1,2"))
    with pytest.raises(ValueError, match="has float16, cpu"):
        runner.run("toy", dtypes=["float16"])


@pytest.mark.parametrize(
    ("text", "values"),
    [("L=256:65536:x4", (256, 1024, 4096, 16384, 65536)), ("L=64:200:+64", (64, 128, 192)), ("L=7,1", (7, 1))],
)
def test_sweeps(text, values):
    assert Sweep.parse(text) == Sweep("L", values)


@pytest.mark.parametrize(
    "text", ["L", "L=", "L=0", "L=4:2:x2", "L=1:9:x1", "L=1:9:+0", "L=0:9:x2", "L=1:9999:+1", "L=-1", "L=1:8:2", "=3"]
)
def test_a_wrong_sweep_is_named(text):
    with pytest.raises(ValueError, match="sweep must") as caught:
        Sweep.parse(text)
    assert repr(text) in str(caught.value)


def test_a_sweep_leaves_out_what_would_take_minutes_or_failed_before(monkeypatch):
    monkeypatch.setattr(runner, "MINUTE", 0.0)
    results: list[Result] = []
    for n in (10, 20):
        setting = Setting({"n": n}, "float32", swept="n")
        runner.run_case(case(right, crashing), setting, results, seconds=0.01)
    assert statuses(results[1]) == {"ours": "skipped", "right": "skipped", "crashing": "skipped"}
    assert [row.reason for row in results[1].rows[1:]] == ["would take about 0 s: only in a full run", "failed at n10"]


def test_a_size_that_does_not_fit_fails_alone():
    def picky(x: Tensor) -> Work:
        if len(x) > 10:
            raise ValueError("n must be at most 10, got 50")
        return right(x)

    result = measured(case(right, ours=picky))
    assert statuses(result) == {"ours": "failed", "right": "ok"}
    assert result.ours.reason == "ValueError: n must be at most 10, got 50"
    assert not Report({}, [result]).ok


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is capped on Linux only")
def test_a_call_that_wants_too_much_memory_fails_alone(monkeypatch):
    def greedy(x: Tensor) -> Work:
        return Work(lambda: torch.empty(2**46, dtype=torch.uint8)[:1] if len(x) > 10 else x * 2)

    use(monkeypatch, case(greedy, right))
    report = runner.run(threads=[1], seconds=0.01)
    assert statuses(report.results[0]) == {"ours": "ok", "greedy": "failed", "right": "ok"}


def test_bad_arguments_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"pattern must match a case, got 'nothing'; there are .*ssm.selective_scan"):
        runner.run("nothing")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        runner.run(threads=[0])
    with pytest.raises(ValueError, match=r"dtype must be one of float64, .*got 'int8'"):
        runner.run(dtypes=["int8"])
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'tpu'"):
        runner.run(device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device cuda is absent: torch .* sees no GPU"):
        runner.run(device="cuda")


def test_patterns_match_names_and_ids():
    assert len(select("ssm.selective_scan")[0]) == 4
    assert [case.direction for case in select("ssm.selective_scan/time-last/forward")[0]] == ["forward"]
    assert select("*") == all_cases()
    both = select("ssm.linear_scan/time-last/*,ssm.causal_conv1d/*/forward,ssm.*_conv1d/time-last")[0]
    assert [(case.name, case.variant, case.direction) for case in both] == [
        ("ssm.causal_conv1d", "time-last", "forward"),
        ("ssm.causal_conv1d", "time-last", "forward+backward"),
        ("ssm.causal_conv1d", "channel-last", "forward"),
        ("ssm.linear_scan", "time-last", "forward"),
        ("ssm.linear_scan", "time-last", "forward+backward"),
    ]
    with pytest.raises(ValueError, match="pattern must match a case, got 'nothing'"):
        select("ssm.linear_scan,nothing")


def test_cases_are_data():
    cases, problems = all_cases()
    assert not problems
    assert len({case.id for case in cases}) == len(cases)
    for each in cases:
        assert each.check.keys() == each.shape.keys(), each.id


def repeated(x: Tensor) -> Work:
    leaf = x.clone().requires_grad_()
    return Work(lambda: leaf.repeat(4)[:1], {"x": leaf})


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux only")
def test_peak_memory_counts_what_a_call_takes():
    kept, taken = peak_of(lambda: torch.ones(5_000_000).repeat(4)[:1].clone(), "cpu")
    assert taken == pytest.approx(5 * 20e6, rel=0.1)  # the ones, and four times them
    assert kept.item() == 1
    result = measured(case(ours=repeated, reference=Candidate("reference", repeated), shape={"n": 5_000_000}))
    assert result.metrics()["memory / inputs"] == pytest.approx(4, rel=0.1)


def printed(report: Report) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(tables(report))
    return console.export_text()
