"""Native libraries of layerzoo; everything else about the package is in pyproject.toml.

Without torch in the build environment, or without a C++ compiler, the package installs in pure Python and says so.
LAYERZOO_CUDA=1 builds the CUDA library too (it needs nvcc); the default is 0.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

COMMON = ["-O3", "-g0", "-fvisibility=hidden"]
KERNEL = [
    "-std=c++20",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
    "-ffp-contract=fast",
]
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the oldest torch that the op library runs on: 2.10
SETS = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    SETS["avx512"] = [*SETS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]


def why_pure_python() -> str:
    """The reason why nothing native can be built here, or an empty string."""
    if os.environ.get("LAYERZOO_NATIVE") == "0":
        return "LAYERZOO_NATIVE=0"
    if sys.platform != "linux":
        return f"kernels are built on Linux only, this is {sys.platform}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}) on the PATH"
    try:
        import pybind11  # noqa: F401
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"the build environment lacks {error.name} (without build isolation: torch, pybind11, ninja first)"
    return ""


def sources(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc").rglob(pattern))


def cuda_library(ext: Extension) -> Extension:
    """Links the CUDA runtime in: one file then loads beside the runtime of any torch."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("layerzoo: LAYERZOO_CUDA=1 needs nvcc on the PATH")
    plan = subprocess.run([nvcc, "-v", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    toolkit = next(line.partition("TOP=")[2] for line in plan.splitlines() if "TOP=" in line)
    ext.extra_compile_args = {
        "cxx": [],
        "nvcc": [
            *("-O3", "-std=c++17", "-DUSE_CUDA", TARGET, "-Xcompiler", "-fvisibility=hidden"),
            *("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
        ],
    }
    ext.library_dirs += [f"{toolkit}/lib64"]
    ext.libraries += ["torch_cuda", "cudart_static", "dl", "rt", "pthread"]
    ext.extra_link_args = ["-s", "-Wl,--exclude-libs,ALL"]
    return ext


def native() -> dict[str, object]:
    import pybind11
    import torch
    from torch.utils.cpp_extension import TORCH_LIB_PATH, BuildExtension, include_paths

    class Build(BuildExtension):
        """One folder of objects per library (sets share sources), and plain names for what is no Python module."""

        def build_extension(self, ext: object) -> None:
            shared, self.build_temp = self.build_temp, str(Path(self.build_temp) / ext.name)
            try:
                super().build_extension(ext)
            finally:
                self.build_temp = shared

        def get_ext_filename(self, name: str) -> str:
            path = super().get_ext_filename(name)
            suffix = sysconfig.get_config_var("EXT_SUFFIX")
            return (
                path
                if name.rpartition(".")[2] == "_C" or not path.endswith(suffix)
                else path.removesuffix(suffix) + ".so"
            )

    def library(name: str, files: list[str], flags: list[str]) -> Extension:
        return Extension(
            f"layerzoo.{name}",
            files,
            language="c++",
            extra_compile_args={"cxx": [*COMMON, *flags]},
            extra_link_args=["-s", "-ldl"],
        )

    def with_torch(ext: Extension) -> Extension:
        ext.include_dirs = include_paths()
        ext.library_dirs = [TORCH_LIB_PATH]
        ext.libraries = ["torch_cpu"]
        return ext

    operators = [file for file in sources("*.cpp") if not file.endswith(".cpu.cpp") and not file.endswith("module.cpp")]
    extensions = [with_torch(library("_ops", operators, [TARGET]))]
    for isa, flags in SETS.items():
        names = [f"-DLZ_ISA=isa_{isa}", f"-DLZ_ISA_NAME={isa}"]
        extensions.append(library(f"_cpu_{isa}", sources("*.cpu.cpp"), [*KERNEL, *flags, *names]))
    module = library("_C", ["csrc/module.cpp"], [])
    module.include_dirs = [pybind11.get_include()]
    extensions.append(module)
    if os.environ.get("LAYERZOO_CUDA", "0") == "1":
        extensions.append(cuda_library(with_torch(library("_ops_cuda", sources("*.cu"), []))))
    print(f"layerzoo: building native libraries with torch {torch.__version__}: {[ext.name for ext in extensions]}")
    return {"ext_modules": extensions, "cmdclass": {"build_ext": Build}}


reason = why_pure_python()
if reason:
    print(f"layerzoo: installing in pure Python, without kernels: {reason}", file=sys.stderr)
setup(**({} if reason else native()))
