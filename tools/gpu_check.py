"""Checks and times the ops with CUDA kernels on a GPU; see gpu_check.sh.

What is right is the same op on the CPU in float64, which the tests hold to numpy. The times are of the device alone,
with a cold cache: medians between events. Nothing here was ever run on a GPU by its authors.
"""

import argparse
import importlib
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from moe.inputs import expert_arguments
from ssm.inputs import conv_arguments, leaves, recurrence_arguments, scan_arguments, ssd_arguments
from ssm.oracle import TOLERANCE

from layerzoo import _native, ops

OPS = (  # each with the backward that has a kernel of its own
    ("selective_scan", True),
    ("causal_conv1d", True),
    ("causal_conv1d_update", False),
    ("selective_state_update", False),
    ("ssd_chunk_scan", True),
    ("linear_scan", True),
    ("moe_experts", True),
    ("moe_experts_ragged", True),
)
Arguments = dict[str, Any]
Run = Callable[[], Any]


def missing_kernels() -> list[str]:
    """The ops of OPS, and their backwards, that have no kernel for CUDA here."""
    kernels = [(op.removesuffix("_ragged"), backward) for op, backward in OPS]  # one for both forms
    names = [name for op, backward in kernels for name in ([op, f"{op}_backward"] if backward else [op])]
    return [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"layerzoo::{n}", "CUDA")]


# ---- what is right ----


def scans(dtype: torch.dtype) -> Iterator[Arguments]:
    for layouts, reverse in itertools.product((("time-last",), ("channel-last",), ("chunk", "gaps")), (False, True)):
        yield scan_arguments(2, 37, 150, 16, dtype=dtype, layouts=layouts, reverse=reverse)
    yield scan_arguments(2, 24, 65, 17, B="grouped", C="constant", groups=3, dtype=dtype)
    yield scan_arguments(1, 9, 64, 1, B="constant", leave_out=("z", "D", "seq_idx"), softplus=False, dtype=dtype)
    yield scan_arguments(2, 5, 1, 3, dtype=dtype)
    yield scan_arguments(2, 5, 0, 3, dtype=dtype)


def convolutions(dtype: torch.dtype) -> Iterator[Arguments]:
    for width, layout in itertools.product((1, 2, 3, 4, 9), ("time-last", "channel-last", "chunk")):
        yield conv_arguments(2, 33, 129, width, layouts=(layout,), dtype=dtype) | {"return_final_states": True}
    yield conv_arguments(2, 5, 1, 4, dtype=dtype)


def ssd_scans(dtype: torch.dtype) -> Iterator[Arguments]:
    for layout, wide in itertools.product(("time-last", "channel-last"), (False, True)):
        given = ssd_arguments(2, 150, 4, 32, 16, groups=2, wide_D=wide, layouts=(layout,), dtype=dtype)
        yield given | {"chunk_size": 64, "return_final_states": True}


def recurrences(dtype: torch.dtype) -> Iterator[Arguments]:
    for layout, reverse in itertools.product(("time-last", "channel-last", "gaps"), (False, True)):
        yield recurrence_arguments(2, 150, 37, layouts=(layout,), reverse=reverse, dtype=dtype)


def state_updates(dtype: torch.dtype) -> Iterator[Arguments]:
    for middle in ((37,), (4, 37)):
        torch.manual_seed(0)
        groups = (2,) if len(middle) > 1 else ()
        given = {name: torch.randn(3, *middle).to(dtype) for name in ("x", "dt", "z")}
        given |= {name: torch.randn(3, *groups, 16).to(dtype) for name in ("B", "C")}
        given |= {"state": torch.randn(3, *middle, 16), "A": -torch.rand(*middle, 16)}
        given |= {"D": torch.randn(middle), "dt_bias": torch.rand(middle)}
        yield given | {"dt_softplus": True}
        yield given | {"state_batch_indices": torch.tensor([2, -1, 0])}


