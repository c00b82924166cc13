"""A language model of layerzoo.nn.Mamba learns the standard library's help texts, and writes."""

import math

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.demo.report import Section
from layerzoo.demo.training import Batch, train
from layerzoo.nn import Mamba
from layerzoo.nn.ssm.cache import Cache


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


def write_text(quick: bool, progress: Progress) -> Section:
    """Trains on most of the text, then writes bytes one by one."""
    width, layers, length, goal, steps, rate = (64, 2, 128, 4.0, 40, 1e-2) if quick else (192, 3, 256, 1.65, 300, 4e-3)
    text = corpus()
    split = len(text) * 19 // 20
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = LanguageModel(width, layers)

    def draw() -> Batch:
        starts = torch.randint(split - length - 1, (8, 1), generator=generator)
        return (text[starts + torch.arange(length + 1)],)

    def measure(windows: Tensor) -> tuple[Tensor, Tensor]:
        """Bits per byte on windows (batch, length + 1)."""
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)
        return loss, loss

    row, plot = train(
        model,
        measure,
        draw,
        (text[split:].unfold(0, length + 1, (len(text) - split - length - 1) // 31),),
        progress,
        what="bits per byte",
        form=".2f",
        goal=goal,
        steps=steps,
        rate=rate,
        yscale="log",
        yticks=[1, 2, 4, 8],
        yticklabels=["1", "2", "4", "8"],
    )
    sample, error = _sample(model, b"The ", 60 if quick else 300)
    if error > 1e-3:
        raise RuntimeError(f"demo: logits with the cache differ by {error:.1e} from those of the whole text")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    words = (
        f"{layers} layers of width {width} ({parameters / 1e6:.2f} million parameters) learn {split / 1e3:.0f} kB of "
        f"pydoc_data.topics byte by byte; the held-out rest has to take at most {goal} bits per byte. Then the model "
        "writes with its cache, one byte at a time; the last row compares that with one pass over the same bytes."
    )
    return Section(words, [row, ("logits by cache and in one pass", "", f"{error:.0e} apart", "")], [plot], sample)


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
