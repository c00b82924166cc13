"""The CUDA source of causal_conv1d, run without a GPU: compiled by g++ and executed in the emulator against numpy."""

import ctypes
import sys
from dataclasses import dataclass
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
    TOLERANCE,
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++ on Linux"),
]

CHANNELS, STEPS = 32, 128  # of a tile; test_tile holds them to the source
BCT = ("batch", "channel", "time")


class Arguments(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("b", "d", "l", "w")]
    _fields_ += [(n, Operand) for n in ("x", "out", "weight", "bias", "initial", "grad_out")]
    _fields_ += [("final_state", ctypes.c_void_p), ("seq_idx", Ids), ("silu", ctypes.c_bool)]


class GradArguments(ctypes.Structure):
    _fields_ = [("conv", Arguments)]
    _fields_ += [(n, Operand) for n in ("grad_x", "grad_final", "grad_initial")]
    _fields_ += [(n, ctypes.c_void_p) for n in ("weight_parts", "bias_parts")]
    _fields_ += [(n, Operand) for n in ("grad_weight", "grad_bias")]


def numpy(x: Tensor | None) -> np.ndarray | None:
    return None if x is None else x.double().numpy()


def contiguous(x: Tensor | None) -> Operand:
    return Operand() if x is None else Operand(x.data_ptr(), DTYPES.index(x.dtype))


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None
    seq_idx: Tensor | None
    silu: bool

    def __post_init__(self) -> None:
        (b, d, _), w = self.x.shape, self.weight.shape[1]
        self.inputs = {name: (getattr(self, name), INPUT) for name in ("x", "weight", "bias", "initial", "seq_idx")}
        ids = None if self.seq_idx is None else self.seq_idx.numpy()
        x, weight, bias, initial = map(numpy, (self.x, self.weight, self.bias, self.initial))
        self.oracle = (x, weight, bias, ids, initial, self.silu)
        self.out = place(torch.empty_like(self.x))
        self.final = room(b, d, w - 1, dtype=self.x.dtype)

    def arguments(self) -> Arguments:
        args = Arguments(*self.x.shape, self.weight.shape[1], silu=self.silu)
        args.x, args.out, args.initial = (operand(Operand, x, *BCT) for x in (self.x, self.out, self.initial))
        args.weight = operand(Operand, self.weight, "channel", "time")
        args.bias, args.seq_idx = operand(Operand, self.bias, "channel"), operand(Ids, self.seq_idx, "batch", "time")
        args.final_state = self.final.data_ptr()
        return args

    def call(self) -> Call:
        outputs = {"out": (self.out, OUTPUT), "final": (self.final, OUTPUT)}
        return Call("causal_conv1d", 0, self.arguments(), outputs | self.inputs)

    def check(self) -> None:
        out, final = oracle.causal_conv1d(*self.oracle)
        oracle.assert_close("out", self.out, out, TOLERANCE[self.x.dtype])
        assert torch.equal(self.final, torch.from_numpy(final).to(self.x.dtype)), "final states are not copies"


