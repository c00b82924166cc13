"""The binaries: one op library for every torch from 2.10 on, and kernels of one set that are nobody else's copy."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import layerzoo

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not (shutil.which("nm") and shutil.which("readelf")), reason="needs nm and readelf (binutils)"),
]
FOLDER = Path(layerzoo.__file__).parent
KERNELS = sorted(path.name for path in FOLDER.glob("_cpu_*.so"))
# Torch's stable C shim; the C++ runtime and libc, which version their symbols; what every shared object refers to.
SHIM = re.compile(r"(aoti_)?torch_\w+")
RUNTIME = re.compile(r"\S+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
WEAK = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__", "__cxa_finalize"}


def symbols(library: str, which: str) -> list[tuple[str, str]]:
    """(type, name) of the dynamic symbols, `which` being --undefined-only or --defined-only."""
    command = ["nm", "-D", "-P", which, str(FOLDER / library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [(line.split()[1], line.split()[0]) for line in lines]


def needed(library: str) -> set[str]:
    text = subprocess.run(["readelf", "-d", str(FOLDER / library)], capture_output=True, text=True, check=True).stdout
    return {name.split(".so")[0] for name in re.findall(r"NEEDED\).*\[(.*)\]", text)}


def foreign(library: str, shim: bool) -> list[str]:
    """Symbols that come from neither the runtime nor, where that is allowed, torch's shim."""
    names = [name for _, name in symbols(library, "--undefined-only")]
    allowed = (RUNTIME, SHIM) if shim else (RUNTIME,)
    return [name for name in names if name not in WEAK and not any(known.fullmatch(name) for known in allowed)]


def test_the_op_library_links_nothing_of_torch_but_the_shim() -> None:
    assert foreign("_ops.so", shim=True) == []
    assert needed("_ops.so") <= {"libtorch_cpu", "libstdc++", "libgcc_s", "libm", "libc", "libdl", "libpthread"}
    names = " ".join(name for _, name in symbols("_ops.so", "--defined-only"))
    assert not re.search(r"_ZN?K?2at|_ZN?K?3c10|_ZN?K?5torch", names)  # nor offers copies of its inline functions


@pytest.mark.parametrize("library", KERNELS)
def test_kernels_need_only_libc_and_export_one_function(library: str) -> None:
    assert foreign(library, shim=False) == []
    assert needed(library) <= {"libc", "libm", "libgcc_s"}
    assert symbols(library, "--defined-only") == [("T", "layerzoo_kernels")]


def test_there_is_a_library_of_kernels_for_every_machine() -> None:
    assert "_cpu_default.so" in KERNELS


def test_introspection_needs_no_torch() -> None:
    (module,) = FOLDER.glob("_C.*.so")
    assert not any("torch" in name or "python" in name for name in needed(module.name))
