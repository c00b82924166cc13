"""Compiles device code with g++ against the emulator, in its two builds (see emulator.cpp)."""

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++") if sys.platform == "linux" else None

CHECKS = {  # build: flags of kernels, of the runtime, of the linker
    "asan": (["-Og", "-fsanitize=address,undefined"],) * 3,  # -O1 takes g++ ten times as long
    "hooks": (["-fsanitize=thread"], [], []),  # libtsan is not linked: the runtime defines the hooks
    "hooks+ubsan": (["-fsanitize=thread,undefined"], [], ["-fsanitize=undefined"]),
}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def _compile(*arguments: object) -> None:
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Werror", "-fno-sanitize-recover=all"]
    command = [COMPILER, *flags, f"-I{HERE}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"


@functools.cache
def _runtime(build: str) -> Path:
    target = Path(_folder().name, f"emulator.{build}.o")
    _compile(*CHECKS[build][1], "-c", HERE / "emulator.cpp", "-o", target)
    return target


def compile_kernels(source: Path, build: str, name: str, *flags: str, csrc: Path = CSRC) -> Path:
    """The object file of `source`; `csrc` may be an altered copy of the tree."""
    target = Path(_folder().name, f"{name}.o")
    kernels = [*CHECKS[build][0], "--param", "tsan-instrument-func-entry-exit=0", f"-I{csrc}"]
    _compile(*kernels, *flags, "-c", source, "-o", target)
    return target


@functools.cache
def program(kernels: Path, build: str) -> Path:
    target = kernels.with_suffix("")
    _compile(*CHECKS[build][2], kernels, _runtime(build), "-o", target)
    return target


def library(kernels: Path) -> ctypes.CDLL:
    """Of a "hooks" build."""
    target = kernels.with_suffix(".so")
    _compile("-shared", kernels, _runtime("hooks"), "-o", target)
    loaded = ctypes.CDLL(str(target))
    loaded.emu_array.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int]
    loaded.emu_reset.argtypes = [ctypes.c_uint64]
    return loaded
