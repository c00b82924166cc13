"""csrc/common/vec.h by itself, compiled for each instruction set: exp2, softplus, sigmoid, 16-bit formats, shuffles."""

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

COMPILER = shutil.which("c++")
CSRC = Path(__file__).parents[1] / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
SETS = {"default": [], "avx2": AVX2, "avx2 with 64 bytes": [*AVX2, "-DLZ_VEC_BYTES=64"], "avx512": AVX512}

SOURCE = """
#include "common/vec.h"
using namespace layerzoo::LZ_ISA;

template <class S, class F>
void each(S* x, int64_t n, const F& f) {
  for (int64_t i = 0; i < n; i += kLanes<S>) {
    Vec<S> v[1] = {load<S>(x + i)};
    f(v);
    store<S>(x + i, v[0]);
  }
}
template <class T, class S>
void convert(S* wide, T* narrow, int64_t n, bool widen) {
  for (int64_t i = 0; i < n; i += kLanes<S>)
    widen ? store<S>(wide + i, load_as<S>(narrow + i)) : store_as<S>(narrow + i, load<S>(wide + i));
}
template <class T, class S>
void convert_one_by_one(S* wide, T* narrow, int64_t n, bool widen) {
  for (int64_t i = 0; i < n; ++i) widen ? void(wide[i] = to<S>(narrow[i])) : void(narrow[i] = from<T>(wide[i]));
}

#define FOR(S, name)                                                                                     \\
  extern "C" int lanes_##name() { return kLanes<S>; }                                                    \\
  extern "C" void exp2_##name(S* x, int64_t n) { each(x, n, [](auto& v) { exp2<S, 1>(v); }); }           \\
  extern "C" void unclamped_##name(S* x, int64_t n) { each(x, n, [](auto& v) { exp2<S, 1, false>(v); }); } \\
  extern "C" void sigmoid_##name(S* x, int64_t n) { each(x, n, [](auto& v) { sigmoid<S, 1>(v); }); }     \\
  extern "C" void softplus_##name(S* x, int64_t n) { each(x, n, [](auto& v) { softplus<S, 1>(v); }); }   \\
  extern "C" void transpose_##name(S* x) {                                                               \\
    Vec<S> rows[kLanes<S>];                                                                              \\
    std::memcpy(rows, x, sizeof rows);                                                                   \\
    transpose<S>(rows);                                                                                  \\
    std::memcpy(x, rows, sizeof rows);                                                                   \\
  }                                                                                                      \\
  extern "C" S sum_##name(S* x) { return reduce_add<S>(load<S>(x)); }                                    \\
  extern "C" void bf16_##name(S* x, layerzoo::BFloat16* y, int64_t n, bool widen) { convert(x, y, n, widen); } \\
  extern "C" void f16_##name(S* x, layerzoo::Half* y, int64_t n, bool widen) { convert(x, y, n, widen); } \\
  extern "C" void bf16_each_##name(S* x, layerzoo::BFloat16* y, int64_t n, bool widen) {                 \\
    convert_one_by_one(x, y, n, widen);                                                                  \\
  }                                                                                                      \\
  extern "C" void f16_each_##name(S* x, layerzoo::Half* y, int64_t n, bool widen) {                      \\
    convert_one_by_one(x, y, n, widen);                                                                  \\
  }
FOR(float, float)
FOR(double, double)
"""

Library = Callable[..., Any]


