"""Outlier channels: inputs of linear layers that are far larger than their neighbours, and spoil a quantisation.

Pierro and Abreu, "Mamba-PTQ: Outlier Channels in Recurrent Large Language Models" (2024), arXiv 2407.12397.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class LinearInput:
    """What went into one linear layer: its dotted name, the largest |x| of each channel over all batches (channels,) in
    float32 or wider, their median, and the channels that stand out."""

    name: str
    absmax: Tensor
    median: float
    outliers: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """The largest channel over the median: by so much an int8 scale for all of them is too coarse for the rest."""
        return float(self.absmax.max()) / self.median if self.median else float("inf")


@dataclass(frozen=True, eq=False)
class OutlierReport:
    """The answer of `outlier_channels`: one `LinearInput` for each linear layer that was called.

    `silent` names those that were not: unused, or with a weight that the model reads itself, as Mamba reads dt_proj's.
    True where a channel stands out. `str(report)` and `rich.print(report)` give a table, `to_dict()` plain data.
    """

    threshold: float
    layers: tuple[LinearInput, ...]
    silent: tuple[str, ...]

    def __bool__(self) -> bool:
        return any(layer.outliers for layer in self)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LinearInput]:
        return iter(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, ready for JSON."""
        layers = [
            {
                "name": layer.name,
                "channels": len(layer.absmax),
                "absmax": layer.absmax.tolist(),
                "median": layer.median,
                "outliers": list(layer.outliers),
            }
            for layer in self
        ]
        return {"threshold": self.threshold, "layers": layers, "silent": list(self.silent)}

    def __rich__(self) -> Table:
        from rich.table import Table  # imported by no layer
        from rich.text import Text

        found = sum(len(layer.outliers) for layer in self)
        title = f"{found} outlier channels: |x| over {self.threshold:g} medians of the layer"
        table = Table(title=title, caption=f"not called: {', '.join(self.silent)}" if self.silent else None)
        for column in ("linear layer", "channels", "median", "largest", "ratio", "outliers"):
            table.add_column(column, overflow="fold")
        for layer in self:
            numbers = (layer.median, float(layer.absmax.max()), layer.ratio)
            words = (layer.name, str(len(layer.absmax)), *(f"{x:.3g}" for x in numbers), _some(layer.outliers))
            table.add_row(*map(Text, words))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().rstrip("\n")


def outlier_channels(model: nn.Module, batches: Iterable[Any], *, threshold: float = 6.0) -> OutlierReport:
    """Runs `model` on `batches` and reports, for every linear layer, which channels of its input stand out.

    A channel stands out where its largest |x| over all batches is more than `threshold` times the median of that
    number over the layer's channels, or is not finite. So a layer that is zero in most channels has a median of 0, and
    each of its other channels counts.

    The layers are all `nn.Linear`, in order: in_proj, x_proj, out_proj of Mamba layers, ours, a host's or accelerated;
    in_proj and out_proj of Mamba-2; projections and MLPs besides. They are watched by forward hooks, in eval mode and
    without gradients. Hooks and modes are put back in the end, after an error too.

    Args:
        model: any module. batches: a mapping is passed as keyword arguments, a tuple or list as positional ones,
        anything else as the only one. threshold: see above.

    Raises:
        TypeError: model is no module. ValueError: a threshold that is not above 0, a model without linear layers, no
            batches. What the model raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"outlier_channels: model must be an nn.Module, got {type(model).__name__}")
    if not threshold > 0:
        raise ValueError(f"outlier_channels: threshold must be above 0, got {threshold}")
    watched = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not watched:
        raise ValueError("outlier_channels: model must hold an nn.Linear, got none")
    seen: dict[str, Tensor] = {}
    count = 0
    with ExitStack() as undo, torch.no_grad():
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        for name, module in watched.items():
            undo.callback(module.register_forward_pre_hook(_watch(name, seen), with_kwargs=True).remove)
        for batch in batches:
            count += 1
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                model(batch)
    if not count:
        raise ValueError("outlier_channels: batches must hold at least one, got none")
    layers = tuple(_judge(name, seen[name], threshold) for name in watched if name in seen)
    return OutlierReport(threshold, layers, tuple(name for name in watched if name not in seen))


def _watch(name: str, seen: dict[str, Tensor]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        if x.numel():
            largest = x.abs().flatten(0, -2).amax(0) if x.dim() > 1 else x.abs()
            largest = largest.to(torch.promote_types(x.dtype, torch.float32))
            seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

    return hook


def _judge(name: str, absmax: Tensor, threshold: float) -> LinearInput:
    absmax = absmax.cpu()
    finite = absmax[absmax.isfinite()]
    median = float(finite.median()) if len(finite) else float("nan")
    outliers = ~(absmax <= threshold * median)
    return LinearInput(name, absmax, median, tuple(outliers.nonzero().flatten().tolist()))


def _some(channels: tuple[int, ...], most: int = 8) -> str:
    words = ", ".join(map(str, channels[:most]))
    return f"{words}, ... ({len(channels)})" if len(channels) > most else words
