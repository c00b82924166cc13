"""Which kernels run: LAYERZOO_NATIVE, LAYERZOO_CPU, packages that lack a library. Each case is a process of its own.

Run as a script, this file computes every op and saves the results, which the tests then compare.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ssm.inputs import conv_arguments, leaves, scan_arguments
from ssm.oracle import TOLERANCE, assert_close
from torch import Tensor

import layerzoo
from layerzoo import _native

OPS = ("selective_scan", "causal_conv1d", "selective_state_update", "causal_conv1d_update")
WITH_GRADIENT = OPS[:2]
PACKAGE = Path(layerzoo.__file__).parent


def results() -> dict[str, Tensor]:
    """Outputs, gradients and changed states of every op."""
    from layerzoo.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update

    scan, conv = scan_arguments(2, 37, 70, 5), conv_arguments(2, 37, 70, 4)
    state, conv_state = scan["initial_state"].clone(), conv["initial_states"].clone()
    step = [scan[name][..., 0].clone() for name in ("u", "delta")]
    B, C, z = (scan[name][..., 0].clone() for name in ("B", "C", "z"))
    rest = (scan["A"].clone(), B, C, scan["D"].clone(), z, scan["delta_bias"].clone(), True)
    found = {
        "selective_state_update": selective_state_update(state, *step, *rest),
        "causal_conv1d_update": causal_conv1d_update(step[0], conv_state, conv["weight"], conv["bias"], "silu"),
        "state": state,
        "conv_state": conv_state,
    }
    for op, arguments in ((selective_scan, scan), (causal_conv1d, conv)):
        inputs = leaves(arguments)
        out = op(**arguments)
        grads = torch.autograd.grad(out.square().sum(), list(inputs.values()))
        found[op.__name__] = out.detach()
        found |= {f"{op.__name__}: gradient of {name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return found


def calls() -> dict[str, int]:
    return {op: _native.calls(op) for op in OPS}


def computed(python: Any, tmp_path: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """What `status` and `calls` say in a process with this environment, whose results must be ours; and its stderr."""
    path = tmp_path / "results.pt"
    done = python("-W", "always", __file__, str(path), **environment)
    assert done.returncode == 0, done.stderr
    ours = results()
    for name, theirs in torch.load(path).items():
        assert_close(name, theirs, ours[name], TOLERANCE[torch.float32])
    return json.loads(done.stdout), done.stderr


def warned(stderr: str, reason: str) -> list[str]:
    """The ops that said that they run in plain PyTorch for this reason."""
    middle = f" runs in plain PyTorch, which is slow: {reason}"
    lines = [line for line in stderr.splitlines() if "RuntimeWarning: layerzoo: " in line]
    assert all(middle in line for line in lines), lines
    return [line.partition("RuntimeWarning: layerzoo: ")[2].partition(middle)[0] for line in lines]


def test_without_native_kernels_each_op_warns_once_and_is_right(python: Any, tmp_path: Path) -> None:
    status, stderr = computed(python, tmp_path, LAYERZOO_NATIVE="0")
    assert (status["loaded"], status["isa"], status["calls"]) == (False, "none", dict.fromkeys(OPS, 0))
    assert sorted(warned(stderr, "LAYERZOO_NATIVE=0")) == sorted([*OPS, *(f"{op}_backward" for op in WITH_GRADIENT)])


@pytest.mark.native
@pytest.mark.parametrize("isa", _native.SETS)
def test_each_set_of_this_machine(isa: str, python: Any, tmp_path: Path) -> None:
    if isa not in _native.status().available:
        done = python("-c", "import layerzoo.ops", LAYERZOO_CPU=isa)
        assert done.returncode != 0
        assert f"ValueError: LAYERZOO_CPU={isa}: " in done.stderr
        return
    status, stderr = computed(python, tmp_path, LAYERZOO_CPU=isa, LAYERZOO_NATIVE="require")
    assert (status["loaded"], status["isa"], status["calls"]) == (True, isa, dict.fromkeys(OPS, 2))
    assert not warned(stderr, "")


@pytest.mark.native
def test_this_process_runs_the_best_set() -> None:
    status = _native.status()
    if _native.env.cpu() is None:
        assert status.isa == status.available[-1]
    before = calls()
    results()
    assert calls() == {op: count + 1 for op, count in before.items()}


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [("LAYERZOO_CPU", "sse9", "default, avx2, avx512"), ("LAYERZOO_NATIVE", "maybe", "auto, 0, require")],
)
def test_an_unknown_value_is_an_error(variable: str, value: str, allowed: str, python: Any) -> None:
    done = python("-c", "import layerzoo.ops", **{variable: value})
    assert done.returncode != 0
    assert f"ValueError: {variable} must be one of " in done.stderr
    assert f"{allowed}, got {value!r}" in done.stderr


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package without native libraries, to be put on PYTHONPATH."""
    shutil.copytree(PACKAGE, tmp_path / "layerzoo", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def test_a_package_without_libraries(package: Path, python: Any, tmp_path: Path) -> None:
    status, stderr = computed(python, tmp_path, PYTHONPATH=str(package))
    assert not status["loaded"]
    assert "_ops.so was not built" in status["reason"]
    assert set(warned(stderr, status["reason"])) > set(OPS)
    done = python("-c", "import layerzoo.ops", PYTHONPATH=str(package), LAYERZOO_NATIVE="require")
    assert done.returncode != 0
    assert f"ImportError: LAYERZOO_NATIVE=require, but {status['reason']}" in done.stderr


def test_a_library_that_does_not_load(package: Path, python: Any) -> None:
    (package / "layerzoo" / "_ops.so").write_bytes(b"no library")
    code = "from layerzoo import _native; print(_native.status().reason)"
    done = python("-c", code, PYTHONPATH=str(package))
    assert done.returncode == 0, done.stderr
    assert f"_ops.so does not load with torch {torch.__version__}: " in done.stdout


@pytest.mark.native
def test_sets_that_are_missing(package: Path, python: Any, tmp_path: Path) -> None:
    for name in ("_ops.so", "_cpu_default.so"):
        shutil.copy(PACKAGE / name, package / "layerzoo")
    status, _ = computed(python, tmp_path, PYTHONPATH=str(package))
    assert (status["loaded"], status["isa"], status["available"]) == (True, "default", ["default"])
    (package / "layerzoo" / "_cpu_default.so").unlink()
    code = "from layerzoo import _native; print(_native.status().reason)"
    done = python("-c", code, PYTHONPATH=str(package))
    assert "no kernels: " in done.stdout
    assert "_cpu_default.so" in done.stdout


if __name__ == "__main__":
    results()
    torch.save(results(), sys.argv[1])
    found = _native.status()
    print(
        json.dumps(
            {name: getattr(found, name) for name in ("loaded", "reason", "isa", "available")} | {"calls": calls()}
        )
    )
