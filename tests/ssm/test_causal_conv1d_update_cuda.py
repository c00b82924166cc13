"""The CUDA source of causal_conv1d_update in the emulator, against numpy: as in test_causal_conv1d_cuda.py."""

import ctypes
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from . import oracle

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))
from cases import (
    DTYPES,
    IN_PLACE,
    INPUT,
    OUTPUT,
    SEEDS,
    TOLERANCE,
    Call,
    Ids,
    Operand,
    assert_caught,
    emulated,
    mutant,
    operand,
    place,
    run_sanitized,
)
from emulation import COMPILER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++ on Linux"),
]

BCT = ("batch", "channel", "time")


class Arguments(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("b", "d", "l", "w", "rows", "kept")]
    _fields_ += [(n, Operand) for n in ("x", "out", "state", "weight", "bias")]
    _fields_ += [("slots", Ids), ("positions", Ids), ("silu", ctypes.c_bool)]


class Case:
    def __init__(
        self,
        batch: int = 2,
        channels: int = 3,
        length: int = 1,
        width: int = 4,
        kept: int | None = None,
        *,
        rows: int | None = None,
        slots: list[int] | None = None,
        positions: list[int] | None = None,
        bias: bool = True,
        silu: bool = True,
        dtype: torch.dtype = torch.float32,
        states: torch.dtype | None = None,
        ids: torch.dtype = torch.int64,
    ):
        torch.manual_seed(width)
        kept = width - 1 if kept is None else kept
        self.silu = silu
        self.x = place(torch.randn(batch, length, channels).to(dtype).transpose(1, 2))
        self.weight, self.bias = place(torch.randn(channels, width).to(dtype)), None
        self.bias = place(torch.randn(channels).to(dtype)) if bias else None
        self.state = place(torch.randn(rows or batch, kept, channels).to(states or dtype).transpose(1, 2))
        self.slots, self.positions = (
            None if v is None else place(torch.tensor(v, dtype=ids)) for v in (slots, positions)
        )
        self.out = place(torch.empty_like(self.x))
        self.before = self.state.clone()

    def call(self) -> Call:
        args = Arguments(*self.x.shape, self.weight.shape[1], self.state.shape[0], self.state.shape[2], silu=self.silu)
        args.x, args.out, args.state = (operand(Operand, x, *BCT) for x in (self.x, self.out, self.state))
        args.weight = operand(Operand, self.weight, "channel", "time")
        args.bias = operand(Operand, self.bias, "channel")
        args.slots, args.positions = operand(Ids, self.slots, "batch"), operand(Ids, self.positions, "batch")
        arrays = {name: (getattr(self, name), INPUT) for name in ("x", "weight", "bias", "slots", "positions")}
        arrays |= {"out": (self.out, OUTPUT), "state": (self.state, IN_PLACE)}
        return Call("causal_conv1d_update", 0, args, arrays)

    def check(self) -> None:
        def values(x: torch.Tensor | None) -> np.ndarray | None:
            return None if x is None else x.double().numpy() if x.is_floating_point() else x.numpy()

        x, state, weight, bias = map(values, (self.x, self.before, self.weight, self.bias))
        assert x is not None and state is not None and weight is not None
        positions, slots = values(self.positions), values(self.slots)
        out, after = oracle.causal_conv1d_update(x, state, weight, bias, self.silu, positions, slots)
        oracle.assert_close("out", self.out, out, TOLERANCE[self.x.dtype])
        assert torch.equal(self.state, torch.from_numpy(after).to(self.state.dtype)), "the state is not made of copies"


CASES = {
    "one step": dict(),
    "many channels": dict(batch=3, channels=301),
    "width 1": dict(width=1),
    "width 1, a ring": dict(width=1, positions=[3, 0]),
    "longer state": dict(kept=7, length=3),
    "longer than the state": dict(length=9, bias=False, silu=False),
    "no steps": dict(length=0),
    "no batch": dict(batch=0, rows=2, slots=[]),
    "ring": dict(kept=5, length=3, positions=[4, 13]),
    "ring, twice around": dict(kept=4, length=11, positions=[2, 3], ids=torch.int32),
    "pool": dict(batch=4, rows=6, slots=[5, -1, 0, 3]),
    "pool of rings": dict(batch=3, rows=5, kept=6, length=2, slots=[4, -2, 1], positions=[7, -5, 5], ids=torch.int32),
    "another type of state": dict(dtype=torch.bfloat16, states=torch.float32, kept=4),
    "wide": dict(width=11, length=4),
}


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated("causal_conv1d_update")


@pytest.mark.parametrize("name", CASES)
def test_agrees_under_every_schedule(kernels: ctypes.CDLL, name: str) -> None:
    for seed in SEEDS:
        c = Case(**CASES[name])
        assert c.call().run(kernels, seed) == ""
        c.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    c = Case(channels=40, kept=5, length=2, dtype=dtype)
    assert c.call().run(kernels, SEEDS[-1]) == ""
    c.check()


@pytest.mark.parametrize("row", [2, 2**40])
def test_a_row_beyond_the_state_is_seen_and_touches_nothing(kernels: ctypes.CDLL, row: int) -> None:
    c = Case(slots=[1, row])
    assert c.call().run(kernels, SEEDS[-1]) == ""
    assert c.out[1].isnan().all() and not c.out[0].isnan().any()
    assert torch.equal(c.state[0], c.before[0])


def test_a_negative_length_stays_in_the_ring(kernels: ctypes.CDLL) -> None:
    c = Case(kept=5, length=3, positions=[-1, -13])
    assert c.call().run(kernels, SEEDS[-1]) == ""
    c.positions.copy_(torch.tensor([4, 2]))
    c.check()


def test_address_sanitizer(tmp_path: Path) -> None:
    all_cases = [Case(**options) for options in CASES.values()] + [Case(dtype=d) for d in DTYPES]
    run_sanitized("causal_conv1d_update", [c.call() for c in all_cases], tmp_path)
    for c in all_cases:
        c.check()


MUTATIONS = {  # what is changed, what it becomes, the case, and what must be said
    "a ring that does not end": (
        "return t >= 0 ? load<S>(a.x, b, channel, t) : load<S>(a.state, row, channel, (first + t + a.kept) % a.kept);",
        "return t >= 0 ? load<S>(a.x, b, channel, t) : load<S>(a.state, row, channel, first + t + a.kept);",
        "ring",
        r"out of bounds: .* state\[|undefined",
    ),
    "padding is written": ("if (!slot.exists)", "if (slot.row >= a.rows)", "pool", r"out of bounds: .* state\["),
    "two threads have one channel": (
        "channel = i % a.d;",
        "channel = i / 2 % a.d;",
        "many channels",
        r"race: .* state\[",
    ),
    "the last step is left out": (
        "for (int64_t t = 0; t < a.l; ++t) update.output(t);",
        "",
        "ring",
        "out.* never written",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_kernel_is_caught(tmp_path: Path, name: str) -> None:
    old, new, options, message = MUTATIONS[name]
    loaded = mutant("causal_conv1d_update", "ssm/causal_conv1d_update.cuh", old, new, tmp_path)
    assert_caught(loaded, message, Case(**CASES[options]).call())
