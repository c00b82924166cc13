"""The CUDA source of moe_experts in the emulator, against the reference in float64: as in tests/ssm/*_cuda.py."""

import bisect
import ctypes
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ssm.oracle import assert_close
from torch import Tensor

from layerzoo.reference import moe as reference

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

FEW, TILE = 16, 64  # rows of a tile
INT32, INT64 = torch.int32, torch.int64


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("stride", ctypes.c_int64)]
    _fields_ += [("index", ctypes.c_void_p)]


class Matrices(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("expert", ctypes.c_int64)]
    _fields_ += [("row", ctypes.c_int64), ("transposed", ctypes.c_bool)]


class Sort(ctypes.Structure):
    _fields_ = [("ids", Ids), ("choices", Ids)]
    _fields_ += [(n, ctypes.c_int64) for n in ("tokens", "experts", "pairs", "k", "first", "tile", "parts")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("expert", "pair", "row", "token", "offsets", "tiles")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("chooser", "pairs_of_token", "token_begin", "spare", "counts")]


class Arguments(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("tokens", "experts", "rows", "largest", "active")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("offsets", "by_size", "token", "pair", "token_offsets", "row_of")]
    _fields_ += [(n, ctypes.c_bool) for n in ("f64", "gated", "interleaved")] + [("activation", ctypes.c_int64)]
    _fields_ += [(n, ctypes.c_double) for n in ("alpha", "shift", "limit")]
    _fields_ += [(n, ctypes.c_int64) for n in ("outer", "inner")]
    _fields_ += [("x", Rows), ("w13", Matrices), ("w2", Matrices)]
    _fields_ += [(n, ctypes.c_void_p) for n in ("b13", "b2", "weights", "hidden", "a", "y", "out")]
    _fields_ += [("out_dtype", ctypes.c_int32), ("grad_out", Rows)]
    _fields_ += [(n, ctypes.c_void_p) for n in ("grad_hidden", "parts")]
    _fields_ += [(n, Matrices) for n in ("grad_w13", "grad_w2")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("grad_b13", "grad_b2", "grad_weights")]
    _fields_ += [("sort", Sort)]


def rows(x: Tensor) -> Rows:
    return Rows(x.data_ptr(), DTYPES.index(x.dtype), x.stride(0))


def matrices(w: Tensor, transposed: bool) -> Matrices:
    return Matrices(w.data_ptr(), DTYPES.index(w.dtype), w.stride(0), w.stride(1), transposed)


def spaced(*sizes: int, dtype: torch.dtype) -> Tensor:
    """Cut out of something wider."""
    return place(torch.randn(*sizes[:-1], sizes[-1] + 3, dtype=torch.float64).to(dtype)[..., : sizes[-1]])


