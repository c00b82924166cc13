"""`pytest benchmarks/`: the cases through pytest-benchmark, one test for each candidate, grouped by case.

`layerzoo bench` measures the same cases in turn, which pytest-benchmark cannot: it is here for what it adds, storage,
`--benchmark-compare` and histograms. Every candidate is held to the reference before it is timed, and with
`--benchmark-disable` that is all.
"""

from dataclasses import replace

import pytest
import torch

from layerzoo.bench.cases import all_cases
from layerzoo.bench.runner import inputs_of, run_case
from layerzoo.bench.settings import Setting

PAIRS = [(case, candidate) for case in all_cases()[0] for candidate in (case.ours, *case.peers)]


@pytest.mark.parametrize(("case", "candidate"), PAIRS, ids=[f"{case.id}/{candidate.name}" for case, candidate in PAIRS])
def test_case(case, candidate, benchmark):
    if candidate.full:
        pytest.skip("takes minutes: layerzoo bench --full measures it")
    row = run_case(replace(case, ours=candidate, peers=()), smoke=True).ours
    if row.status == "absent":
        pytest.skip(row.reason)
    assert row.status == "ok", row.reason
    shape = case.check if benchmark.disabled else case.shape
    benchmark.group = " ".join((case.id, *(f"{size}{value}" for size, value in shape.items())))
    benchmark.extra_info.update(case=case.id, candidate=candidate.name, agreement=row.reason, **shape)
    setting = Setting(shape, case.dtypes[0], threads=torch.get_num_threads())
    benchmark(candidate.start(inputs_of(case, shape, setting)).run, case.direction)