@pytest.fixture(scope="module", params=list(SETS))
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """call("exp2", np.float32, array) and so on, for one instruction set."""
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    if SETS[request.param] and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"{request.param} is a set of x86")
    flags = SETS[request.param]
    has = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lacks = [name for flag in flags if flag.startswith("-m") and (name := flag.removeprefix("-m")) not in has]
    if lacks:
        pytest.skip(f"this processor has no {', '.join(lacks)}")
    folder = tmp_path_factory.mktemp("math")
    (folder / "math.cpp").write_text(SOURCE)
    names = [
        "-DLZ_ISA=isa_test",
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-shared",
        "-fno-math-errno",
        "-ffp-contract=fast",
        "-w",
    ]
    command = [COMPILER, *names, *flags, f"-I{CSRC}", "math.cpp", "-o", "math.so"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    loaded = ctypes.CDLL(str(folder / "math.so"))
    loaded.sum_float.restype, loaded.sum_double.restype = ctypes.c_float, ctypes.c_double

    def call(name: str, kind: type, *arguments: Any) -> Any:
        function = getattr(loaded, f"{name}_{'float' if kind is np.float32 else 'double'}")
        return function(*(x.ctypes.data_as(ctypes.c_void_p) if isinstance(x, np.ndarray) else x for x in arguments))

    return call


def applied(library: Library, name: str, x: np.ndarray) -> np.ndarray:
    y = np.ascontiguousarray(x)
    assert y.size % 16 == 0
    library(name, x.dtype.type, y, ctypes.c_int64(y.size))
    return y


def spread(kind: type, low: float, high: float) -> np.ndarray:
    """Numbers from low to high, evenly and by magnitude, of both signs where both are within."""
    edges = np.concatenate([np.geomspace(1e-30, high, 1 << 14), -np.geomspace(1e-30, -low, 1 << 14)])
    return np.concatenate([np.linspace(low, high, 1 << 17), edges]).astype(kind)


def relative(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative error, where the result is a normal number; below, in units of the smallest one."""
    smallest = np.finfo(got.dtype).tiny
    return np.abs(got - want) / np.maximum(np.abs(want), smallest)


BOUND = {np.float32: 2e-7, np.float64: 4e-16}


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_exp2(library: Library, kind: type) -> None:
    high = 127.99 if kind is np.float32 else 1023.99
    x = spread(kind, -high + 2, high)
    want = np.exp2(x.astype(np.longdouble))
    assert relative(applied(library, "exp2", x), want).max() < BOUND[kind]
    inside = x[np.abs(x) < high - 2]
    inside = inside[: inside.size // 16 * 16]
    assert np.array_equal(applied(library, "unclamped", inside), applied(library, "exp2", inside))
    assert (applied(library, "exp2", np.zeros(16, kind)) == 1).all()
    assert (applied(library, "exp2", np.full(16, -0.0, kind)) == 1).all()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_exp2_beyond_what_the_type_holds(library: Library, kind: type) -> None:
    tiny, edge = np.finfo(kind).tiny, 128 if kind is np.float32 else 1024
    high = np.array([edge, edge + 0.5, 1e30, np.inf], kind)
    assert (applied(library, "exp2", np.repeat(high, 4)) == np.inf).all()
    low = -np.array([edge - 1, edge, 1e30, np.inf], kind)
    assert (applied(library, "exp2", np.repeat(low, 4)) == 0).all()
    almost = applied(library, "exp2", np.linspace(2 - edge, 1 - edge, 64, dtype=kind))
    assert (almost >= 0).all()
    assert (almost <= tiny).all()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_sigmoid(library: Library, kind: type) -> None:
    x = spread(kind, -80, 100)
    exact = 1 / (1 + np.exp(-x.astype(np.longdouble)))
    # The argument of the exp is rounded: half a unit in the last place of x log2(e), twice.
    allowed = (4e-7 if kind is np.float32 else 2e-15) + 2 * np.finfo(kind).eps * np.maximum(-x.astype(np.float64), 0)
    assert (relative(applied(library, "sigmoid", x), exact) < allowed).all()
    far = applied(library, "sigmoid", np.repeat(np.array([-1e4, -np.inf, 1e4, np.inf], kind), 4))
    assert np.array_equal(far, np.repeat([0, 0, 1, 1], 4))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_softplus(library: Library, kind: type) -> None:
    x = spread(kind, -80, 100)
    wide = x.astype(np.longdouble)
    exact = np.log1p(np.exp(-np.abs(wide))) + np.maximum(wide, 0)
    exact = np.where(wide > 20, wide, exact) if kind is np.float64 else exact  # as torch has it
    allowed = (4e-7 if kind is np.float32 else 2e-15) + 2 * np.finfo(kind).eps * np.maximum(-x.astype(np.float64), 0)
    assert (relative(applied(library, "softplus", x), exact) < allowed).all()
    far = applied(library, "softplus", np.repeat(np.array([-1e4, -np.inf, 1e4, np.inf], kind), 4))
    assert np.array_equal(far, np.repeat(np.array([0, 0, 1e4, np.inf], kind), 4))


@pytest.mark.parametrize("how", ["", "_each"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_16_bit_formats(library: Library, name: str, dtype: torch.dtype, kind: type, how: str) -> None:
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    bits, wide = every.view(torch.int16).numpy(), np.empty(1 << 16, kind)
    library(name + how, kind, wide, bits, ctypes.c_int64(bits.size), True)
    np.testing.assert_array_equal(wide, every.double().numpy())

    # Back: every value, what lies half way to its neighbour (even wins), and a hair beyond.
    values = every[every.isfinite()].double().sort().values
    middles = (values[1:] + values[:-1]) / 2
    hair = middles.abs() * 2.0**-20
    top = values[-1] * torch.tensor([1.001, 1.01, 2, 1e4, torch.inf])
    x = torch.cat([values, middles, middles + hair, middles - hair, top, -top]).float()
    x = torch.cat([x, torch.full((-x.numel() % 16,), torch.nan)])
    narrow = np.empty(x.numel(), np.int16)
    library(name + how, kind, x.numpy().astype(kind), narrow, ctypes.c_int64(x.numel()), False)
    torch.testing.assert_close(torch.from_numpy(narrow).view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_transpose_and_sum(library: Library, kind: type) -> None:
    lanes = library("lanes", kind)
    square = np.arange(lanes * lanes, dtype=kind).reshape(lanes, lanes)
    turned = square.copy()
    library("transpose", kind, turned)
    np.testing.assert_array_equal(turned, square.T)
    assert library("sum", kind, square) == lanes * (lanes - 1) / 2
