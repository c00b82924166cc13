"""The CUDA source of selective_scan, run without a GPU: compiled by g++ and executed in the emulator against numpy."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))
from cases import (
    DTYPES,
    INPUT,
    OUTPUT,
    SEEDS,
    Call,
    Ids,
    Operand,
    assert_caught,
    emulated,
    mutant,
    operand,
    place,
    room,
    run_sanitized,
)
from emulation import COMPILER

from . import oracle
from .inputs import LAYOUTS, plain, scan_arguments
from .oracle import array, assert_close

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++ on Linux")

OP = "selective_scan"
CHUNK = 64
CHANNELS, DOUBLE_CHANNELS = 16, 8  # of a block; test_block holds them to the source
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Coefficient(Operand):
    _fields_ = (("group", ctypes.c_int64), ("constant", ctypes.c_bool))


class Arguments(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("b", "d", "l", "n", "g")]
    _fields_ += [(n, Operand) for n in ("u", "delta", "z", "out", "A", "D", "bias", "initial")]
    _fields_ += [(n, Coefficient) for n in ("B", "C")] + [("seq_idx", Ids)]
    _fields_ += [(n, ctypes.c_void_p) for n in ("marks", "last", "states")] + [("softplus", ctypes.c_bool)]


class GradParts(ctypes.Structure):
    _fields_ = [("parts", ctypes.c_int64), ("size", ctypes.c_int64), ("data", ctypes.c_void_p), ("out", Operand)]


class GradArguments(ctypes.Structure):
    _fields_ = [("scan", Arguments)]
    _fields_ += [(n, Operand) for n in ("grad_out", "grad_u", "grad_delta", "grad_z", "grad_last")]
    _fields_ += [("carry", ctypes.c_void_p)]
    _fields_ += [(n, GradParts) for n in ("A", "D", "bias", "B", "C")]
    _fields_ += [(n, Coefficient) for n in ("grad_B", "grad_C")]


def in_scan_order(x: Any, like: Tensor | None, reverse: bool) -> Any:
    """A struct with strides of time, which then counts from the last step if the scan is reversed."""
    if reverse and like is not None and like.shape[-1]:
        x.data += (like.shape[-1] - 1) * x.time * like.itemsize
        x.time = -x.time
    return x


def coefficient(x: Tensor, reverse: bool) -> Coefficient:
    if x.dim() == 2:
        found = operand(Coefficient, x, "channel", "time")
        found.constant = True
        return found
    axes = ("batch", "group", "channel", "time") if x.dim() == 4 else ("batch", "channel", "time")
    return in_scan_order(operand(Coefficient, x, *axes), x, reverse)


class Case:
    """Arguments in memory of their own, and what both passes make of them."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = {name: place(x) if isinstance(x, Tensor) else x for name, x in given.items()}
        u, A = self.given["u"], self.given["A"]
        self.wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        (b, d, length), n = u.shape, A.shape[1]
        self.out = place(torch.empty_like(u))
        self.last = room(b, d, n, dtype=self.wide)
        self.states = room(b, -(-length // CHUNK), n, d, dtype=self.wide)
        self.grad_out = place(torch.randn(b, length, d).mT.to(u.dtype))
        self.grad_last = place(torch.randn(n, b, d).permute(1, 2, 0).to(u.dtype))
        self.grads: dict[str, Tensor] = {}

    def shared(self, keep: bool) -> tuple[Arguments, dict[str, tuple[Tensor | None, int]]]:
        g, reverse = self.given, self.given["reverse"]
        (b, d, length), n = g["u"].shape, g["A"].shape[1]
        groups = [g[name].shape[1] if g[name].dim() == 4 else 1 for name in "BC" if g[name].dim() > 2]
        a = Arguments(b=b, d=d, l=length, n=n, g=max(groups, default=1), softplus=g["delta_softplus"])
        for name in ("u", "delta", "z"):
            x = g.get(name)
            setattr(a, name, in_scan_order(operand(Operand, x, "batch", "channel", "time"), x, reverse))
        a.A = operand(Operand, g["A"], "channel", "time")
        a.D, a.bias = (operand(Operand, g.get(name), "channel") for name in ("D", "delta_bias"))
        a.initial = operand(Operand, g.get("initial_state"), "batch", "channel", "time")
        a.B, a.C = (coefficient(g[name], reverse) for name in "BC")
        a.seq_idx = in_scan_order(operand(Ids, g.get("seq_idx"), "batch", "time"), g.get("seq_idx"), reverse)
        marks = None if "seq_idx" not in g else room(b, length, dtype=torch.uint8)
        a.marks = None if marks is None else marks.data_ptr()
        a.states = self.states.data_ptr() if keep else None
        arrays = {name: (x, INPUT) for name, x in g.items() if isinstance(x, Tensor)}
        return a, arrays | {"marks": (marks, OUTPUT)}

    def forward(self, keep: bool = True) -> Call:
        a, arrays = self.shared(keep)
        a.out = in_scan_order(operand(Operand, self.out, "batch", "channel", "time"), self.out, self.given["reverse"])
        a.last = self.last.data_ptr()
        outputs = {"out": self.out, "last": self.last} | ({"states": self.states} if keep else {})
        return Call(OP, 0, a, arrays | {name: (x, OUTPUT) for name, x in outputs.items()})

    def backward(self) -> Call:
        """After a forward call, whose states it reads."""
        g, reverse = self.given, self.given["reverse"]
        scan, arrays = self.shared(keep=True)
        arrays |= {name: (getattr(self, name), INPUT) for name in ("states", "grad_out", "grad_last")}
        a = GradArguments(scan=scan)
        sequences = [("u", g["u"]), ("delta", g["delta"]), ("z", g.get("z"))]
        self.grads = {name: place(torch.empty_like(x)) for name, x in sequences if x is not None}
        a.grad_out = in_scan_order(operand(Operand, self.grad_out, "batch", "channel", "time"), self.grad_out, reverse)
        a.grad_last = operand(Operand, self.grad_last, "batch", "channel", "time")
        for name, x in self.grads.items():
            found = in_scan_order(operand(Operand, x, "batch", "channel", "time"), x, reverse)
            setattr(a, f"grad_{name}", found)
        self.grads["initial_state"] = room(scan.b, scan.d, scan.n, dtype=self.wide)
        a.carry = self.grads["initial_state"].data_ptr()
        width = DOUBLE_CHANNELS if self.wide == torch.float64 else CHANNELS
        units = -(-(scan.d // scan.g) // width)
        scratch = {}
        for name, field in (("A", "A"), ("D", "D"), ("delta_bias", "bias"), ("B", "B"), ("C", "C")):
            like = g.get(name, g["A"][:, 0])
            grad = place(torch.empty_like(like) if like.dim() > 2 else like.new_empty(like.shape))
            parts = units if like.dim() > 2 else scan.b
            part = room(parts, grad.numel(), dtype=self.wide)
            scratch[f"parts of {name}"] = part
            found = GradParts(parts=parts, size=grad.numel(), data=part.data_ptr())
            if name in g:
                self.grads[name] = grad
                found.out = Operand(data=grad.data_ptr(), dtype=DTYPES.index(grad.dtype))
            setattr(a, field, found)
            if name in "BC":
                first = part[:1].as_strided(grad.shape, grad.stride()) if grad.numel() else part.reshape(grad.shape)
                setattr(a, f"grad_{name}", coefficient(first, reverse))
        outputs = {f"gradient of {name}": x for name, x in self.grads.items()} | scratch
        return Call(f"{OP}_backward", 1, a, arrays | {name: (x, OUTPUT) for name, x in outputs.items()})

    def values(self) -> dict[str, Any]:
        return plain(self.given)

    def check(self) -> None:
        u = self.given["u"]
        out, last = oracle.selective_scan(**self.values())
        assert_close("out", self.out, out, TOLERANCE[u.dtype])
        assert_close("last", self.last, last, TOLERANCE[self.wide])

    def check_gradients(self) -> None:
        want = oracle.selective_scan_gradients(array(self.grad_out), array(self.grad_last), **self.values())
        for name, grad in self.grads.items():
            tolerance = max(TOLERANCE[self.wide], TOLERANCE[grad.dtype])
            assert_close(f"gradient of {name}", grad, want[name], tolerance)

    def run(self, kernels: ctypes.CDLL, seed: int, max_blocks: int = 3) -> None:
        for call in (self.forward, self.backward):
            assert call().run(kernels, seed, max_blocks) == ""


OPTIONAL = ("D", "z", "delta_bias", "initial_state", "seq_idx")
CASES: dict[str, dict[str, Any]] = {
    "one": dict(sizes=(1, 1, 1, 1)),
    "no steps": dict(sizes=(2, 3, 0, 2)),
    "no steps, nothing optional": dict(sizes=(1, 2, 0, 2), leave_out=OPTIONAL),
    "no batch": dict(sizes=(0, 3, 5, 2)),
    "chunk - 1, block - 1, states - 1": dict(sizes=(1, CHANNELS - 1, CHUNK - 1, 15), layouts=("channel-last",)),
    "chunk, block, states": dict(sizes=(2, CHANNELS, CHUNK, 16), leave_out=OPTIONAL, softplus=False),
    "chunk + 1, block + 1, states + 1": dict(sizes=(1, CHANNELS + 1, CHUNK + 1, 17), layouts=LAYOUTS),
    "chunks, reversed": dict(sizes=(2, 5, 2 * CHUNK + 9, 3), layouts=("chunk", "channel-last"), reverse=True),
    "not packed": dict(sizes=(1, 20, CHUNK + 9, 4), leave_out=("seq_idx",), layouts=("rows", "gaps")),
    "grouped": dict(sizes=(1, 3 * (CHANNELS + 1), 19, 2), B="grouped", C="grouped", groups=3, layouts=("gaps",)),
    "constant": dict(sizes=(2, CHANNELS + 2, CHUNK + 3, 5), B="constant", C="constant", layouts=("channel-last",)),
    "constant B": dict(sizes=(1, 6, CHUNK + 3, 18), B="constant", C="grouped", groups=2, reverse=True),
    "constant C": dict(sizes=(1, 4, 21, 4), C="constant", leave_out=("z", "D"), softplus=False),
}


def case(sizes: tuple[int, int, int, int], **options: Any) -> Case:
    return Case(scan_arguments(*sizes, **options))


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated(OP)


def test_block(kernels: ctypes.CDLL) -> None:
    assert (kernels.selective_scan_channels(False), kernels.selective_scan_channels(True)) == (
        CHANNELS,
        DOUBLE_CHANNELS,
    )


@pytest.mark.parametrize("name", CASES)
def test_agrees_under_every_schedule(kernels: ctypes.CDLL, name: str) -> None:
    for seed in SEEDS:
        c = case(**CASES[name])
        c.run(kernels, seed)
        c.check()
        c.check_gradients()


@pytest.mark.parametrize("parameters", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(kernels: ctypes.CDLL, dtype: torch.dtype, parameters: torch.dtype) -> None:
    given = scan_arguments(1, 9, 70, 5, B="grouped", C="constant", dtype=dtype, parameters=parameters)
    given["delta"] = given["delta"].to(parameters)
    c = Case(given)
    c.run(kernels, SEEDS[-1])
    c.check()
    c.check_gradients()


def test_without_kept_states(kernels: ctypes.CDLL) -> None:
    c = case((1, 3, CHUNK + 1, 2))
    assert c.forward(keep=False).run(kernels, SEEDS[-1]) == ""
    c.check()


def test_only_the_gradient_of_the_output(kernels: ctypes.CDLL) -> None:
    c = case((2, 3, CHUNK + 1, 2))
    assert c.forward().run(kernels, 0) == ""
    call = c.backward()
    call.arguments.grad_last = Operand()
    assert call.run(kernels, 0) == ""
    c.grad_last.zero_()
    c.check_gradients()


def test_any_grid_gives_the_same_bits(kernels: ctypes.CDLL) -> None:
    results = []
    for blocks, seed in ((1, 0), (2, 1), (100, SEEDS[-1])):
        c = case((2, 3 * CHANNELS, CHUNK + 5, 3))
        c.run(kernels, seed, blocks)
        results.append([c.out, c.last, *c.grads.values()])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
def test_what_stands_in_padding_or_in_another_sequence_does_not_matter(kernels: ctypes.CDLL, reverse: bool) -> None:
    marks = torch.tensor([[-1] * 3 + [0] * 30 + [-1] * 7 + [4] + [5] * 30 + [-1] * 4])
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        given = scan_arguments(1, 5, 75, 4, reverse=reverse, leave_out=("initial_state",))
        given["seq_idx"] = marks
        for name in ("u", "delta", "z", "B", "C"):
            given[name] = given[name].masked_fill(marks[:, None] < 0, garbage)
        given["u"] = given["u"].masked_fill(marks[:, None] == 4, garbage)
        c = Case(given)
        c.grad_out.masked_fill_(marks[:, None] < 0, garbage)
        c.run(kernels, SEEDS[-1])
        after = marks[0] == (0 if reverse else 5)  # the sequence that follows the bad one in the order of the scan
        results.append(
            [c.out[..., after], c.last, *(c.grads[name][..., after] for name in ("u", "delta", "z", "B", "C"))]
        )
        assert not c.out[..., marks[0] < 0].any()
        assert not any(c.grads[name][..., marks[0] < 0].any() for name in ("u", "delta", "z", "B", "C"))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_an_infinite_rate_forgets_at_once(kernels: ctypes.CDLL) -> None:
    given = scan_arguments(1, 3, 70, 4)
    given["A"] = torch.full_like(given["A"], -torch.inf)
    c = Case(given)
    c.run(kernels, 0)
    for x in (c.out, c.last, c.grads["u"], c.grads["B"], c.grads["C"]):
        assert x.isfinite().all()
    state = given["initial_state"]
    assert not torch.equal(c.last, state)


@pytest.mark.slow
def test_address_sanitizer(kernels: ctypes.CDLL, tmp_path: Path) -> None:
    cases = [case(**options) for options in CASES.values()]
    cases += [case((1, 3, 70, 4), dtype=dtype, reverse=True) for dtype in DTYPES]
    run_sanitized(OP, [c.forward() for c in cases], tmp_path)
    run_sanitized(OP, [c.backward() for c in cases], tmp_path)
    for c in cases:
        c.check()
        c.check_gradients()


# In selective_scan.cuh: the line that is changed, what it becomes, the pass that must fail, and what it must say.
# Without a barrier it depends on the schedule which array is the first to be seen.
UNLIKE = ("channel-last", "channel-last", "time-last", "channel-last")  # z: time-last, u and delta not
RACE = r"(undefined|race): .* (%s)\["
MUTATIONS = {
    "loads": ("__syncthreads();  // u, delta and marks are there", "", "forward", RACE % "input|dt|marks"),
    "steps": ("__syncthreads();  // dt u, B and C are there", "", "forward", RACE % "input|dt|B|C|y|marks"),
    "next states": ("__syncthreads();  // B and C are read, y is there", "", "forward", RACE % "B|C|y|dt|last"),
    "gate": ("__syncthreads();  // z is there", "", "forward", RACE % "dt|y"),
    "next chunk": ("__syncthreads();  // the chunk is stored", "", "forward", RACE % "dt|input|y|marks"),
    "channels": ("c < block.channels && t < steps ?", "t < steps ?", "forward", r"out of bounds: .* (u|delta|z)\["),
    "states": ("n0 + s < n && marks", "marks", "forward", r"out of bounds: .* (A|B|C|u|delta|z|last|states|out)\["),
    "inputs": ("__syncthreads();  // inputs and marks are there", "", "backward", RACE % "u|dt|grad_y|y|marks"),
    "sums": ("__syncthreads();  // the sums of the warps are there", "", "backward", RACE % "sums"),
    "sums read": ("__syncthreads();  // the sums are read", "", "backward", RACE % "sums|B|C"),
    "gradients": ("__syncthreads();  // gradients are there", "", "backward", RACE % "grad_u|grad_dt|dt|u"),
    "gate again": ("__syncthreads();  // grad_out and z are there again", "", "backward", RACE % "dt|u|y"),
    "blocks": (
        "block.part * (of_B ? grad.B : grad.C).size + ",
        "",
        "backward",
        r"race: .* parts of [BC]\[.*another block",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_kernel_is_caught(kernels: ctypes.CDLL, tmp_path: Path, name: str) -> None:
    old, new, which, message = MUTATIONS[name]
    faulty = mutant(OP, "ssm/selective_scan.cuh", old, new, tmp_path)
    c = case((1, CHANNELS + 3, 2 * CHUNK + 5, 17), leave_out=("seq_idx",), layouts=UNLIKE)
    if which == "backward":
        assert c.forward().run(kernels, 0) == ""
    assert_caught(faulty, message, getattr(c, which)(), max_blocks=2 if name == "blocks" else 1)
