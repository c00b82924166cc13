"""A model of transformers, before and after layerzoo.accelerate."""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor, nn

import layerzoo
from layerzoo.bench.plots import BLUE, GREY, svg
from layerzoo.bench.runner import interleave
from layerzoo.bench.tables import seconds
from layerzoo.demo.report import Section


def accelerate_transformers(quick: bool, progress: Progress) -> Section:
    """The same weights before and after, in turn: prefill, decoding, a training step, one large mixer."""
    import transformers
    from transformers.models.mamba.modeling_mamba import MambaMixer

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns about kernels it lacks
    hidden, layers, prompt, steps = (64, 2, 32, 4) if quick else (256, 6, 256, 16)
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=1024, hidden_size=hidden, num_hidden_layers=layers)
    host: Any = transformers.MambaForCausalLM(config)
    ours = copy.deepcopy(host)
    layerzoo.accelerate(ours, strict=True)
    ids = torch.randint(1024, (1, prompt))
    with torch.no_grad():
        expected = host(ids).logits
        difference = float((ours(ids).logits - expected).abs().max())
        layerzoo.restore(ours)
        restored = torch.equal(ours(ids).logits, expected)
    if difference > 1e-3 or not restored:
        raise RuntimeError(f"demo: logits differ by {difference:.1e} accelerated; equal after restore: {restored}")
    layerzoo.accelerate(ours, strict=True)

    width, length, short = (96, 32, 8) if quick else (768, 512, 128)
    large: Any = MambaMixer(transformers.MambaConfig(hidden_size=width), layer_idx=0)
    fast = copy.deepcopy(large)
    layerzoo.accelerate(fast, strict=True)
    x = torch.randn(1, length, width)
    jobs: dict[str, tuple[Callable[[Any], Callable[[], object]], Any, Any]] = {
        f"prefill of {prompt} tokens": (lambda m: _prefill(m, ids), host, ours),
        (decoding := f"decoding {steps} tokens"): (lambda m: _decode(m, ids, steps), host, ours),
        f"training step, 2 x {prompt // 2} tokens": (lambda m: _train(m, ids.view(2, -1)), host, ours),
        f"mixer of width {width}, forward, {length} tokens": (lambda m: _forward(m, x), large, fast),
        f"mixer of width {width}, with backward, {short}": (lambda m: _backward(m, x[:, :short]), large, fast),
    }
    times: dict[str, tuple[float, float]] = {}
    for job, (build, *models) in progress.track(jobs.items(), description="before and after"):
        samples: tuple[list[float], list[float]] = ([], [])
        interleave([build(model) for model in models], samples, seconds=0.1 if quick else 6, rounds=(3, 15))
        times[job] = (median(samples[0]), median(samples[1]))
    rows = [
        ("largest difference of logits", "", f"{difference:.0e}", ""),
        ("logits after layerzoo.restore", "", "equal, bit for bit", ""),
    ]
    for job, (before, after) in times.items():
        rows.append((job, seconds(before), seconds(after), f"{before / after:.1f}x"))
        if job == decoding:
            rows.append(("tokens/s", f"{steps / before:.0f}", f"{steps / after:.0f}", ""))
    words = (
        f"A random MambaForCausalLM ({layers} layers of width {hidden}) and one mixer of width {width} (mamba-130m has "
        "768). Host and accelerated copy run in turn; the figures are medians."
    )
    return Section(words, rows, [_time_plot(times)])


def _prefill(model: Any, ids: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return model.eval()(ids, use_cache=True, logits_to_keep=1)

    return call


def _decode(model: Any, ids: Tensor, steps: int) -> Callable[[], object]:
    from layerzoo.hosts.transformers import CACHE

    with torch.no_grad():
        cache = {CACHE: model.eval()(ids, use_cache=True)[CACHE]}

    @torch.no_grad()
    def call() -> object:
        return [model(ids[:, i : i + 1], **cache, use_cache=True).logits for i in range(steps)]

    return call


def _train(model: Any, ids: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)

    def call() -> object:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        return optimizer.step()

    return call


def _forward(mixer: nn.Module, x: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return mixer(x)

    return call


def _backward(mixer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(mixer(x).square().sum(), list(mixer.parameters()))


def _time_plot(times: dict[str, tuple[float, float]]) -> str:
    figure = Figure(figsize=(7, 0.6 * len(times) + 1), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(times))
    axes.barh([place - 0.2 for place in places], [100.0] * len(times), height=0.38, color=GREY, label="before")
    shares = [100 * after / before for before, after in times.values()]
    axes.barh([place + 0.2 for place in places], shares, height=0.38, color=BLUE, label="after")
    for place, share, (before, after) in zip(places, shares, times.values(), strict=True):
        axes.text(101, place - 0.2, seconds(before), va="center")
        axes.text(share + 1, place + 0.2, f"{seconds(after)}, {before / after:.1f}x", va="center", color=BLUE)
    axes.set_yticks(places, list(times))
    axes.invert_yaxis()
    axes.set(xlabel="time, % of the host's", xlim=(0, 118))
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return svg(figure, "times")
