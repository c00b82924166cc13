"""Every environment variable that layerzoo reads, in one typed place."""

import os
from pathlib import Path


def _choice(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def native() -> str:
    """LAYERZOO_NATIVE: "auto" uses the native library where it loads, "0" never, "require" raises where it does not."""
    return _choice("LAYERZOO_NATIVE", "auto", ("auto", "0", "require"))


def cpu() -> str | None:
    """LAYERZOO_CPU: the instruction set of the kernels; None for the best that the processor has."""
    return _choice("LAYERZOO_CPU", "", ("", "default", "avx2", "avx512")) or None


def plugins() -> str:
    """LAYERZOO_PLUGINS: "" for all, "none", an allow list "a,b" or "deny:a,b"."""
    return os.environ.get("LAYERZOO_PLUGINS", "")


def caps() -> dict[str, str | None]:
    """What caps the instruction sets of torch and its libraries, and ours: a benchmark records it."""
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return {"LAYERZOO_CPU": cpu(), **{name: os.environ.get(name) for name in names}}


def check() -> bool:
    """LAYERZOO_CHECK=1: look at values (ids, marks) on CUDA too, at the price of a synchronisation."""
    return _choice("LAYERZOO_CHECK", "0", ("0", "1")) == "1"


def cache() -> Path:
    """The folder for what can be made again, in XDG_CACHE_HOME or ~/.cache; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "layerzoo")