class Case:
    def __init__(
        self,
        tokens: int = 7,
        k: int = 2,
        experts: int = 5,
        outer: int = 6,
        inner: int = 5,
        *,
        ids: list[list[int]] | None = None,
        chosen: list[list[int]] | None = None,
        activation: str = "silu",
        gated: bool = True,
        transposed: bool = False,
        interleaved: bool = False,
        biased: bool = True,
        gate: tuple[float, float, float] = (1.0, 0.0, math.inf),
        first: int = -1,
        save: bool = True,
        dtype: torch.dtype = torch.float32,
        w_dtype: torch.dtype | None = None,
        id_type: torch.dtype = INT64,
        tile: int | None = None,
        parts: int = 2,
    ):
        """`chosen`: the tokens of each expert."""
        torch.manual_seed(tokens)
        self.acc = torch.float64 if dtype == torch.float64 else torch.float32
        w_dtype, acc = w_dtype or dtype, self.acc
        if chosen is not None:
            ids, experts = [*itertools.chain(*chosen)], len(chosen)
        at_random = torch.randint(experts + 1, (tokens, k), generator=torch.Generator().manual_seed(k))
        given = at_random if ids is None else torch.tensor(ids, dtype=INT64)
        # Every second column of something wider.
        self.ids = place(torch.stack([given, given + 1], -1).to(id_type)[..., 0])
        self.choices = None
        if chosen is not None:
            self.choices = place(torch.tensor([0, *map(len, chosen)]).cumsum(0).to(id_type))
        self.pairs, width = given.numel(), 2 * inner if gated else inner
        self.x, self.grad_out = (spaced(tokens, outer, dtype=dtype) for _ in range(2))
        self.w13 = spaced(experts, *((outer, width) if transposed else (width, outer)), dtype=w_dtype)
        self.w2 = spaced(experts, *((inner, outer) if transposed else (outer, inner)), dtype=w_dtype)
        self.b13 = place(torch.randn(experts, width, dtype=acc)) if biased else None
        self.b2 = place(torch.randn(experts, outer, dtype=acc)) if biased else None
        self.weights = place(torch.rand(given.shape, dtype=acc))  # last: cases of other ids are the same else
        self.options = (reference.ACTIVATIONS.index(activation), gated, transposed, interleaved, *gate, first)
        self.tile = tile or (FEW if self.pairs <= FEW * experts else TILE)
        self.parts = min(parts, self.pairs)
        self.out = room(tokens, outer, dtype=dtype)
        self.hidden = room(self.pairs, width, dtype=acc) if save else None
        self.a, self.y = room(self.pairs, inner, dtype=acc), room(self.pairs, outer, dtype=acc)
        bits = [max(-(-n.bit_length() // -(-n.bit_length() // 8)) if n else 1, 1) for n in (experts, tokens)]
        per_pair, per_expert = ("expert", "pair", "row", "token", "spare"), ("offsets", "tiles")
        self.sorting = {name: room(self.pairs, dtype=INT32) for name in per_pair}
        self.sorting |= {name: room(experts + 1, dtype=INT32) for name in per_expert}
        self.sorting["counts"] = room(self.parts << (max(bits) if chosen is not None else bits[0]), dtype=INT32)
        if chosen is not None:
            self.sorting |= {name: room(self.pairs, dtype=INT32) for name in ("chooser", "pairs_of_token")}
            self.sorting["token_begin"] = room(tokens + 1, dtype=INT32)

    def kept(self) -> int:
        """How many pairs are not dropped; behind these, rows are never written."""
        experts, first = self.w13.shape[0], self.options[-1]
        return len(reference.pairs_by_expert(len(self.x), self.ids, self.choices, experts, first)[0])

    def arguments(self) -> Arguments:
        args, s = Arguments(), Sort()
        args.tokens, args.outer = self.x.shape
        args.experts, args.inner = self.w13.shape[0], self.a.shape[1]
        args.activation, args.gated, transposed, args.interleaved, args.alpha, args.shift, args.limit, s.first = (
            self.options
        )
        args.f64 = self.acc == torch.float64
        args.x, args.w13, args.w2 = rows(self.x), matrices(self.w13, transposed), matrices(self.w2, transposed)
        for name in ("b13", "b2", "weights", "hidden", "a", "y", "out"):
            value = getattr(self, name)
            setattr(args, name, None if value is None else value.data_ptr())
        args.out_dtype = DTYPES.index(self.out.dtype)
        s.ids = operand(Ids, self.ids, *("batch", "time")[: self.ids.dim()])
        s.choices = operand(Ids, self.choices, "batch")
        s.tokens, s.experts, s.pairs, s.tile, s.parts = args.tokens, args.experts, self.pairs, self.tile, self.parts
        s.k = self.ids.shape[1] if self.choices is None else 0
        for name, value in self.sorting.items():
            setattr(s, name, value.data_ptr())
        args.sort = s
        return args

    def arrays(self) -> dict[str, tuple[Tensor | None, int]]:
        """What both passes read and write."""
        names = ("ids", "choices", "x", "weights", "w13", "w2", "b13", "b2")
        arrays = {name: (getattr(self, name), INPUT) for name in names}
        arrays |= {name: (x, OUTPUT) for name, x in self.sorting.items()}
        arrays["spare"] = (self.sorting["spare"], IN_PLACE)  # not written where keys have one digit
        arrays["token"] = (self.sorting["token"][: self.kept()], OUTPUT)
        return arrays | {"a": (self.a[: self.kept()], OUTPUT)}

    def call(self) -> Call:
        written = {
            name: (getattr(self, name)[: self.kept()], OUTPUT)
            for name in ("y", "hidden")
            if self.__dict__[name] is not None
        }
        return Call("moe_experts", 0, self.arguments(), self.arrays() | written | {"out": (self.out, OUTPUT)})

    def given(self) -> tuple[Any, ...]:
        """The arguments of the reference, in float64."""
        tensors = (self.x, self.ids, self.weights, self.choices, self.w13, self.w2, self.b13, self.b2)
        return *(t.double() if t is not None and t.is_floating_point() else t for t in tensors), *self.options

    def check(self) -> None:
        out, hidden = reference.moe_experts(*self.given(), True)
        assert_close("out", self.out, out, 4 * TOLERANCE[self.out.dtype])
        if self.hidden is not None:
            kept = self.kept()
            assert_close("hidden", self.hidden[:kept], hidden[:kept], 4 * TOLERANCE[self.acc])


NAMES = ("x", "weights", "w13", "w2", "b13", "b2")


class GradCase(Case):
    """The backward, given the hidden layer that the forward left; `wanted` of NAMES."""

    def __init__(self, hidden: Tensor, wanted: tuple[str, ...] = NAMES, **options: Any):
        super().__init__(**options)
        acc = self.acc
        self.hidden = place(hidden)
        self.parted = room(self.pairs, -(-self.a.shape[1] // TILE), dtype=acc)
        self.grad_hidden = room(*hidden.shape, dtype=acc)
        self.grads = {name: place(torch.empty_like(x)) for name in wanted if (x := getattr(self, name)) is not None}

    def call(self) -> Call:
        args, kept = self.arguments(), self.kept()
        args.grad_out, args.out = rows(self.grad_out), None
        args.grad_hidden, args.parts = self.grad_hidden.data_ptr(), self.parted.data_ptr()
        written = {"grad_hidden": self.grad_hidden[:kept], "parts": self.parted[:kept]}
        for name, grad in self.grads.items():
            if name == "x":
                args.out, written["y"] = grad.data_ptr(), self.y[:kept]
            elif name in ("w13", "w2"):
                setattr(args, f"grad_{name}", matrices(grad, self.options[2]))
            else:
                setattr(args, f"grad_{name}", grad.data_ptr())
            written[f"grad_{name}"] = grad
        given = {"hidden": (self.hidden[:kept], INPUT), "grad_out": (self.grad_out, INPUT)}
        arrays = self.arrays() | {name: (x, OUTPUT) for name, x in written.items()} | given
        return Call("moe_experts_backward", 1, args, arrays)

    def check(self) -> None:
        given = self.given()
        hidden = reference.moe_experts(*given, True)[1]
        want = dict(zip(NAMES, reference.moe_experts_backward(self.grad_out.double(), *given, hidden), strict=True))
        for name, grad in self.grads.items():
            assert_close(name, grad, want[name], 4 * TOLERANCE[grad.dtype])


def choices(experts: int, tokens: int, count: int) -> list[list[int]]:
    torch.manual_seed(count)
    return [torch.randint(tokens, (count,)).tolist() if e % 3 else [] for e in range(experts)]


CASES = {
    "one": dict(tokens=1, k=1, experts=1, outer=1, inner=1),
    "no tokens": dict(tokens=0),
    "no choice": dict(k=0),
    "all dropped": dict(ids=[[5, 5]] * 7),
    "primes": dict(tokens=13, k=3, experts=7, outer=37, inner=11),
    "one expert has everything": dict(tokens=TILE + 3, k=1, experts=3, ids=[[1]] * (TILE + 3), outer=9),
    "one expert twice in a row": dict(tokens=3, ids=[[2, 2], [0, 4], [4, 4]], id_type=INT32),
    "tiles": dict(tokens=2 * TILE + 5, k=1, experts=2, outer=TILE + 5, inner=TILE + 3),
    "few rows": dict(tokens=FEW + 3, k=1, experts=2, outer=33, inner=TILE + 1, tile=FEW),
    "transposed": dict(transposed=True, outer=33, inner=TILE + 2),
    "interleaved": dict(interleaved=True, outer=TILE + 1, inner=9),
    "gpt-oss": dict(interleaved=True, transposed=True, gate=(1.702, 1.0, 0.7), inner=11),
    "no gate": dict(gated=False, activation="relu2", transposed=True),
    "no bias": dict(biased=False, save=True),
    "a range of experts": dict(ids=[[3, 9], [4, 0], [8, 5], [7, 7], [2, 3], [10**6, 2**40], [6, 4]], first=3),
    "two digits": dict(tokens=150, k=2, experts=300, outer=1, inner=1, parts=5),
    "experts choose": dict(tokens=9, chosen=choices(7, 9, 5), outer=7),
    "experts choose of many": dict(tokens=600, chosen=choices(4, 600, TILE + 1), outer=2, inner=1, id_type=INT32),
    "experts choose nobody": dict(tokens=4, chosen=[[], [], []]),
    "experts choose among none": dict(tokens=0, chosen=[[], []]),
}


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated("moe_experts")


def both(kernels: ctypes.CDLL, seed: int, max_blocks: int = 3, **options: Any) -> tuple[Case, GradCase]:
    """A case forward, checked for errors, and backward from the hidden layer that it left."""
    forward = Case(**options)
    assert forward.call().run(kernels, seed, max_blocks) == ""
    backward = GradCase(forward.hidden, **options)
    assert backward.call().run(kernels, seed, max_blocks) == ""
    return forward, backward


@pytest.mark.parametrize("name", CASES)
def test_agrees_under_every_schedule(kernels: ctypes.CDLL, name: str) -> None:
    for seed in SEEDS[1:3]:
        for c in both(kernels, seed, **CASES[name]):
            c.check()


PAIRS = [(d, d) for d in DTYPES] + [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float16),
    (torch.float16, torch.bfloat16),
]


@pytest.mark.parametrize(("dtype", "w_dtype"), PAIRS, ids=str)
def test_dtypes(kernels: ctypes.CDLL, dtype: torch.dtype, w_dtype: torch.dtype) -> None:
    for transposed in (False, True):
        for c in both(kernels, SEEDS[-1], dtype=dtype, w_dtype=w_dtype, transposed=transposed, outer=TILE + 1):
            c.check()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_activations(kernels: ctypes.CDLL, activation: str, gated: bool) -> None:
    options = dict(activation=activation, gated=gated, dtype=torch.float64)
    for gate in ((1.0, 0.0, math.inf), *([(1.0, 0.0, 0.8)] if gated else [])):
        for c in both(kernels, SEEDS[-1], gate=gate, **options):
            c.check()


def outputs(*cases: Case) -> list[Tensor]:
    return [x for c in cases for _, x, access in c.call().given() if access == OUTPUT]


def test_any_grid_gives_the_same_bits(kernels: ctypes.CDLL) -> None:
    options = dict(tokens=40, experts=3, outer=TILE + 1, inner=9)
    runs = [outputs(*both(kernels, 0, blocks, **options)) for blocks in (1, 100)]
    assert all(map(torch.equal, *runs))


def test_any_tile_and_part_give_the_same_bits(kernels: ctypes.CDLL) -> None:
    options = dict(tokens=40, experts=3, outer=TILE + 1, inner=9)
    (f, b), (g, c) = (both(kernels, 0, tile=tile, parts=parts, **options) for tile, parts in ((FEW, 1), (TILE, 7)))
    assert torch.equal(f.out, g.out) and torch.equal(f.sorting["pair"], g.sorting["pair"])
    assert all(torch.equal(b.grads[name], c.grads[name]) for name in NAMES)


def test_a_token_is_the_same_in_any_company(kernels: ctypes.CDLL) -> None:
    many = Case(tokens=40, experts=3, outer=TILE + 1)
    few = Case(tokens=40, experts=3, outer=TILE + 1, ids=[*([[3, 3]] * 39), many.ids[39].tolist()])
    for c in (many, few):
        assert c.call().run(kernels, SEEDS[-1]) == ""
    assert torch.equal(many.out[39], few.out[39]) and many.ids[39].min() < 3


def test_without_the_hidden_layer(kernels: ctypes.CDLL) -> None:
    case = Case(save=False)
    assert case.call().run(kernels, SEEDS[-1]) == ""
    case.check()


@pytest.mark.parametrize("wanted", [(), ("x",), ("weights", "b2"), ("w13", "b13"), ("w2",)], ids=str)
def test_only_what_is_wanted(kernels: ctypes.CDLL, wanted: tuple[str, ...]) -> None:
    forward, everything = both(kernels, SEEDS[-1])
    some = GradCase(forward.hidden, wanted)
    assert some.call().run(kernels, SEEDS[-1]) == ""
    assert set(some.grads) == set(wanted)
    assert all(torch.equal(some.grads[name], everything.grads[name]) for name in wanted)


def test_ids_out_of_range_drop(kernels: ctypes.CDLL) -> None:
    """Without an error, and without touching anything that is not there; as id E does it."""
    bad = [[-1, 6], [2**63 - 1, -(2**63)], [2**32, 5]]
    options = dict(tokens=5, outer=3)
    for first in (-1, 2):
        low = max(first, 0)
        right = Case(ids=[[low + 5, low + 5]] * 3 + [[low + 1, low + 4]] * 2, first=first, **options)
        wrong = Case(ids=bad + [[low + 1, low + 4]] * 2, first=first, **options)
        if first == 2:
            wrong.ids[0, 1], wrong.ids[2, 1] = 1, 7  # 6 and 5 are experts then
        wrong.kept = right.kept
        for c in (right, wrong):
            assert c.call().run(kernels, SEEDS[-1]) == ""
        assert right.kept() == 4 and torch.equal(right.out, wrong.out)


def test_choices_out_of_range_drop(kernels: ctypes.CDLL) -> None:
    right = Case(tokens=5, chosen=[[1, 4], [], [2]])
    wrong = Case(tokens=5, chosen=[[1, 4, -1], [], [5, 2, 2**40]])
    keep = [0, 1, 4]
    right.weights.copy_(wrong.weights[keep])
    wrong.kept = right.kept
    for c in (right, wrong):
        assert c.call().run(kernels, SEEDS[-1]) == ""
    assert torch.equal(right.out, wrong.out)


@pytest.mark.parametrize(
    "offsets", [(3, 2, 9, -4), (-7, -7, -7, -7), (2**40,) * 4, (-(2**63), 4, 2, 2**63 - 1)], ids=str
)
def test_offsets_out_of_order(kernels: ctypes.CDLL, offsets: tuple[int, ...]) -> None:
    """Nothing is promised but that each pair goes to one expert or to none."""
    case = Case(tokens=5, chosen=[[1, 4, 0], [], [3, 2, 3]])
    case.choices.copy_(torch.tensor(offsets))
    experts = [bisect.bisect_left(offsets, i + 1) - 1 for i in range(6)]  # the same search
    kept = sum(0 <= e < 3 for e in experts)
    case.kept = lambda: kept
    assert case.call().run(kernels, SEEDS[-1]) == ""
    assert case.sorting["expert"].tolist() == [e if 0 <= e < 3 else 3 for e in experts]
    assert case.out.isfinite().all()


def test_address_sanitizer(tmp_path: Path) -> None:
    options = [*CASES.values(), *(dict(dtype=d, w_dtype=w) for d, w in PAIRS)]
    forward = [Case(**o) for o in options]
    for folder in ("forward", "backward"):
        (tmp_path / folder).mkdir()
    run_sanitized("moe_experts", [c.call() for c in forward], tmp_path / "forward")
    backward = [GradCase(c.hidden, **o) for c, o in zip(forward, options, strict=True)]
    run_sanitized("moe_experts", [c.call() for c in backward], tmp_path / "backward")
    for c in forward + backward:
        c.check()


SORT, FORWARD, BACKWARD = "moe/sort.cuh", "moe/experts.cuh", "moe/experts_backward.cuh"
MUTATIONS = {  # the pass, file, what is changed, what it becomes, and what must be said
    "digits before the table": (0, SORT, "__syncwarp();  // the table is set up", "", r"(undefined|race): .* table\["),
    "digits placed too late": (0, SORT, "__syncwarp();  // the table is read", "", r"race: .* table\["),
    "digits placed too early": (0, SORT, "__syncwarp();  // the table is up to date", "", r"race: .* table\["),
    "sums read too early": (
        0,
        SORT,
        "__syncthreads();  // every warp has its sum",
        "",
        r"(undefined|race): .* warps\[",
    ),
    "sums overwritten": (0, SORT, "__syncthreads();  // the sums are read", "", r"race: .* warps\["),
    "dropped rows": (0, SORT, "kept = i < s.offsets[s.experts]", "kept = true", r"out of bounds: .* token"),
    "tiles read too early": (
        0,
        FORWARD,
        "__syncthreads();  // the tiles are full",
        "",
        r"(undefined|race): .* (left|right)\[",
    ),
    "tiles filled too early": (0, FORWARD, "__syncthreads();  // the tiles are read", "", r"race: .* (left|right)\["),
    "beyond the last row": (
        0,
        FORWARD,
        "count = left < s.tile ? left : s.tile",
        "count = left < 0 ? left : s.tile",
        r"(out of bounds|race): ",
    ),
    "biases read too early": (
        1,
        BACKWARD,
        "__syncthreads();  // every warp has its sum",
        "",
        r"(undefined|race): .* sums\[",
    ),
    "biases overwritten": (1, BACKWARD, "__syncthreads();  // the sums are read", "", r"race: .* sums\["),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_kernel_is_caught(tmp_path: Path, kernels: ctypes.CDLL, name: str) -> None:
    direction, file, old, new, message = MUTATIONS[name]
    loaded = mutant("moe_experts", file, old, new, tmp_path)
    # Parts of a few pairs that mostly have one digit, and more counts than are scanned at once.
    options = dict(tokens=600, k=1, experts=4, ids=[[i // 120] for i in range(600)], outer=33, inner=2, parts=260)
    calls = [c.call() for c in both(kernels, 0, **options)]
    assert_caught(loaded, message, calls[direction])
