"""The CUDA source of linear_scan in the emulator, against numpy: as in test_causal_conv1d_cuda.py."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from . import oracle

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))
from cases import (
    DTYPES,
    INPUT,
    OUTPUT,
    SEEDS,
    Call,
    Operand,
    assert_caught,
    emulated,
    mutant,
    place,
    run_sanitized,
)
from emulation import COMPILER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++ on Linux"),
]

TYPES = [*DTYPES, torch.complex64, torch.complex128]
TOLERANCE = oracle.TOLERANCE | {torch.complex64: 3e-6, torch.complex128: 1e-14, torch.float32: 3e-6}


class Arguments(ctypes.Structure):
    _fields_ = [("f64", ctypes.c_bool), ("complex", ctypes.c_bool)]
    _fields_ += [(n, ctypes.c_int64) for n in ("b", "d", "l", "unit")]
    _fields_ += [("rows", ctypes.c_bool), ("a", Operand), ("x", Operand), ("h", Operand), ("initial", ctypes.c_void_p)]


class GradArguments(Arguments):
    _fields_ = [(n, Operand) for n in ("grad_h", "grad_a", "grad_x")] + [("grad_initial", ctypes.c_void_p)]


def numbers(x: Tensor | None) -> np.ndarray | None:
    """In double precision."""
    return None if x is None else x.to(torch.complex128 if x.is_complex() else torch.float64).numpy()


def pairs(x: Tensor | None) -> Tensor | None:
    """Complex numbers as the memory has them."""
    return torch.view_as_real(x) if x is not None and x.is_complex() else x


def sequence(x: Tensor | None, reverse: bool) -> Operand:
    """(batch, length, channels), as csrc/ssm/linear_scan_args.h has it."""
    if x is None:
        return Operand()
    dtype = {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(x.dtype, x.dtype)
    batch, time, channel = x.stride()
    last = (x.shape[1] - 1) * time * x.itemsize if reverse and x.shape[1] else 0
    return Operand(x.data_ptr() + last, DTYPES.index(dtype), batch, channel, -time if reverse else time)


class Case:
    def __init__(
        self,
        batch: int = 2,
        length: int = 11,
        channels: int = 3,
        *,
        layout: str = "channels last",
        initial: bool = True,
        reverse: bool = False,
        dtype: torch.dtype = torch.float32,
        factors: torch.dtype | None = None,
    ):
        torch.manual_seed(length)
        self.reverse = reverse
        acc = dtype if dtype.is_complex else torch.float64 if dtype == torch.float64 else torch.float32

        def random(kind: torch.dtype) -> Tensor:
            if layout == "time last":
                return place(torch.randn(batch, channels, length).to(kind).mT)
            return place(torch.randn(batch, length, channels, dtype=kind if kind.is_complex else None).to(kind))

        self.a, self.x, self.grad = random(factors or dtype), random(dtype), random(dtype)
        self.initial = place(torch.randn(batch, channels, dtype=acc)) if initial else None
        self.h = place(torch.empty_like(self.x))

    def fill(self, args: Arguments) -> Arguments:
        args.f64 = self.x.dtype in (torch.float64, torch.complex128)
        args.complex = self.x.is_complex()
        args.b, args.l, args.d = self.x.shape
        for name in ("a", "x", "h"):
            setattr(args, name, sequence(getattr(self, name), self.reverse))
        args.initial = None if self.initial is None else self.initial.data_ptr()
        return args

    def call(self) -> Call:
        arrays = {"h": (pairs(self.h), OUTPUT)} | {n: (pairs(getattr(self, n)), INPUT) for n in ("a", "x", "initial")}
        return Call("linear_scan", 0, self.fill(Arguments()), arrays)

    def check(self) -> None:
        h = oracle.linear_scan(*map(numbers, (self.a, self.x, self.initial)), self.reverse)
        assert_close("h", self.h, h)


class GradCase(Case):
    """The backward, given the result of the oracle."""

    def __init__(self, **options: object):
        super().__init__(**options)
        h = oracle.linear_scan(*map(numbers, (self.a, self.x, self.initial)), self.reverse)
        self.h.copy_(torch.from_numpy(h.copy()))
        tensors = {"a": self.a, "x": self.x, "initial_state": self.initial}
        self.grads = {name: None if x is None else place(torch.empty_like(x)) for name, x in tensors.items()}

    def call(self) -> Call:
        args = self.fill(GradArguments())
        args.grad_h = sequence(self.grad, self.reverse)
        args.grad_a, args.grad_x = (sequence(self.grads[n], self.reverse) for n in ("a", "x"))
        initial = self.grads["initial_state"]
        args.grad_initial = None if initial is None else initial.data_ptr()
        arrays = {f"grad_of_{name}": (pairs(x), OUTPUT) for name, x in self.grads.items()}
        arrays |= {name: (pairs(getattr(self, name)), INPUT) for name in ("a", "h", "grad", "initial")}
        return Call("linear_scan_backward", 1, args, arrays)

    def check(self) -> None:
        inputs = map(numbers, (self.grad, self.a, self.x, self.initial))
        want = oracle.linear_scan_gradients(*inputs, self.reverse)
        for name, grad in self.grads.items():
            if grad is not None:
                assert_close(name, grad, want[name], TOLERANCE[self.x.dtype])


def assert_close(name: str, got: Tensor, want: np.ndarray, tolerance: float | None = None) -> None:
    oracle.assert_close(name, pairs(got), pairs(torch.from_numpy(np.array(want))), tolerance or TOLERANCE[got.dtype])


CASES = {
    "one": dict(batch=1, length=1, channels=1),
    "no steps": dict(length=0),
    "no batch": dict(batch=0),
    "no state": dict(initial=False, reverse=True),
    "a whole stretch": dict(length=8, channels=130),
    "time last": dict(layout="time last", length=33, reverse=True),
    "complex": dict(dtype=torch.complex64, length=9),
    "complex, back": dict(dtype=torch.complex128, length=17, reverse=True, layout="time last"),
    "types": dict(dtype=torch.bfloat16, factors=torch.float32),
}
PASSES = {"forward": Case, "backward": GradCase}


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated("linear_scan")


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("name", CASES)
def test_agrees_under_every_schedule(kernels: ctypes.CDLL, name: str, direction: str) -> None:
    for seed in SEEDS:
        c = PASSES[direction](**CASES[name])
        assert c.call().run(kernels, seed) == ""
        c.check()


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_dtypes(kernels: ctypes.CDLL, dtype: torch.dtype, direction: str) -> None:
    c = PASSES[direction](dtype=dtype, length=20)
    assert c.call().run(kernels, SEEDS[-1]) == ""
    c.check()


def test_an_expanded_factor(kernels: ctypes.CDLL) -> None:
    c = Case()
    c.a = place(torch.rand(1, 1, 3)).expand(2, 11, 3)
    assert c.call().run(kernels, SEEDS[-1]) == ""
    c.check()


def test_address_sanitizer(tmp_path: Path) -> None:
    """Forward in time: an array is known in the other process by the address of its first element."""
    options = [o for o in CASES.values() if not o.get("reverse")] + [dict(dtype=d) for d in TYPES]
    all_cases = [kind(**o) for o in options for kind in PASSES.values()]
    run_sanitized("linear_scan", [c.call() for c in all_cases], tmp_path)
    for c in all_cases:
        c.check()


MUTATIONS = {  # the pass, what is changed, what it becomes, and what must be said
    "a step too far": ("forward", "if (t0 + k >= s.l) continue;", "", r"out of bounds: .* (a|x)\["),
    "no result": (
        "forward",
        "store_number<N>(s.h, b, channel, t0 + k, h = ",
        "(void)(h = ",
        r"h\[\d+\] was never written",
    ),
    "a step too early": ("backward", "t > 0 ? load_number<N>", "t >= 0 ? load_number<N>", r"out of bounds: .* h\["),
    "two threads, one channel": (
        "backward",
        "channel = i % s.d;\n    const N initial",
        "channel = i / 2 % s.d;\n    const N initial",
        r"race: .* grad_of_",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_kernel_is_caught(tmp_path: Path, name: str) -> None:
    direction, old, new, message = MUTATIONS[name]
    loaded = mutant("linear_scan", "ssm/linear_scan.cuh", old, new, tmp_path)
    assert_caught(loaded, message, PASSES[direction](channels=4, batch=1).call())
