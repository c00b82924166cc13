#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds the CUDA library, checks causal_conv1d on the device against the fp64
# reference on the CPU, and times it. Fails where there is no GPU: nothing is counted as checked then.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

"$python" - <<'PY'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(f"gpu_check: torch {torch.__version__} sees no CUDA device; nothing was built, checked or timed")
PY

LAYERZOO_CUDA=1 "$python" -m pip install --quiet --no-build-isolation --no-deps --editable .

"$python" - <<'PY'
import itertools
import statistics
import sys

import torch
import torch.nn.functional as F

import layerzoo
from layerzoo import _native

library = _native.status().cuda
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; CUDA library: {library}")
if not library.startswith("loaded"):
    sys.exit("gpu_check: without the CUDA library there is nothing of ours to check")

torch.manual_seed(0)
tolerance = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
worst = dict.fromkeys(tolerance, 0.0)
checked = 0
sizes = [(1, 1, 1), (2, 31, 127), (2, 33, 129), (1, 100, 1000)]
for dtype, (b, d, l), w, last, packed in itertools.product(tolerance, sizes, (1, 2, 3, 4, 9), "ct", (False, True)):
    x = torch.randn(b, l, d).transpose(1, 2) if last == "c" else torch.randn(b, d, l)
    args = [x, torch.randn(d, w), torch.randn(d)]
    ids = (torch.arange(l) // 50).int().repeat(b, 1) if packed else None
    state = torch.randn(b, d, w - 1)
    options = dict(return_final_states=True, activation="silu")
    right = layerzoo.ops.causal_conv1d(
        *(a.to(dtype).double() for a in args), ids, state.to(dtype).double(), **options
    )
    ours = layerzoo.ops.causal_conv1d(
        *(a.to("cuda", dtype) for a in args), None if ids is None else ids.cuda(), state.to("cuda", dtype), **options
    )
    for name, a, r in zip(("out", "final_states"), ours, right, strict=True):
        error = ((a.cpu().double() - r).norm() / r.norm().clamp_min(1e-30)).item()
        worst[dtype] = max(worst[dtype], error)
        where = f"{name} of {dtype}, (b, d, l) = {(b, d, l)}, width {w}, {last}-last, packed {packed}"
        assert error <= tolerance[dtype], f"gpu_check: {where} is off by {error:.1e}"
    checked += 1
print(f"{checked} cases agree with the fp64 reference; worst, in norm: {worst}")


def median_us(f, rounds=50):
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any L2
    times = []
    for _ in range(rounds):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times[5:])


b, d, l, w = 8, 4096, 4096, 4
for dtype, last in itertools.product((torch.float32, torch.bfloat16), "ct"):
    x = torch.randn(b, d, l, device="cuda", dtype=dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if last == "c" else x
    weight, bias = torch.randn(d, w, device="cuda", dtype=dtype), torch.randn(d, device="cuda", dtype=dtype)
    ours = median_us(lambda: layerzoo.ops.causal_conv1d(x, weight, bias, activation="silu"))
    torch_us = median_us(lambda: F.silu(F.conv1d(x, weight[:, None], bias, padding=w - 1, groups=d)[..., :l]))
    rate = 2 * x.numel() * x.itemsize / ours / 1e3
    print(f"b{b} d{d} l{l} w{w} {dtype} {last}-last: {ours:.0f} us ({rate:.0f} GB/s in and out), torch {torch_us:.0f} us")
PY
