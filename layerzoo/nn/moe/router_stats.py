"""What the routers of a model do over a run: load, entropy, drops."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerzoo.nn.moe.router import Router, Routing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.hooks import RemovableHandle


class RouterStats:
    """Watches every `Router` of a model while it is open: `with RouterStats(model) as stats: …`.

    Each call of a router adds one entry to the history of its layer. What gradient checkpointing computes a second time
    is passed over. Closed, it stays readable.

        stats.load(name)      (calls, E): share of the pairs that each expert got, 1 / E where the load is even
        stats.entropy(name)   (calls,): of the mean probability over the experts, in nats, log E where it is even
        stats.dropped(name)   (calls,): share of the pairs that lost their expert
        stats.loss(balance=0.01, z=0.001)   of the last call of every layer, with gradients
        stats.figure()        all of it as plots

    Raises:
        ValueError: no router in the model, or an unknown layer or loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        if not self._routers:
            raise ValueError("RouterStats: model must contain a layerzoo Router, found none")
        self._history: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in self._routers}
        self._pending = {name: 0 for name in self._routers}  # calls behind the last update of the biases
        self._losses: dict[str, Mapping[str, Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> RouterStats:
        for name, router in self._routers.items():
            self._handles.append(router.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._losses.clear()  # they keep alive the graph of the last call

    @property
    def layers(self) -> tuple[str, ...]:
        """Dotted names of the routers."""
        return tuple(self._routers)

    def load(self, layer: str) -> Tensor:
        """(calls, E) in float64: the share of the pairs that each expert got, before any drop."""
        counts = self._of(layer, 0)
        load: Tensor = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
        return load

    def entropy(self, layer: str) -> Tensor:
        """(calls,) in float64: the entropy over experts of the mean probability, in nats."""
        p = self._of(layer, 1)
        p = p / p.sum(dim=1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        negative: Tensor = torch.special.xlogy(p, p).sum(dim=1)
        return -negative

    def dropped(self, layer: str) -> Tensor:
        """(calls,) in float64: the share of the pairs that lost their expert."""
        return self._of(layer, 2) / self._of(layer, 0).sum(dim=1).clamp(min=1)

    def loss(self, **coefficients: float) -> Tensor:
        """The sum over layers of the losses that are named, of each one's last call, times their coefficients."""
        if not self._losses:
            raise ValueError("RouterStats: no router was called since it was opened")
        terms = []
        for layer, losses in self._losses.items():
            for name, coefficient in coefficients.items():
                if name not in losses:
                    raise ValueError(f"RouterStats: loss must be one of {', '.join(losses)} in {layer}, got {name!r}")
                terms.append(coefficient * losses[name])
        return torch.stack(terms).sum()

    def update_biases(self, rate: float = 1e-3) -> None:
        """`Router.update_bias` of every sigmoid router by the counts since the last time: after an optimizer step."""
        for name, router in self._routers.items():
            calls = self._history[name][len(self._history[name]) - self._pending[name] :]
            if router.kind == "sigmoid" and calls:
                router.update_bias(torch.stack([counts for counts, _, _ in calls]).sum(0), rate)
            self._pending[name] = 0

    def figure(self) -> Figure:
        """A row for each layer: load of each expert over the run, then entropy and drops. Needs matplotlib."""
        from matplotlib.figure import Figure

        called = [name for name in self.layers if self._history[name]]
        if not called:
            raise ValueError("RouterStats: nothing to draw, no router was called")
        figure = Figure(figsize=(9, 2.4 * len(called)), layout="constrained")
        grid = figure.subplots(len(called), 2, squeeze=False)
        for name, (left, right) in zip(called, grid, strict=True):
            load = self.load(name)
            experts = load.shape[1]
            image = left.imshow(
                (load * experts).T.numpy(),
                aspect="auto",
                origin="lower",
                cmap="viridis",
                interpolation="nearest",
                vmin=0,
            )
            figure.colorbar(image, ax=left, label="load over even load")
            left.set(title=name or "(model)", xlabel="call", ylabel="expert")
            right.plot(self.entropy(name).exp().numpy(), label="experts in use (exp of entropy)")
            right.axhline(experts, color="grey", linewidth=0.8, linestyle=":")
            right.set(xlabel="call", ylabel="experts", ylim=(0, experts * 1.05))
            drops = right.twinx()
            drops.plot(100 * self.dropped(name).numpy(), color="tab:red", label="dropped")
            drops.set(ylabel="dropped, %", ylim=(0, 100))
            lines = [*right.get_lines()[:1], *drops.get_lines()]
            right.legend(lines, [str(line.get_label()) for line in lines], fontsize="small", loc="lower left")
        return figure

    def _hook(self, name: str) -> Any:
        def record(_module: nn.Module, _inputs: Any, routing: Routing) -> None:
            if torch._C._current_graph_task_id() != -1:  # inside backward: a recomputed forward
                return
            numbers = (routing.counts, routing.importance, routing.dropped)
            counts, importance, dropped = (number.detach().double().cpu() for number in numbers)
            self._history[name].append((counts, importance, dropped))
            self._pending[name] += 1
            self._losses[name] = routing.losses

        return record

    def _of(self, layer: str, which: int) -> Tensor:
        if layer not in self._history:
            raise ValueError(f"RouterStats: layer must be one of {', '.join(map(repr, self.layers))}, got {layer!r}")
        if not self._history[layer]:
            raise ValueError(f"RouterStats: {layer!r} was not called")
        return torch.stack([entry[which] for entry in self._history[layer]])
