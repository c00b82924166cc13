"""tools/gpu_check on machines without a GPU: what it says, and that its cases and calls are right, run on the CPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", TOOLS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_syntax() -> None:
    subprocess.run(["bash", "-n", TOOLS / "gpu_check.sh"], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_fails_and_says_why() -> None:
    done = subprocess.run(
        ["bash", TOOLS / "gpu_check.sh"], env={"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode != 0 and not done.stdout
    assert "sees no CUDA device; nothing was built, checked or timed" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checks(gpu_check: ModuleType, dtype: torch.dtype) -> None:
    assert {op for op, _ in gpu_check.OPS} == set(gpu_check.CASES)
    for op, backward in gpu_check.OPS:
        count, worst = gpu_check.check(op, backward, dtype, "cpu")
        assert count > 1 and 0 < worst <= 1


def test_a_wrong_result_is_seen(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_check.ops.linear_scan
    wrong = lambda a, x, **options: right(a, x, **options) * (1 + 1e-3 * (x.dtype == torch.float32))  # noqa: E731
    monkeypatch.setattr(gpu_check.ops, "linear_scan", wrong)
    with pytest.raises(AssertionError, match=r"linear_scan, torch\.float32: output 0 is off by 1\.0e-03"):
        gpu_check.check("linear_scan", True, torch.float32, "cpu")


def test_what_is_timed_runs(gpu_check: ModuleType) -> None:
    named = []
    for what, ours, others in gpu_check.timings("cpu", torch.float32, scale=64):
        ours()
        named.append(what.split()[0])
        for name in ("torch", "grouped_mm"):
            if others.get(name):
                others[name]()
    assert set(named) == {op for op, _ in gpu_check.OPS}
