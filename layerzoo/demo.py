"""`layerzoo demo`: real work in a few minutes, one table and one page. A family adds its part to `PARTS`."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import layerzoo
from layerzoo.bench.report import describe, machine
from layerzoo.bench.runner import interleave
from layerzoo.bench.tables import seconds
from layerzoo.nn import Mamba
from layerzoo.nn.ssm.cache import Cache

try:
    from jinja2 import Environment
    from matplotlib.figure import Figure

    from layerzoo.bench.plots import BLUE, GREY, RED, svg
except ImportError as error:
    raise ImportError(f"the demo needs the extra [bench]: pip install 'layerzoo[bench]' ({error})") from error


@dataclass
class Section:
    """What a part shows: rows of the table (what, before, after, gain), plots as SVG, a sample of text."""

    title: str
    words: str
    rows: list[tuple[str, str, str, str]] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)
    sample: str = ""


Part = Callable[[bool, Progress], Section]


def run_demo(out: Path, quick: bool) -> None:
    """Runs every part, prints one table and writes `out`/report.html, a page that needs no network.

    Raises RuntimeError where a part does not reach what it states. `quick` is for tests: small and not impressive.
    """
    start = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        sections = [part(quick, progress) for part in PARTS]
    host = f"{describe(machine())}; {perf_counter() - start:.0f} s in all"
    table = Table(title="layerzoo demo", caption=host, caption_justify="left")
    for column in ("", "before", "after", "gain"):
        table.add_column(column, justify="right" if column else "left")
    for section in sections:
        for row in section.rows:
            table.add_row(*row, end_section=row is section.rows[-1])
    console = Console()
    console.print(table)
    template = files("layerzoo").joinpath("demo.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template).render(sections=sections, host=host)
    report = out / "report.html"
    report.write_text(page, encoding="utf-8")
    console.print(f"{report} is written", highlight=False)


# ---- a language model with layerzoo.nn.Mamba ----


class LanguageModel(nn.Module):
    """Bytes in, logits of the next byte out; embedding and output layer share their weight."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers))
        self.mixers = nn.ModuleList(Mamba(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)

    def forward(self, ids: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """ids (batch, length) -> (batch, length, 256); with caches it goes on where they ended."""
        x = self.embedding(ids)
        for i, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            x = x + mixer(norm(x), cache=None if caches is None else caches[i])
        return F.linear(self.norm(x), self.embedding.weight)


def corpus() -> Tensor:
    """The standard library's help texts on the language, as bytes."""
    from pydoc_data.topics import topics

    return torch.tensor(list("\n\n".join(topics[name] for name in sorted(topics)).encode()))


def bits(model: nn.Module, windows: Tensor) -> Tensor:
    """Bits per byte on windows (batch, length + 1)."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)


def train_and_sample(quick: bool, progress: Progress) -> Section:
    """Trains until the loss on held-out text is down to a stated figure, then writes bytes one by one."""
    width, layers, length, goal, limit = (64, 2, 128, 4.0, 100) if quick else (192, 3, 256, 1.65, 800)
    every, rate = (10, 1e-2) if quick else (25, 4e-3)
    text = corpus()
    split = len(text) * 19 // 20
    held_out = text[split:].unfold(0, length + 1, (len(text) - split - length - 1) // 31)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = LanguageModel(width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    checks = {0: _held_out(model, held_out)}
    task = progress.add_task("", total=limit)
    start = perf_counter()
    while checks[max(checks)] > goal and len(losses) < limit:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (len(losses) + 1) / 20)
        starts = torch.randint(split - length - 1, (8, 1), generator=generator)
        loss = bits(model, text[starts + torch.arange(length + 1)])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) % every == 0:
            checks[len(losses)] = _held_out(model, held_out)
        shown = f"training: {checks[max(checks)]:.2f} bits per byte on held-out text, goal {goal}"
        progress.update(task, advance=1, description=shown)
    took, reached = perf_counter() - start, checks[max(checks)]
    if reached > goal:
        raise RuntimeError(f"demo: {reached:.3f} bits per byte after {limit} steps, the goal is {goal}")
    progress.update(task, total=len(losses))
    sample, error = _sample(model, b"The ", 60 if quick else 300)
    if error > 1e-3:
        raise RuntimeError(f"demo: logits with the cache differ by {error:.1e} from those of the whole text")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Section(
        "A language model from layerzoo.nn.Mamba",
        f"{layers} layers of width {width} ({parameters / 1e6:.2f} million parameters) learn {split / 1e3:.0f} kB of "
        f"pydoc_data.topics byte by byte, until the held-out rest takes at most {goal} bits per byte. Then the model "
        "writes with its cache, one byte at a time; the last row compares that with one pass over the same bytes.",
        [
            ("bits per byte, held-out", f"{checks[0]:.2f}", f"{reached:.2f}", f"{len(losses)} steps, {took:.0f} s"),
            ("logits by cache and in one pass", "", f"{error:.0e} apart", ""),
        ],
        [_loss_plot(losses, checks, goal)],
        sample,
    )


@torch.no_grad()
def _held_out(model: nn.Module, windows: Tensor) -> float:
    return bits(model, windows).item()


@torch.no_grad()
def _sample(model: LanguageModel, prompt: bytes, count: int) -> tuple[str, float]:
    """The prompt and `count` bytes after it, and how far the cached logits are from those of one pass, at most."""
    generator = torch.Generator().manual_seed(0)
    caches = [mixer.allocate_inference_cache(1) for mixer in model.mixers]  # type: ignore[operator]
    ids = torch.tensor([list(prompt)])
    logits = model(ids, caches)
    for _ in range(count):
        byte = torch.multinomial(F.softmax(logits[0, -1] / 0.6, dim=0), 1, generator=generator)
        ids = torch.cat([ids, byte[None]], dim=1)
        logits = torch.cat([logits, model(ids[:, -1:], caches)], dim=1)
    return bytes(ids[0].tolist()).decode(errors="replace"), float((logits - model(ids)).abs().max())


def _loss_plot(losses: list[float], checks: dict[int, float], goal: float) -> str:
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(range(1, len(losses) + 1), losses, color=GREY, linewidth=1, label="training batch")
    axes.plot(list(checks), list(checks.values()), color=BLUE, marker="o", markersize=3, label="held-out text")
    axes.axhline(goal, color=RED, linewidth=1, linestyle="--", label=f"goal {goal}")
    axes.set(xlabel="step", ylabel="bits per byte", yscale="log")
    axes.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return svg(figure, "loss")


# ---- a transformers model before and after layerzoo.accelerate ----


def accelerate_transformers(quick: bool, progress: Progress) -> Section:
    """The same weights before and after, in turn: prefill, decoding, a training step, one large mixer."""
    title = "transformers' Mamba, before and after layerzoo.accelerate"
    try:
        import transformers
        from transformers.models.mamba.modeling_mamba import MambaMixer
    except ImportError as error:
        return Section(title, f"Not run: {error}.")
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
    return Section(title, words, rows, [_time_plot(times)])


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


PARTS: tuple[Part, ...] = (train_and_sample, accelerate_transformers)
