"""The CUDA source of ssd_chunk_scan in the emulator, against numpy: as in test_causal_conv1d_cuda.py."""

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
    Heads,
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++ on Linux"),
]

Q = 64  # steps of a chunk, and the side of a tile
AXES = ("batch", "time", "head", "lane")


class Arguments(ctypes.Structure):
    _fields_ = [(n, ctypes.c_bool) for n in ("f64", "softplus", "wide_D")]
    _fields_ += [(n, ctypes.c_double) for n in ("low", "high")]
    _fields_ += [(n, ctypes.c_int64) for n in ("b", "l", "h", "p", "g", "n")]
    _fields_ += [(n, Heads) for n in ("x", "dt", "z", "out", "B", "C")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("A", "D", "bias", "initial", "final_states", "states")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("marks", "packed")]
    _fields_ += [(n, Heads) for n in ("grad_out", "grad_x", "grad_dt", "grad_z", "grad_B", "grad_C")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("grad_final", "grad_initial", "carries")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("grad_A", "grad_D", "grad_bias")]
    _fields_ += [("unit", ctypes.c_int64), ("parts", ctypes.c_void_p)]
    _fields_ += [("spots", ctypes.c_int64), ("spots_per_row", ctypes.c_int64), ("seq_idx", Ids)]
    _fields_ += [(n, ctypes.c_void_p) for n in ("first", "live", "step", "slope", "sum", "rest")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("products", "grad_products", "grad_decay")]
    _fields_ += [(n, Operand) for n in ("sum_A", "sum_D", "sum_bias")]


def ids(batch: int, length: int, after: int) -> Tensor:
    """Sequences within a chunk, then padding over one whole chunk at least, then the sequence `after`."""
    row = torch.full((length,), -1)
    row[:20], row[20:50], row[50 + 2 * Q :] = 0, 3, after
    return row.repeat(batch, 1)