def conv_updates(dtype: torch.dtype) -> Iterator[Arguments]:
    for steps in (1, 3):
        torch.manual_seed(0)
        given = {"x": torch.randn(3, 37, steps).to(dtype), "conv_state": torch.randn(3, 37, 5).to(dtype)}
        given |= {"weight": torch.randn(37, 4), "bias": torch.randn(37), "activation": "silu"}
        yield given
        yield given | {"cache_seqlens": torch.tensor([0, 4, 7])}
        yield given | {"conv_state_indices": torch.tensor([2, -1, 0])}


def mixtures(dtype: torch.dtype, ragged: bool = False) -> Iterator[Arguments]:
    for gate, routing, transposed in itertools.product(
        ("silu", "gpt-oss", "relu2 alone"), ("some empty", "repeated", "dropped"), (False, True)
    ):
        options = dict(gate=gate, routing=routing, transposed=transposed, interleaved=transposed, ragged=ragged)
        yield expert_arguments(37, 72, 33, 8, 3, dtype=dtype, layouts=("rows", "gaps"), **options)
    yield expert_arguments(300, 130, 70, 3, 2, dtype=dtype, gate="gelu", ragged=ragged)  # tiles that are full
    yield expert_arguments(70, 20, 9, 300, 4, dtype=dtype, gate="gelu_tanh", biases=False, ragged=ragged)
    yield expert_arguments(1, 7, 5, 2, 1, dtype=dtype, routing="one", ragged=ragged)
    yield expert_arguments(0, 7, 5, 2, 1, dtype=dtype, ragged=ragged)
    if dtype != torch.float64:
        mixed = dict(parameters=torch.float16, scores=torch.float32)
        yield expert_arguments(37, 72, 33, 8, 3, dtype=dtype, ragged=ragged, **mixed)


def some_of_the_experts(dtype: torch.dtype) -> Iterator[Arguments]:
    yield from mixtures(dtype)
    yield expert_arguments(37, 72, 33, 8, 3, dtype=dtype, ids=torch.int32) | {"expert_range": (2, 10)}


CASES: dict[str, Callable[[torch.dtype], Iterator[Arguments]]] = {
    "selective_scan": scans,
    "causal_conv1d": convolutions,
    "causal_conv1d_update": conv_updates,
    "selective_state_update": state_updates,
    "ssd_chunk_scan": ssd_scans,
    "linear_scan": recurrences,
    "moe_experts": some_of_the_experts,
    "moe_experts_ragged": lambda dtype: mixtures(dtype, ragged=True),
}


