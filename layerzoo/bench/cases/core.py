"""Cases of the package itself: what a call costs, what compiling it gains, importing and building the package."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo import nn, ops
from layerzoo.bench.case import Candidate, Case, Shape, Target, Work

Tensors = dict[str, Tensor]
ROOT = Path(__file__).parents[3]


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if shutil.which("c++") is None:
        raise ImportError("torch.compile needs a C++ compiler (c++) on the PATH")
    torch.compiler.reset()  # else the sizes of the check would make it compile for any size
    compiled: Callable[..., Tensor] = torch.compile(function, fullgraph=True)
    return compiled


# ---- a short convolution: so little work that the call is what costs ----


def _conv_inputs(shape: Shape) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    x, grad_out = torch.randn(2, shape["B"], shape["D"], shape["L"], generator=generator)
    weight = torch.randn(shape["D"], shape["W"], generator=generator)
    return {"x": x, "weight": weight, "bias": torch.randn(shape["D"], generator=generator), "grad_out": grad_out}


def _ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = ops.causal_conv1d(x, weight, bias, activation="silu")
    assert isinstance(y, Tensor)
    return y


def _torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=x.shape[1])
    return F.silu(y[..., : x.shape[2]])


def _conv(inputs: Tensors, function: Callable[..., Tensor], compiled: bool = False, exact: bool = False) -> Work:
    dtype = torch.float64 if exact else None
    x, weight, bias, grad_out = (tensor.detach().to(dtype) for tensor in inputs.values())
    leaves = {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "bias": bias.requires_grad_()}
    call = _compiled(function) if compiled else function
    return Work(lambda: call(**leaves), leaves, grad_out)


def _call_case(variant: str, backward: bool, compiled: bool, most: float) -> Case:
    """`most`: microseconds; twice what a trivial op of torch.library costs."""
    size = {"B": 1, "D": 4, "L": 4, "W": 4}
    return Case(
        "core.call",
        variant,
        "forward+backward" if backward else "forward",
        shape=size,
        check=size,
        inputs=_conv_inputs,
        ours=Candidate("layerzoo", partial(_conv, function=_ours, compiled=compiled)),
        reference=Candidate("reference", partial(_conv, function=_torch, exact=True)),
        peers=(Candidate("torch", partial(_conv, function=_torch, compiled=compiled)),),
        targets=(Target("µs/call", at_most=most),),
    )


# ---- a layer, as it is and compiled ----


def _layer_inputs(shape: Shape) -> dict[str, Any]:
    torch.manual_seed(0)
    x, grad_out = torch.randn(2, shape["B"], shape["L"], shape["H"])
    return {"layer": nn.Mamba(shape["H"]), "x": x, "grad_out": grad_out}


def _layer(inputs: dict[str, Any], compiled: bool = False) -> Work:
    layer = inputs["layer"]
    x = inputs["x"].detach().requires_grad_()
    call = _compiled(layer) if compiled else layer
    return Work(lambda: call(x), {"x": x, **dict(layer.named_parameters())}, inputs["grad_out"])


def _layer_case(backward: bool) -> Case:
    return Case(
        "core.compile",
        "mamba",
        "forward+backward" if backward else "forward",
        shape={"B": 2, "L": 256, "H": 256},
        check={"B": 2, "L": 21, "H": 32},
        inputs=_layer_inputs,
        ours=Candidate("layerzoo", _layer),
        reference=Candidate("reference", _layer),
        peers=(Candidate("layerzoo, torch.compile", partial(_layer, compiled=True)),),
        tokens=("B", "L"),
    )


# ---- importing and building ----


def _succeeded(command: list[str], folder: Path | None = None) -> Tensor:
    """The exit status; raises RuntimeError with the last line of what a failing command printed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])}: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return torch.zeros(1)


def _import(modules: str, inputs: None) -> Work:
    return Work(partial(_succeeded, [sys.executable, "-c", f"import {modules}"]))


def _build(full: bool) -> Work:
    """Every native library, from nothing; the check only asks whether the build could start."""
    if not (ROOT / "setup.py").exists():
        raise ImportError(f"{ROOT} is no checkout of layerzoo")

    def call() -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            build = ["build_ext", f"--build-lib={folder}", f"--build-temp={folder}"] if full else ["--version"]
            return _succeeded([sys.executable, "setup.py", "-q", *build], ROOT)

    return Work(call)


def _success(inputs: object) -> Work:
    return Work(lambda: torch.zeros(1))


def _none(shape: Shape) -> None:
    return None


def _whether_full(shape: Shape) -> bool:
    return bool(shape["full"])


CASES = (
    _call_case("eager", backward=False, compiled=False, most=14),
    _call_case("eager", backward=True, compiled=False, most=72),
    _call_case("compiled", backward=False, compiled=True, most=14),
    _layer_case(backward=False),
    _layer_case(backward=True),
    Case(
        "core.import",
        "",
        "forward",
        shape={},
        check={},
        inputs=_none,
        ours=Candidate("import torch, layerzoo", partial(_import, "torch, layerzoo")),
        reference=Candidate("reference", _success),
        peers=(Candidate("import torch", partial(_import, "torch")),),
    ),
    Case(
        "core.build",
        "",
        "forward",
        shape={"full": 1},
        check={"full": 0},
        inputs=_whether_full,
        ours=Candidate("layerzoo", _build, full=True),
        reference=Candidate("reference", _success),
    ),
)