class Case:
    def __init__(
        self,
        batch: int = 1,
        length: int = 10,
        heads: int = 2,
        width: int = 3,
        n: int = 4,
        groups: int = 1,
        *,
        after: int | None = None,
        optional: bool = True,
        wide_D: bool = False,
        limit: tuple[float, float] = (0.0, np.inf),
        softplus: bool = True,
        dtype: torch.dtype = torch.float32,
        id_type: torch.dtype = torch.int64,
        rates: tuple[float, ...] | None = None,
    ):
        torch.manual_seed(length)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.softplus, self.limit, self.acc = softplus, limit, acc
        # Cut out of a projection, as in Mamba-2: no dimension but the last is dense.
        self.x, self.z, self.grad_out = (
            place(torch.randn(batch, length, heads, 2 * width).to(dtype)[..., :width]) for _ in range(3)
        )
        self.dt = place(torch.randn(batch, length, heads, 2).to(dtype)[..., 0])
        self.B, self.C = (place(torch.randn(batch, length, groups, n).to(dtype)) for _ in range(2))
        self.A, self.bias = place(-torch.rand(heads, dtype=acc)), place(torch.randn(heads, dtype=acc))
        if rates is not None:
            self.A.copy_(torch.tensor(rates))
        self.D = place(torch.randn((heads, width) if wide_D else (heads,), dtype=acc))
        self.initial, self.grad_final = (place(torch.randn(batch, heads, width, n, dtype=acc)) for _ in range(2))
        if not optional:
            self.z = self.D = self.bias = self.initial = self.grad_final = None
        self.seq_idx = None if after is None else place(ids(batch, length, after).to(id_type))
        self.spots_per_row = -(-length // Q)
        self.spots = batch * self.spots_per_row
        spot = (self.spots, heads, Q)
        self.scratch = {n: room(*spot, dtype=acc) for n in ("step", "slope", "sum", "rest")}
        self.scratch["first"] = room(self.spots, Q, dtype=torch.int32)
        self.scratch["live"] = room(self.spots, Q, dtype=torch.uint8)
        self.scratch["products"] = room(self.spots, groups, Q, Q, dtype=acc)
        self.states = room(batch, self.spots_per_row, heads, n, width, dtype=acc)
        self.out, self.final = place(torch.empty_like(self.x)), room(batch, heads, width, n, dtype=acc)

    def arguments(self) -> Arguments:
        (b, length, h, p), (g, n), D = self.x.shape, self.B.shape[2:], self.D
        low, high = self.limit
        args = Arguments(self.acc == torch.float64, self.softplus, D is not None and D.dim() == 2, low, high)
        args.b, args.l, args.h, args.p, args.g, args.n = b, length, h, p, g, n
        args.spots, args.spots_per_row = self.spots, self.spots_per_row
        for name in ("x", "z", "out", "B", "C"):
            setattr(args, name, operand(Heads, getattr(self, name), *AXES))
        args.dt = operand(Heads, self.dt, *AXES[:3])
        args.seq_idx = operand(Ids, self.seq_idx, "batch", "time")
        for name in ("A", "D", "bias", "initial", "states"):
            value = getattr(self, name)
            setattr(args, name, None if value is None else value.data_ptr())
        args.final_states = self.final.data_ptr()
        for name, value in self.scratch.items():
            setattr(args, name, value.data_ptr())
        return args

    def inputs(self) -> dict[str, tuple[Tensor | None, int]]:
        names = ("x", "dt", "z", "B", "C", "A", "D", "bias", "initial", "seq_idx")
        return {name: (getattr(self, name), INPUT) for name in names}

    def call(self) -> Call:
        written = {name: (x, OUTPUT) for name, x in self.scratch.items()}
        written |= {name: (getattr(self, name), OUTPUT) for name in ("out", "final", "states")}
        return Call("ssd_chunk_scan", 0, self.arguments(), written | self.inputs())

    def given(self) -> tuple[object, ...]:
        """The arguments of the oracle."""
        seq_idx = None if self.seq_idx is None else self.seq_idx.numpy()
        tensors = (self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.bias, self.initial)
        return (*map(oracle.array, tensors), seq_idx, self.softplus, self.limit)

    def check(self) -> None:
        out, final = oracle.ssd_chunk_scan(*self.given())
        oracle.assert_close("out", self.out, out, oracle.TOLERANCE[self.x.dtype])
        oracle.assert_close("final", self.final, final, oracle.TOLERANCE[self.acc])


class GradCase(Case):
    """The backward, given the states that the forward left."""

    def __init__(self, states: Tensor, **options: object):
        super().__init__(**options)
        heads, width = self.x.shape[2:]
        self.kept = place(states)
        acc, spots = self.acc, self.spots
        self.scratch |= {
            "carries": room(*self.states.shape, dtype=acc),
            "grad_products": room(spots, heads, Q, Q, dtype=acc),
            "grad_decay": room(spots, heads, Q, dtype=acc),
            "grad_A": room(spots, heads, dtype=acc),
            "grad_D": room(spots, heads, *((width,) if self.D is not None and self.D.dim() == 2 else ()), dtype=acc),
            "grad_bias": room(spots, heads, dtype=acc),
        }
        self.grads = {
            name: None if x is None else place(torch.empty_like(x))
            for name, x in (
                *((name, getattr(self, name)) for name in ("x", "dt", "z", "B", "C", "A", "D")),
                ("dt_bias", self.bias),
                ("initial_states", self.initial),
            )
        }

    def call(self) -> Call:
        args = self.arguments()
        for name in ("x", "z", "B", "C"):
            setattr(args, f"grad_{name}", operand(Heads, self.grads[name], *AXES))
        args.grad_dt = operand(Heads, self.grads["dt"], *AXES[:3])
        args.grad_out = operand(Heads, self.grad_out, *AXES)
        args.states, args.final_states = self.kept.data_ptr(), None
        args.grad_final = None if self.grad_final is None else self.grad_final.data_ptr()
        args.grad_initial = None if self.initial is None else self.grads["initial_states"].data_ptr()
        for field, name in (("sum_A", "A"), ("sum_D", "D"), ("sum_bias", "dt_bias")):
            if self.grads[name] is not None:
                setattr(args, field, Operand(self.grads[name].data_ptr(), DTYPES.index(self.acc)))
        written = {name: (x, OUTPUT) for name, x in self.scratch.items()}
        written |= {f"grad_of_{name}": (x, OUTPUT) for name, x in self.grads.items()}
        given = {
            "grad_out": (self.grad_out, INPUT),
            "grad_final": (self.grad_final, INPUT),
            "states": (self.kept, INPUT),
        }
        return Call("ssd_chunk_scan_backward", 1, args, written | given | self.inputs())

    def check(self) -> None:
        final = np.zeros(self.final.shape) if self.grad_final is None else oracle.array(self.grad_final)
        want = oracle.ssd_chunk_scan_gradients(oracle.array(self.grad_out), final, *self.given())
        for name, grad in self.grads.items():
            if grad is not None:
                oracle.assert_close(name, grad, want[name], oracle.TOLERANCE[grad.dtype])


CASES = {
    "one": dict(length=1, heads=1, width=1, n=1),
    "no steps": dict(length=0),
    "no batch": dict(batch=0),
    "nothing optional": dict(batch=2, length=Q - 1, optional=False, softplus=False),
    "chunk": dict(length=Q, wide_D=True, groups=2, heads=4),
    "chunk + 1": dict(length=Q + 1, limit=(0.3, 1.2)),
    "tiles": dict(length=Q + 9, heads=2, width=Q + 5, n=Q + 3, wide_D=True),
    "another sequence after padding": dict(batch=2, length=3 * Q + 20, after=5),
    "the same sequence after padding": dict(length=3 * Q + 20, after=3, id_type=torch.int32),
}


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated("ssd_chunk_scan")


def both(kernels: ctypes.CDLL, seed: int, max_blocks: int = 3, **options: object) -> tuple[Case, GradCase]:
    """A case forward, checked for errors, and backward from the states that it left."""
    forward = Case(**options)
    assert forward.call().run(kernels, seed, max_blocks) == ""
    backward = GradCase(forward.states, **options)
    assert backward.call().run(kernels, seed, max_blocks) == ""
    return forward, backward


@pytest.mark.parametrize("name", CASES)
def test_agrees_under_every_schedule(kernels: ctypes.CDLL, name: str) -> None:
    for seed in SEEDS[1:3]:
        for c in both(kernels, seed, **CASES[name]):
            c.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(kernels: ctypes.CDLL, dtype: torch.dtype) -> None:
    for c in both(kernels, SEEDS[-1], length=Q + 6, dtype=dtype, limit=(0.05, 2.0)):
        c.check()


def test_any_grid_gives_the_same_bits(kernels: ctypes.CDLL) -> None:
    results = []
    for blocks in (1, 100):
        calls = [c.call() for c in both(kernels, 0, blocks, batch=2, length=Q + 6)]
        results.append([x for call in calls for _, x, access in call.given() if access == OUTPUT])
    assert all(map(torch.equal, *results))


def test_what_is_elsewhere_makes_no_nan(kernels: ctypes.CDLL) -> None:
    """NaN at padding and in the first sequence stays there; one in the last step does not reach back."""
    options = dict(length=3 * Q + 20, after=5)
    forward = Case(**options)
    clean = Case(**options)
    assert clean.call().run(kernels, SEEDS[-1]) == ""
    for x in (forward.x, forward.B, forward.C, forward.dt, forward.z):
        x[:, :20] = torch.nan  # the first sequence
        x[:, -1] = torch.nan
        x[forward.seq_idx < 0] = torch.nan
    assert forward.call().run(kernels, SEEDS[-1]) == ""
    assert torch.equal(forward.out[:, 20:-1], clean.out[:, 20:-1])
    assert forward.out[:, :20].isnan().all() and forward.out[:, -1].isnan().all()


def test_strong_decays(kernels: ctypes.CDLL) -> None:
    for c in both(kernels, SEEDS[-1], length=Q + 6, heads=3, rates=(-3000.0, -1.0, -50.0)):
        c.check()
    forward = Case(length=Q + 6, heads=2, rates=(-torch.inf, -1.0))
    assert forward.call().run(kernels, SEEDS[-1]) == ""
    forward.check()


def test_address_sanitizer(tmp_path: Path) -> None:
    options = [*CASES.values(), *(dict(dtype=d) for d in DTYPES)]
    forward = [Case(**o) for o in options]
    for folder in ("forward", "backward"):
        (tmp_path / folder).mkdir()
    run_sanitized("ssd_chunk_scan", [c.call() for c in forward], tmp_path / "forward")
    backward = [GradCase(c.states, **o) for c, o in zip(forward, options, strict=True)]
    run_sanitized("ssd_chunk_scan", [c.call() for c in backward], tmp_path / "backward")
    for c in forward + backward:
        c.check()


MUTATIONS = {  # the pass, what is changed, what it becomes, and what must be said
    "tiles read too early": (0, "__syncthreads();  // both tiles are full", "", r"(undefined|race): .* (left|right)\["),
    "tiles filled too early": (0, "__syncthreads();  // both tiles are read", "", r"race: .* (left|right)\["),
    "ids read too early": (0, "__syncthreads();  // the ids are there", "", r"(undefined|race): .* ids\["),
    "ids of the next chunk too early": (0, "__syncthreads();  // the ids are read", "", r"race: .* ids\["),
    "steps beyond the end": (0, "return t0 + t < a.l; }", "return true; }", r"(out of bounds|race): .* out"),
    "pairs read too early": (1, "__syncthreads();  // all pairs are there", "", r"(undefined|race): .* pairs\["),
    "rows summed before columns": (1, "__syncthreads();  // columns are summed", "", r"race: .* pairs\["),
    "warps read too early": (1, "__syncthreads();  // every warp has its sum", "", r"(undefined|race): .* warps\["),
    "sums of warps overwritten": (1, "__syncthreads();  // the sums are read", "", r"race: .* warps\["),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_kernel_is_caught(tmp_path: Path, kernels: ctypes.CDLL, name: str) -> None:
    direction, old, new, message = MUTATIONS[name]
    loaded = mutant("ssd_chunk_scan", "ssm/ssd_chunk_scan.cuh", old, new, tmp_path)
    calls = [c.call() for c in both(kernels, 0, length=2 * Q + 5, after=3)]
    assert_caught(loaded, message, calls[direction])
