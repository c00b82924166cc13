"""The CUDA source of selective_state_update in the emulator, against numpy: as in test_causal_conv1d_cuda.py."""

import ctypes
import sys
from pathlib import Path

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
    HeadOperand,
    Ids,
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

LETTERS = {"b": "batch", "h": "head", "c": "channel", "n": "time"}  # of HeadOperand's strides
AXES = {"state": "bhcn", "x": "bhc", "dt": "bhc", "z": "bhc", "out": "bhc", "A": "hcn", "B": "bhn", "C": "bhn"}
AXES |= {"D": "hc", "bias": "hc"}


class Arguments(ctypes.Structure):
    _fields_ = [("f64", ctypes.c_bool), ("softplus", ctypes.c_bool)]
    _fields_ += [(n, ctypes.c_int64) for n in ("b", "h", "p", "n", "g")]
    _fields_ += [(n, HeadOperand) for n in ("state", "x", "dt", "z", "out", "A", "B", "C", "D", "bias")]
    _fields_ += [("slots", ctypes.c_void_p), ("rows", ctypes.c_int64), ("indices", Ids)]


class Case:
    """In heads, as the oracle has it; the plain form is one head without a stride."""

    def __init__(
        self,
        batch: int = 2,
        heads: int = 1,
        channels: int = 3,
        n: int = 16,
        groups: int = 1,
        *,
        rows: int | None = None,
        indices: list[int] | None = None,
        optional: bool = True,
        softplus: bool = True,
        one_decay: bool = False,
        dtype: torch.dtype = torch.float32,
        states: torch.dtype | None = None,
        ids: torch.dtype = torch.int64,
    ):
        torch.manual_seed(n)
        self.softplus = softplus
        self.x, self.dt, self.z = (place(torch.randn(batch, heads, channels).to(dtype)) for _ in range(3))
        # Not dense: as cut out of a projection.
        self.B, self.C = (place(torch.randn(batch, groups, 2 * n).to(dtype)[..., :n]) for _ in range(2))
        rate = -torch.rand(heads, channels, 1 if one_decay else n)
        self.A = place(rate).expand(-1, -1, n) if one_decay else place(rate)
        self.D, self.bias = (place(torch.randn(heads, channels)) for _ in range(2))
        if not optional:
            self.D = self.z = self.bias = None
        state = torch.randn(rows or batch, heads, n, channels if one_decay else 2 * channels)[..., :channels]
        self.state = place(state.mT.to(states or torch.float32 if dtype != torch.float64 else dtype))
        self.indices = None if indices is None else place(torch.tensor(indices, dtype=ids))
        self.out = place(torch.empty_like(self.x))
        self.before = self.state.clone()

    def call(self) -> Call:
        (b, h, p), g, n = self.x.shape, self.B.shape[1], self.A.shape[2]
        args = Arguments(self.x.dtype == torch.float64, self.softplus, b, h, p, n, g, rows=self.state.shape[0])
        for name, letters in AXES.items():
            setattr(args, name, operand(HeadOperand, getattr(self, name), *(LETTERS[c] for c in letters)))
        args.indices = operand(Ids, self.indices, "batch")
        access = {"out": OUTPUT, "state": IN_PLACE}
        names = (*AXES, "indices")
        return Call(
            "selective_state_update", 0, args, {name: (getattr(self, name), access.get(name, INPUT)) for name in names}
        )

    def check(self) -> None:
        inputs = (self.before, self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.bias)
        indices = None if self.indices is None else self.indices.numpy()
        out, after = oracle.selective_state_update(*map(oracle.array, inputs), self.softplus, indices)
        oracle.assert_close("out", self.out, out, TOLERANCE[self.x.dtype])
        oracle.assert_close("state", self.state, after, TOLERANCE[self.state.dtype])


CASES = {
    "one": dict(batch=1, channels=1, n=1),
    "plain": dict(channels=37),
    "nothing optional": dict(optional=False, softplus=False),
    "heads": dict(heads=4, channels=5, n=40, groups=2, one_decay=True),
    "lanes - 1": dict(heads=3, n=15),
    "lanes + 1": dict(heads=3, n=17),
    "no batch": dict(batch=0, rows=2, indices=[]),
    "pool": dict(batch=4, rows=6, indices=[5, -1, 0, 3], channels=9),
    "pool, 32 bit": dict(batch=3, heads=2, rows=5, indices=[4, -2, 1], ids=torch.int32),
    "16-bit state": dict(states=torch.bfloat16, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated("selective_state_update")


@pytest.mark.parametrize("name", CASES)
def test_agrees_under_every_schedule(kernels: ctypes.CDLL, name: str) -> None:
    for seed in SEEDS:
        c = Case(**CASES[name])
        assert c.call().run(kernels, seed) == ""
        c.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one_decay", [False, True])
def test_dtypes(kernels: ctypes.CDLL, dtype: torch.dtype, one_decay: bool) -> None:
    c = Case(heads=2, channels=20, n=33, dtype=dtype, one_decay=one_decay)
    assert c.call().run(kernels, SEEDS[-1]) == ""
    c.check()


def test_any_grid_gives_the_same_bits(kernels: ctypes.CDLL) -> None:
    first, second = (Case(heads=4, channels=33) for _ in range(2))
    assert first.call().run(kernels, 0, 1) == "" and second.call().run(kernels, 0, 100) == ""
    assert torch.equal(first.out, second.out) and torch.equal(first.state, second.state)


@pytest.mark.parametrize("row", [2, 2**40])
def test_a_row_beyond_the_state_is_seen_and_touches_nothing(kernels: ctypes.CDLL, row: int) -> None:
    c = Case(indices=[1, row])
    assert c.call().run(kernels, SEEDS[-1]) == ""
    assert c.out[1].isnan().all() and not c.out[0].isnan().any()
    assert torch.equal(c.state[0], c.before[0])


def test_step_sizes_far_from_zero(kernels: ctypes.CDLL) -> None:
    c = Case(channels=6)
    c.dt.copy_(torch.tensor([-200.0, -90.0, -20.0, 20.0, 90.0, 200.0]))
    assert c.call().run(kernels, SEEDS[-1]) == ""
    c.check()


def test_address_sanitizer(tmp_path: Path) -> None:
    all_cases = [Case(**options) for options in CASES.values()] + [Case(dtype=d) for d in DTYPES]
    run_sanitized("selective_state_update", [c.call() for c in all_cases], tmp_path)
    for c in all_cases:
        c.check()


MUTATIONS = {  # what is changed, what it becomes, the case, and what must be said
    "a shuffle with lanes that have left": (
        "lanes = 0xffffu << threadIdx.x % 32 / kStateLanes * kStateLanes;",
        "lanes = 0xffffffffu;",
        "pool",
        "barrier not met by all",
    ),
    "all lanes store": ("if (lane > 0) continue;", "", "heads", r"race: .* out\["),
    "a state too far": ("n < a.n; n += kStateLanes", "n < a.n + 1; n += kStateLanes", "heads", "out of bounds|race"),
    "padding is written": ("if (!slot.exists)", "if (slot.row >= a.rows)", "pool", r"out of bounds: .* state\["),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_kernel_is_caught(tmp_path: Path, name: str) -> None:
    old, new, options, message = MUTATIONS[name]
    loaded = mutant("selective_state_update", "ssm/selective_state_update.cuh", old, new, tmp_path)
    assert_caught(loaded, message, Case(**CASES[options]).call())
