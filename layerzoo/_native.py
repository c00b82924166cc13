"""Loads the native libraries, and says what was loaded and why not."""

import ctypes
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from layerzoo import env

SETS = ("default", "avx2", "avx512")
_FOLDER = Path(__file__).parent
_warned: set[str] = set()


@dataclass(frozen=True)
class NativeStatus:
    """What this process has: `isa` is the instruction set in use, `available` what this machine and build could use."""

    loaded: bool
    reason: str  # why not, or ""
    library: str | None = None
    isa: str = "none"
    available: tuple[str, ...] = ()
    cuda: str = ""
    handle: ctypes.CDLL | None = field(default=None, repr=False, compare=False)


def _load_cuda() -> str:
    path = _FOLDER / "_ops_cuda.so"
    if not path.exists():
        return "not built (LAYERZOO_CUDA=1 at installation builds it)"
    if torch.version.cuda is None:
        return "built, not loaded: this torch has no CUDA"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"built, not loaded: {error}"
    return f"loaded ({path.name})" + ("" if torch.cuda.is_available() else ", but torch sees no GPU")


def _open() -> NativeStatus:
    path = _FOLDER / "_ops.so"
    if env.native() == "0":
        return NativeStatus(False, "LAYERZOO_NATIVE=0")
    if not path.exists():
        return NativeStatus(
            False, f"{path.name} was not built: reinstall with a C++ compiler, torch, ninja and pybind11 at hand"
        )
    try:
        torch.ops.load_library(path)
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        return NativeStatus(False, f"{path.name} does not load with torch {torch.__version__}: {error}")
    handle.layerzoo_select.restype = handle.layerzoo_error.restype = ctypes.c_char_p
    handle.layerzoo_calls.restype = ctypes.c_int64
    isa = handle.layerzoo_select((env.cpu() or "").encode())
    if isa is None:
        why = handle.layerzoo_error().decode()
        if env.cpu():
            raise ValueError(f"LAYERZOO_CPU={env.cpu()}: {why}")
        return NativeStatus(False, f"no kernels: {why}")
    available = tuple(
        name for name in SETS if (_FOLDER / f"_cpu_{name}.so").exists() and handle.layerzoo_cpu_has(name.encode())
    )
    return NativeStatus(True, "", str(path), isa.decode(), available, _load_cuda(), handle)


@cache
def status() -> NativeStatus:
    """Loads the libraries at the first call. Raises ImportError where LAYERZOO_NATIVE=require and they do not load."""
    found = _open()
    if not found.loaded and env.native() == "require":
        raise ImportError(f"LAYERZOO_NATIVE=require, but {found.reason}")
    return found


def calls(op: str) -> int:
    """How often the native kernel of `op` ran in this process."""
    handle = status().handle
    return int(handle.layerzoo_calls(op.encode())) if handle else 0


def warn_fallback(op: str, device: torch.device) -> None:
    """Says once per op that it runs in plain PyTorch, and why."""
    if op in _warned:
        return
    _warned.add(op)
    reason = status().reason if device.type == "cpu" else f"there is no kernel for {device.type}"
    warnings.warn(f"layerzoo: {op} runs in plain PyTorch, which is slow: {reason}", RuntimeWarning, stacklevel=3)
