"""The CUDA source of causal_conv1d, run without a GPU: compiled by g++ and executed in the emulator against numpy."""

import ctypes
import random
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulation"))
from emulation import COMPILER, CSRC, HERE, compile_kernels, library, program

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulator needs g++ on Linux")

CHANNELS, STEPS = 32, 128  # of a tile; test_tile holds them to the source
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of csrc/common/dtype.h
TOLERANCE = {torch.float32: 3e-7, torch.float64: 1e-15, torch.bfloat16: 4e-3, torch.float16: 5e-4}
INPUT, OUTPUT = 0, 1
PAD = 256  # elements of no array on both sides of each


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]
    _fields_ += [(n, ctypes.c_int64) for n in ("batch", "channel", "time")]


class Arguments(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("b", "d", "l", "w")]
    _fields_ += [(n, Operand) for n in ("x", "out", "weight", "bias", "initial")]
    _fields_ += [("final_state", ctypes.c_void_p), ("seq_idx", ctypes.c_void_p)]
    _fields_ += [("seq_batch", ctypes.c_int64), ("seq_time", ctypes.c_int64)]
    _fields_ += [("seq_int64", ctypes.c_bool), ("silu", ctypes.c_bool)]


def span(x: Tensor) -> int:
    """Elements from the first to the last one of a strided tensor."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def place(x: Tensor) -> Tensor:
    """The same values and strides in memory of their own, with room around; gaps and room hold NaN (or 2^31 - 1)."""
    filler = torch.nan if x.is_floating_point() else 2**31 - 1
    flat = torch.full((span(x) + 2 * PAD,), filler, dtype=x.dtype)
    return flat.as_strided(x.shape, x.stride(), PAD).copy_(x)


def operand(x: Tensor | None, axes: str) -> Operand:
    if x is None:
        return Operand()
    strides = dict(zip(axes, x.stride(), strict=True))
    return Operand(x.data_ptr(), DTYPES.index(x.dtype), *(strides.get(a, 0) for a in "bct"))


@dataclass
class Case:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None
    seq_idx: Tensor | None
    silu: bool
    seed: int = 0

    def __post_init__(self) -> None:
        b, d, _ = self.x.shape
        self.out = place(torch.empty_like(self.x))
        self.final = place(torch.empty(b, d, self.weight.shape[1] - 1, dtype=self.x.dtype))

    def arrays(self) -> list[Tensor | None]:
        return [self.out, self.final, self.x, self.weight, self.bias, self.initial, self.seq_idx]

    def arguments(self) -> Arguments:
        seq = self.seq_idx
        args = Arguments(*self.x.shape, self.weight.shape[1])
        args.x, args.out, args.initial = (operand(x, "bct") for x in (self.x, self.out, self.initial))
        args.weight, args.bias, args.silu = operand(self.weight, "ct"), operand(self.bias, "c"), self.silu
        args.final_state = self.final.data_ptr()
        if seq is not None:
            args.seq_idx, args.seq_int64 = seq.data_ptr(), seq.dtype == torch.int64
            args.seq_batch, args.seq_time = seq.stride()
        return args

    def run(self, emulated: ctypes.CDLL, seed: int, max_blocks: int = 3) -> str:
        self.seed = seed
        emulated.emu_reset(seed)
        for name, x in zip(("out", "final", "x", "weight", "bias", "initial", "seq_idx"), self.arrays(), strict=True):
            if x is not None:
                access = OUTPUT if name in ("out", "final") else INPUT
                emulated.emu_array(name.encode(), x.data_ptr(), span(x) * x.itemsize, x.itemsize, access)
        return emulated.causal_conv1d(ctypes.byref(self.arguments()), max_blocks).decode()

    def check(self) -> None:
        out, final = oracle(self)
        error = np.linalg.norm(numpy(self.out) - out) / max(np.linalg.norm(out), 1e-30)
        assert error <= TOLERANCE[self.x.dtype], f"out is off by {error:.1e} in norm, seed {self.seed}"
        copies = torch.from_numpy(final).to(self.x.dtype)
        assert torch.equal(self.final, copies), f"final states are not copies, seed {self.seed}"


def numpy(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def oracle(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """In fp64, from the definition: the sequence with its initial state to the left, and one product for each tap."""
    x, weight = numpy(case.x), numpy(case.weight)
    (b, d, length), width = x.shape, weight.shape[1]
    left = np.zeros((b, d, width - 1)) if case.initial is None else numpy(case.initial)
    whole = np.concatenate([left, x], axis=2)
    out = np.zeros((b, d, length)) + (0 if case.bias is None else numpy(case.bias)[:, None])
    ids = np.zeros((b, length), int) if case.seq_idx is None else case.seq_idx.numpy()
    whole_ids = np.concatenate([np.repeat(ids[:, :1], width - 1, axis=1), ids], axis=1)
    for k in range(width if length else 0):
        same = whole_ids[:, k : k + length] == ids
        out += weight[:, k, None] * np.where(same[:, None], whole[:, :, k : k + length], 0)
    if case.silu:
        out /= 1 + np.exp(-out)
    return np.where(ids[:, None] < 0, 0, out), whole[:, :, length:]


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
SEEDS = [0, 1, *(random.randrange(2, 2**32) for _ in range(3))]  # a failure names its seed


@pytest.fixture(scope="module")
def emulated() -> ctypes.CDLL:
    loaded = library(compile_kernels(HERE / "causal_conv1d.cpp", "hooks", "causal_conv1d"))
    return declare(loaded)


def declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    loaded.causal_conv1d.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.causal_conv1d.restype = ctypes.c_char_p
    return loaded


def test_tile(emulated: ctypes.CDLL) -> None:
    assert (emulated.causal_conv1d_tile_channels(), emulated.causal_conv1d_tile_steps()) == (CHANNELS, STEPS)


@pytest.mark.parametrize("name", CASES)
def test_agrees_under_every_schedule(emulated: ctypes.CDLL, name: str) -> None:
    for seed in SEEDS:
        c = case(**CASES[name])
        assert c.run(emulated, seed) == ""
        c.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 3, 4, 5])
def test_dtypes(emulated: ctypes.CDLL, dtype: torch.dtype, width: int) -> None:
    c = case((2, 3, STEPS + 1), width, "channel-last", initial=True, ids=torch.int64, dtype=dtype)
    assert c.run(emulated, SEEDS[-1]) == ""
    c.check()


def test_any_grid_gives_the_same_bits(emulated: ctypes.CDLL) -> None:
    results = []
    for blocks in (1, 2, 100):
        c = case(**CASES["chunks"])
        assert c.run(emulated, 0, blocks) == ""
        results.append(c.out.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_address_sanitizer(tmp_path: Path) -> None:
    cases = [case(**options) for options in CASES.values()] + [case((1, 3, 40), 4, dtype=d) for d in DTYPES]
    with (tmp_path / "in").open("wb") as f:
        for c in cases:
            spans = [None if x is None else x.as_strided((span(x),), (1,)) for x in c.arrays()]
            f.write(struct.pack("8q", SEEDS[-1], *(-1 if x is None else x.numel() * x.itemsize for x in spans)))
            f.write(bytes(c.arguments()))
            f.writelines(x.view(torch.uint8).numpy().tobytes() for x in spans if x is not None and x.numel())
    run = program(compile_kernels(HERE / "causal_conv1d.cpp", "asan", "causal_conv1d.asan"), "asan")
    done = subprocess.run([run, tmp_path / "in", tmp_path / "out"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    results = (tmp_path / "out").read_bytes()
    for c in cases:
        for x in (c.out, c.final):
            size = span(x) * x.itemsize
            if size:
                x.as_strided((span(x),), (1,)).copy_(torch.frombuffer(bytearray(results[:size]), dtype=x.dtype))
            results = results[size:]
        c.check()
    assert results == b""


MUTATIONS = {  # in causal_conv1d.cuh: the line that is changed, what it becomes, and what must be said
    "no barrier after the fill": (
        "__syncthreads();  // tile, taps and ids are full",
        "",
        r"(undefined|race): .* (tile|taps)\[",
    ),
    "no barrier before the results": ("__syncthreads();  // all have read the tile", "", r"race: .* tile\["),
    "no barrier after the results": ("__syncthreads();  // the tile holds results", "", r"race: .* tile\["),
    "no barrier before the next tile": (
        "__syncthreads();  // results are stored, the tile is free",
        "",
        r"race: .* tile\[",
    ),
    "halo not filled": (
        "for (int n = thread; n < kTileChannels * halo;",
        "for (int n = 1 << 20; n < 0;",
        r"undefined: .* tile\[",
    ),
    "tail not guarded": (
        "if (channel < a.d && t < a.l)\n",
        "if (channel < a.d)\n",
        r"(out of bounds|race): .* (out|final)\[",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_kernel_is_caught(tmp_path: Path, name: str) -> None:
    old, new, message = MUTATIONS[name]
    for folder in ("common", "ssm"):
        (tmp_path / folder).mkdir()
    for path in (*CSRC.glob("common/*.h"), CSRC / "ssm/causal_conv1d.cuh"):
        (tmp_path / path.relative_to(CSRC)).write_text(path.read_text())
    kernel = tmp_path / "ssm/causal_conv1d.cuh"
    assert kernel.read_text().count(old) == 1
    kernel.write_text(kernel.read_text().replace(old, new))
    source = HERE / "causal_conv1d.cpp"
    mutant = declare(library(compile_kernels(source, "hooks", f"mutant {name}", csrc=tmp_path)))
    for seed in SEEDS:
        assert re.search(message, case((1, CHANNELS + 3, 2 * STEPS + 5), 4).run(mutant, seed, max_blocks=1))