class GradCase(Case):
    """The backward of a case, with random gradients of both outputs, or of the first alone."""

    def __init__(self, forward: Case, grad_final: bool = True):
        super().__init__(*(getattr(forward, name) for name in Case.__dataclass_fields__))
        (b, d, length), w = self.x.shape, self.weight.shape[1]
        acc = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        self.grad_out = place(torch.randn(b, length, d, dtype=self.x.dtype).transpose(1, 2))
        self.grad_final = place(torch.randn(b, d, w - 1, dtype=self.x.dtype)) if grad_final else None
        self.parts = b * -(-(length + (w - 1 if self.initial is not None else 0)) // STEPS)
        self.scratch = {
            "between": room(b, d, length, dtype=acc),
            "weight_parts": room(self.parts, d, w, dtype=acc),
            "bias_parts": room(self.parts, d, dtype=acc),
        }
        self.grads = {
            name: None if x is None else place(torch.empty_like(x))
            for name, x in (("x", self.x), ("initial", self.initial), ("weight", self.weight), ("bias", self.bias))
        }

    def call(self) -> Call:
        args = GradArguments(conv=self.arguments())
        args.conv.grad_out, args.conv.final_state = operand(Operand, self.grad_out, *BCT), None
        args.conv.out = operand(Operand, self.scratch["between"], *BCT)
        args.grad_x, args.grad_initial = (operand(Operand, self.grads[n], *BCT) for n in ("x", "initial"))
        args.grad_final = operand(Operand, self.grad_final, *BCT)
        args.weight_parts, args.bias_parts = (self.scratch[n].data_ptr() for n in ("weight_parts", "bias_parts"))
        args.grad_weight, args.grad_bias = contiguous(self.grads["weight"]), contiguous(self.grads["bias"])
        written = {f"grad_{name}": (x, OUTPUT) for name, x in self.grads.items()}
        written |= {name: (x, OUTPUT) for name, x in self.scratch.items()}
        given = {"grad_out": (self.grad_out, INPUT), "grad_final": (self.grad_final, INPUT)}
        return Call("causal_conv1d_backward", 1, args, written | given | self.inputs)

    def check(self) -> None:
        final = np.zeros(self.final.shape) if self.grad_final is None else numpy(self.grad_final)
        want = oracle.causal_conv1d_gradients(numpy(self.grad_out), final, *self.oracle)
        want["initial"] = want.pop("initial_states")
        for name, grad in self.grads.items():
            if grad is not None:
                oracle.assert_close(name, grad, want[name], TOLERANCE[grad.dtype])


def strided(shape: tuple[int, int, int], layout: str) -> Tensor:
    b, d, length = shape
    if layout == "time-last":
        return torch.randn(shape)
    if layout == "channel-last":
        return torch.randn(b, length, d).transpose(1, 2)
    return torch.randn(b, length, 2 * d).transpose(1, 2)[:, :d]  # one half of a projection: neither is dense


def case(
    shape: tuple[int, int, int],
    width: int,
    layout: str = "time-last",
    *,
    bias: bool = True,
    initial: bool = False,
    ids: torch.dtype | None = None,
    silu: bool = True,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
) -> Case:
    torch.manual_seed(width)
    b, d, length = shape
    weights = weights or dtype
    seq_idx = None
    if ids:  # runs of some steps, with padding (-1) on the right
        seq_idx = torch.arange(length).repeat(b, 1).div(11, rounding_mode="floor").to(ids)
        seq_idx[:, length - length // 8 :] = -1
    return Case(
        place(strided(shape, layout).to(dtype)),
        place(torch.randn(d, width).to(weights)),
        place(torch.randn(d).to(weights)) if bias else None,
        place(torch.randn(b, d, width - 1).to(weights)) if initial else None,
        None if seq_idx is None else place(seq_idx),
        silu,
    )


CASES = {
    "one": dict(shape=(1, 1, 1), width=4),
    "width 1": dict(shape=(1, 2, 5), width=1, initial=True),
    "no steps": dict(shape=(2, 3, 0), width=4, initial=True),
    "no steps, no state": dict(shape=(2, 3, 0), width=3),
    "no batch": dict(shape=(0, 3, 5), width=3),
    "shorter than the state": dict(shape=(2, 3, 2), width=4, initial=True, layout="channel-last"),
    "shorter, zeros": dict(shape=(2, 3, 1), width=4),
    "tile - 1": dict(shape=(1, CHANNELS - 1, STEPS - 1), width=2, layout="channel-last", initial=True),
    "tile": dict(shape=(2, CHANNELS, STEPS), width=3, bias=False),
    "tile + 1": dict(shape=(1, CHANNELS + 1, STEPS + 1), width=4, layout="half", initial=True, silu=False),
    "chunks": dict(shape=(1, 2 * CHANNELS + 3, 3 * STEPS + 5), width=4, layout="half", initial=True),
    "packed": dict(shape=(2, 5, STEPS + 40), width=4, ids=torch.int32, layout="channel-last"),
    "packed, with state": dict(shape=(2, 5, 30), width=3, ids=torch.int64, initial=True),
    "wide": dict(shape=(1, 3, STEPS + 2), width=9, initial=True, ids=torch.int32),
    "wider than the sequence": dict(shape=(1, 2, 7), width=21, initial=True),
    "wider than a tile": dict(shape=(1, 2, STEPS + 9), width=STEPS + 7, layout="channel-last"),
    "fp32 weights": dict(shape=(1, 3, 50), width=4, initial=True, dtype=torch.bfloat16, weights=torch.float32),
}
PASSES = {"forward": lambda c: c, "backward": GradCase}


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    return emulated("causal_conv1d")


def test_tile(kernels: ctypes.CDLL) -> None:
    assert (kernels.causal_conv1d_tile_channels(), kernels.causal_conv1d_tile_steps()) == (CHANNELS, STEPS)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("name", CASES)
def test_agrees_under_every_schedule(kernels: ctypes.CDLL, name: str, direction: str) -> None:
    for seed in SEEDS:
        c = PASSES[direction](case(**CASES[name]))
        assert c.call().run(kernels, seed) == ""
        c.check()


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_dtypes(kernels: ctypes.CDLL, dtype: torch.dtype, width: int, direction: str) -> None:
    c = PASSES[direction](case((2, 3, STEPS + 1), width, "channel-last", initial=True, ids=torch.int64, dtype=dtype))
    assert c.call().run(kernels, SEEDS[-1]) == ""
    c.check()


def test_backward_without_a_gradient_of_the_state(kernels: ctypes.CDLL) -> None:
    c = GradCase(case(**CASES["packed, with state"]), grad_final=False)
    assert c.call().run(kernels, SEEDS[-1]) == ""
    c.check()


def test_what_stands_at_padding_does_not_matter(kernels: ctypes.CDLL) -> None:
    c = GradCase(case(**CASES["packed"]))
    c.x.copy_(c.x.masked_fill((c.seq_idx < 0)[:, None], torch.nan))
    assert c.call().run(kernels, SEEDS[-1]) == ""
    c.oracle = (np.nan_to_num(c.oracle[0]), *c.oracle[1:])
    c.check()


@pytest.mark.parametrize("direction", PASSES)
def test_any_grid_gives_the_same_bits(kernels: ctypes.CDLL, direction: str) -> None:
    results = []
    for blocks in (1, 2, 100):
        call = PASSES[direction](case(**CASES["chunks"])).call()
        assert call.run(kernels, 0, blocks) == ""
        results.append([x.clone() for _, x, access in call.given() if access == OUTPUT])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_address_sanitizer(tmp_path: Path) -> None:
    forward = [case(**options) for options in CASES.values()] + [case((1, 3, 40), 4, dtype=d) for d in DTYPES]
    all_cases = forward + [GradCase(c) for c in forward]
    run_sanitized("causal_conv1d", [c.call() for c in all_cases], tmp_path)
    for c in all_cases:
        c.check()


MUTATIONS = {  # the pass, the line of causal_conv1d.cuh that is changed, what it becomes, and what must be said
    "no barrier after the fill": (
        "forward",
        "__syncthreads();  // tile, taps and ids are full",
        "",
        r"(undefined|race): .* (tile|taps)\[",
    ),
    "no barrier before the results": ("forward", "__syncthreads();  // all have read the tile", "", r"race: .* tile\["),
    "no barrier after the results": ("forward", "__syncthreads();  // the tile holds results", "", r"race: .* tile\["),
    "no barrier before the next tile": (
        "forward",
        "__syncthreads();  // results are stored, the tile is free",
        "",
        r"race: .* tile\[",
    ),
    "halo not filled": (
        "forward",
        "for (int n = thread; n < kTileChannels * halo;",
        "for (int n = 1 << 20; n < 0;",
        r"undefined: .* tile\[",
    ),
    "tail not guarded": (
        "forward",
        "if (channel < a.d && t < a.l)\n",
        "if (channel < a.d)\n",
        r"(out of bounds|race): .* (out|final)\[",
    ),
    "gradients overwrite inputs": ("backward", "__syncthreads();  // inputs are in registers", "", r"race: .* tile\["),
    "no barrier before the taps": (
        "backward",
        "__syncthreads();  // gradients and taps are full",
        "",
        r"(undefined|race): .* (tile|taps)\[",
    ),
    "sums overwrite gradients": (
        "backward",
        "__syncthreads();  // all have read the gradients",
        "",
        r"race: .* tile\[",
    ),
    "sums read too early": ("backward", "__syncthreads();  // the tile holds sums", "", r"(undefined|race): .* tile\["),
    "one block's sums for all": (
        "backward",
        "part = b * step_tiles + item % step_tiles;",
        "part = b;",
        r"undefined: .* weight_parts\[",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_kernel_is_caught(tmp_path: Path, name: str) -> None:
    direction, old, new, message = MUTATIONS[name]
    loaded = mutant("causal_conv1d", "ssm/causal_conv1d.cuh", old, new, tmp_path)
    assert_caught(loaded, message, PASSES[direction](case((1, CHANNELS + 3, 2 * STEPS + 5), 4)).call())
