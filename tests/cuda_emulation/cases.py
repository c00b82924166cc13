"""Calls of emulated kernels: tensors as arrays of their own, arguments as structs, and both builds that run them."""

import ctypes
import random
import re
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from emulation import CSRC, HERE, compile_kernels, library, program
from torch import Tensor

INPUT, OUTPUT, IN_PLACE = range(3)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of csrc/common/dtype.h
# Of what is summed over a few numbers, relative in norm; float32 and float64 are computed in themselves.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 3e-15, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SEEDS = [0, 1, *(random.randrange(2, 2**32) for _ in range(3))]  # a failure names its seed
PAD = 256  # elements of no array on both sides of each


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]
    _fields_ += [(n, ctypes.c_int64) for n in ("batch", "channel", "time")]


class HeadOperand(Operand):
    _fields_ = [("head", ctypes.c_int64)]


class Heads(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]
    _fields_ += [(n, ctypes.c_int64) for n in ("batch", "time", "head", "lane")]


class Ids(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("time", ctypes.c_int64), ("wide", ctypes.c_bool)]


def operand(kind: type[ctypes.Structure], x: Tensor | None, *axes: str) -> ctypes.Structure:
    """`x` as a struct of csrc/common; `axes` are the struct's strides in the order of x's dimensions."""
    if x is None:
        return kind()
    last = {"wide": x.dtype == torch.int64} if kind is Ids else {"dtype": DTYPES.index(x.dtype)}
    return kind(data=x.data_ptr(), **dict(zip(axes, x.stride(), strict=True)), **last)


def span(x: Tensor) -> int:
    """Elements from the first to the last one of a strided tensor."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0


def flat(x: Tensor) -> Tensor:
    return x.as_strided((span(x),), (1,))


def place(x: Tensor) -> Tensor:
    """The same values and strides in memory of their own with room around; gaps and room hold NaN or large integers."""
    filler = torch.nan if x.is_floating_point() or x.is_complex() else torch.iinfo(x.dtype).max
    room = torch.full((span(x) + 2 * PAD,), filler, dtype=x.dtype)
    return room.as_strided(x.shape, x.stride(), PAD).copy_(x)


def room(*sizes: int, dtype: torch.dtype) -> Tensor:
    return place(torch.empty(sizes, dtype=dtype))


@dataclass
class Call:
    """One call of a function of a file of tests/cuda_emulation, `index` being its place in that file's list."""

    function: str
    index: int
    arguments: ctypes.Structure
    arrays: dict[str, tuple[Tensor | None, int]]  # with its access; None is left out

    def given(self) -> list[tuple[str, Tensor, int]]:
        return [(name, x, access) for name, (x, access) in self.arrays.items() if x is not None]

    def run(self, emulated: ctypes.CDLL, seed: int, max_blocks: int = 3) -> str:
        emulated.emu_reset(seed)
        for name, x, access in self.given():
            emulated.emu_array(name.encode(), x.data_ptr(), span(x) * x.itemsize, x.itemsize, access)
        function = getattr(emulated, self.function)
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_char_p
        return function(ctypes.byref(self.arguments), max_blocks).decode()


def emulated(op: str) -> ctypes.CDLL:
    """The kernels of tests/cuda_emulation/<op>.cpp, loaded."""
    return library(compile_kernels(HERE / f"{op}.cpp", "hooks", op))


def run_sanitized(op: str, calls: Sequence[Call], folder: Path) -> None:
    """Runs calls under AddressSanitizer in a process of its own; their arrays then hold what they wrote."""
    with (folder / "in").open("wb") as f:
        for call in calls:
            given = call.given()
            f.write(struct.pack("4q", call.index, SEEDS[-1], ctypes.sizeof(call.arguments), len(given)))
            for _, x, access in given:
                f.write(struct.pack("3q", x.data_ptr(), span(x) * x.itemsize, access))
            f.write(bytes(call.arguments))
            f.writelines(flat(x).view(torch.uint8).numpy().tobytes() for _, x, _ in given if x.numel())
    run = program(compile_kernels(HERE / f"{op}.cpp", "asan", f"{op}.asan"), "asan")
    done = subprocess.run([run, folder / "in", folder / "out"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = (folder / "out").read_bytes()
    for call in calls:
        for _, x, access in call.given():
            size = span(x) * x.itemsize if access != INPUT else 0
            if size:
                flat(x).copy_(torch.frombuffer(bytearray(results[:size]), dtype=x.dtype))
            results = results[size:]
    assert results == b""


def mutant(op: str, file: str, old: str, new: str, folder: Path) -> ctypes.CDLL:
    """The kernels of `op`, for float32 alone, from a copy of the tree in which `old`, once in `file`, is `new`."""
    for path in (*CSRC.glob("*/*.h"), *CSRC.glob("*/*.cuh")):
        target = folder / path.relative_to(CSRC)
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text())
    kernel = folder / file
    assert kernel.read_text().count(old) == 1
    kernel.write_text(kernel.read_text().replace(old, new))
    name = f"mutant of {op} in {folder.name}"
    return library(compile_kernels(HERE / f"{op}.cpp", "hooks", name, "-DLZ_FLOAT_ONLY", csrc=folder))


def assert_caught(loaded: ctypes.CDLL, message: str, call: Call, max_blocks: int = 1) -> None:
    for seed in SEEDS:
        said = call.run(loaded, seed, max_blocks)
        assert re.search(message, said), said