def on(x: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A tensor with the same strides on the device, in memory of its own; everything else as it is."""
    if not isinstance(x, Tensor):
        return x
    kind = dtype if dtype and x.is_floating_point() else x.dtype
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return torch.empty(span, dtype=kind, device=device).as_strided(x.shape, x.stride()).copy_(x)


def results(op: str, arguments: Arguments, gradients: bool) -> dict[str, Tensor]:
    """Outputs, gradients of the sum of their squares, and states that are changed in place."""
    arguments = dict(arguments)
    inputs = leaves(arguments) if gradients else {}
    with torch.set_grad_enabled(gradients):
        out = getattr(ops, op)(**arguments)
    outs = out if isinstance(out, tuple) else (out,)
    found = {f"output {i}": x.detach() for i, x in enumerate(outs)}
    if gradients:
        sums = [x.square().sum() for x in outs]
        found |= dict(zip(inputs, torch.autograd.grad(sums, list(inputs.values())), strict=True))
    return found | {name: arguments[name] for name in ("state", "conv_state") if name in arguments}


def check(op: str, gradients: bool, dtype: torch.dtype, device: str) -> tuple[int, float]:
    """How many cases agree, and the worst error over what is allowed. Raises AssertionError where one does not."""
    count, worst = 0, 0.0
    for given in CASES[op](dtype):
        right = results(op, {n: on(x, "cpu", torch.float64) for n, x in given.items()}, gradients)
        ours = results(op, {n: on(x, device) for n, x in given.items()}, gradients)
        for name, x in ours.items():
            distance, size = (x.cpu().double() - right[name]).norm().item(), right[name].norm().item()
            # A gradient of a wide parameter is a sum over what was rounded on the way.
            allowed = max(TOLERANCE[dtype], TOLERANCE[x.dtype])
            assert distance <= allowed * size, f"{op}, {dtype}: {name} is off by {distance / (size or 1):.1e}"
            worst = max(worst, distance / size / allowed if size else 0)
        count += 1
    return count, worst


# ---- how fast ----


def peer(path: str) -> Callable[..., Any] | None:
    """What "module:name" names, None where it is not installed."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, OSError):
        return None


def timings(device: str, dtype: torch.dtype, scale: int) -> Iterator[tuple[str, Run, dict[str, Run | None]]]:
    """(what, ours, peers by name) of each op; `scale` 1 is the real size, and more a smaller one."""

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=kind)

    def both(run: Run, inputs: tuple[Tensor, ...]) -> Run:
        def forward_and_backward() -> None:
            out = run()
            torch.autograd.grad(out, inputs, torch.ones_like(out))

        return forward_and_backward

    def passes(
        what: str, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], others: dict[str, Callable[..., Any] | None]
    ) -> Iterator[tuple[str, Run, dict[str, Run | None]]]:
        yield f"{what} forward", lambda: call(*inputs), {n: f and (lambda f=f: f(*inputs)) for n, f in others.items()}
        trained = tuple(x.detach().requires_grad_() for x in inputs)
        ours = both(lambda: call(*trained), trained)
        yield f"{what} both ways", ours, {n: f and both(lambda f=f: f(*trained), trained) for n, f in others.items()}

    fp32 = torch.float32
    b, d, length, n = 8 // min(scale, 8), 2048 // scale, 2048 // scale, 16
    A, D = -torch.rand(d, n, device=device), random(d, kind=fp32)
    theirs = peer("mamba_ssm.ops.selective_scan_interface:selective_scan_fn")
    for layout in ("time-last", "channel-last"):
        u, delta, z = (
            random(b, d, length) if layout == "time-last" else random(b, length, d).transpose(1, 2) for _ in range(3)
        )
        inputs = (u, delta, A, random(b, n, length), random(b, n, length), D, z, random(d, kind=fp32))
        others = {"mamba-ssm": theirs and (lambda *x, f=theirs: f(*x, delta_softplus=True))}
        yield from passes(
            f"selective_scan {layout}", lambda *x: ops.selective_scan(*x, delta_softplus=True), inputs, others
        )
        conv = (u, random(d, 4), random(d))
        f = peer("causal_conv1d:causal_conv1d_fn")
        others = {
            "causal-conv1d": f and (lambda *x, f=f: f(*x, activation="silu")),
            "torch": lambda x, w, bias: F.silu(F.conv1d(x, w[:, None], bias, padding=3, groups=d)[..., :length]),
        }
        yield from passes(f"causal_conv1d {layout}", lambda *x: ops.causal_conv1d(*x, activation="silu"), conv, others)

    heads, width, state = max(32 // scale, 1), 64, 128
    chunk = dict(chunk_size=256, dt_softplus=True)
    ssd = (random(b, length, heads, width), random(b, length, heads), -torch.rand(heads, device=device))
    ssd += (random(b, length, 1, state), random(b, length, 1, state))
    f = peer("mamba_ssm.ops.triton.ssd_combined:mamba_chunk_scan_combined")
    yield from passes(
        "ssd_chunk_scan",
        lambda *x: ops.ssd_chunk_scan(*x, **chunk),
        ssd,
        {"mamba-ssm": f and (lambda *x, f=f: f(*x, **chunk))},
    )
    yield from passes(
        "linear_scan", ops.linear_scan, (torch.rand(b, length, d, device=device), random(b, length, d)), {}
    )

    tokens, experts, k = 4096 // scale, 64 // min(scale, 16), 8 // min(scale, 4)
    hidden, inner = 1024 // scale, 512 // scale
    ids = torch.rand(tokens, experts, device=device).argsort(1)[:, :k]
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=experts).cumsum(0)
    offsets, chosen = F.pad(ends, (1, 0)), order // k
    mixture = (random(tokens, hidden), torch.rand(tokens, k, device=device))
    mixture += (random(experts, 2 * inner, hidden) / 32, random(experts, hidden, inner) / 32)

    def combine(x: Tensor, weights: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, chosen, y * weights.flatten()[order, None].to(y.dtype))

    def grouped(x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        g, u = F.grouped_mm(x[chosen], w13.mT, offs=ends.int()).chunk(2, 1)
        return combine(x, weights, F.grouped_mm(F.silu(g) * u, w2.mT, offs=ends.int()))

    def loop(x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        parts = x[chosen].split(torch.diff(offsets).tolist())
        halves = [(one @ w13[e].T).chunk(2, 1) for e, one in enumerate(parts)]
        return combine(x, weights, torch.cat([(F.silu(g) * u) @ w2[e].T for e, (g, u) in enumerate(halves)]))

    # On CUDA torch's grouped product is of bfloat16 alone.
    others = {"torch": loop, "grouped_mm": grouped if device == "cpu" or dtype == torch.bfloat16 else None}
    yield from passes("moe_experts", lambda x, w, *m: ops.moe_experts(x, ids, w, *m), mixture, others)
    yield from passes(
        "moe_experts_ragged",
        lambda x, w, *m: ops.moe_experts_ragged(x, chosen, w.flatten()[order], offsets, *m),
        mixture,
        others,
    )

    rows = 64 // min(scale, 16)
    step = (random(rows, d, n, kind=fp32), random(rows, d), random(rows, d), A, random(rows, n), random(rows, n), D)
    options = dict(z=random(rows, d), dt_bias=random(d, kind=fp32), dt_softplus=True)
    f = peer("mamba_ssm.ops.triton.selective_state_update:selective_state_update")
    yield (
        "selective_state_update",
        lambda: ops.selective_state_update(*step, **options),
        {"mamba-ssm": f and (lambda f=f: f(*step, **options))},
    )
    tap = (random(rows, d), random(rows, d, 3), random(d, 4), random(d), "silu")
    f = peer("causal_conv1d:causal_conv1d_update")
    yield (
        "causal_conv1d_update",
        lambda: ops.causal_conv1d_update(*tap),
        {"causal-conv1d": f and (lambda f=f: f(*tap))},
    )


def microseconds(run: Run, rounds: int = 30) -> float:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")  # larger than any L2
    times = []
    for _ in range(rounds):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return statistics.median(times[5:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only-look", action="store_true", help="end after the check that there is a GPU")
    only_look = parser.parse_args().only_look
    if not torch.cuda.is_available():
        sys.exit(f"gpu_check: torch {torch.__version__} sees no CUDA device; nothing was built, checked or timed")
    if only_look:
        return
    library = _native.status().cuda
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; CUDA library: {library}")
    if not library.startswith("loaded"):
        sys.exit("gpu_check: without the CUDA library there is nothing of ours to check")
    if missing := missing_kernels():
        sys.exit(f"gpu_check: no CUDA kernel for {', '.join(missing)}")
    for (op, backward), dtype in itertools.product(OPS, TOLERANCE):
        count, worst = check(op, backward, dtype, "cuda")
        print(f"{op:24} {dtype!s:16} {count:3} cases agree; worst {worst:.0%} of what is allowed")
    print(f"\n{'what':40} {'dtype':16} {'layerzoo':>12}  others")
    for dtype in (torch.float32, torch.bfloat16):
        for what, ours, others in timings("cuda", dtype, scale=1):
            mine = microseconds(ours)
            rest = [
                f"{name} {'absent' if run is None else f'{(other := microseconds(run)):.0f} us ({other / mine:.2f}x)'}"
                for name, run in others.items()
            ]
            print(f"{what:40} {dtype!s:16} {mine:9.0f} us  {', '.join(rest)}")


if __name__ == "__main__":
    main()
