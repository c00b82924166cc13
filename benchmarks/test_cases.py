"""`pytest benchmarks/`: our side of the cases through pytest-benchmark; `layerzoo bench` measures the peers too."""

import pytest

from layerzoo.bench.runner import run_case, select

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")


@pytest.mark.parametrize("case", select("*"), ids=lambda case: case.id)
def test_ours(case, benchmark):
    ours = run_case(case, [], peers=False, smoke=True).rows[0]
    if ours.status == "absent":
        pytest.skip(ours.reason)
    assert ours.status == "ok", ours.reason
    work = case.ours.build(case.inputs(case.shape))
    benchmark(work.run, case.direction)
