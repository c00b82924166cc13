"""How the parts train: one loop, with its row of the table and its plot."""

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor, nn

from layerzoo.bench.plots import BLUE, GREY, RED, svg
from layerzoo.demo.report import Row

Batch = tuple[Tensor, ...]


def train(
    model: nn.Module,
    measure: Callable[..., tuple[Tensor, Tensor]],
    draw: Callable[[], Batch],
    held_out: Batch,
    progress: Progress,
    *,
    what: str,
    form: str,
    goal: float,
    steps: int,
    rate: float,
    **axes: Any,
) -> tuple[Row, str]:
    """Trains for `steps` batches from `draw`; the held-out figure before and after as a row, and all figures as a plot.

    `measure(*batch)` gives the loss and the figure that is shown: `what` is its name, `form` its format, `axes` are
    settings of its axis. Raises RuntimeError where the held-out figure does not get from where it starts to `goal`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    batches: list[float] = []
    checks = {0: _held_out(model, measure, held_out)}
    task = progress.add_task("", total=steps)
    start = perf_counter()
    for step in range(1, steps + 1):
        loss, value = measure(*draw())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        batches.append(value.item())
        if step % max(1, steps // 12) == 0 or step == steps:
            checks[step] = _held_out(model, measure, held_out)
        shown = f"{what}, held-out: {checks[max(checks)]:{form}}, goal {goal:{form}}"
        progress.update(task, advance=1, description=shown)
    took, before, after = perf_counter() - start, checks[0], checks[steps]
    if not min(before, after) <= goal <= max(before, after):
        raise RuntimeError(f"demo: {what}: {after:{form}} after {steps} steps, the goal is {goal:{form}}")
    row = (f"{what}, held-out", f"{before:{form}}", f"{after:{form}}", f"{steps} steps, {took:.0f} s")

    plot = Figure(figsize=(7, 3), layout="constrained")
    ax = plot.add_subplot(xlabel="step", ylabel=what, **axes)
    ax.plot(range(1, steps + 1), batches, color=GREY, linewidth=1, label="training batch")
    ax.plot(list(checks), list(checks.values()), color=BLUE, marker="o", markersize=3, label="held-out")
    ax.axhline(goal, color=RED, linewidth=1, linestyle="--", label=f"goal {goal:{form}}")
    ax.minorticks_off()
    ax.legend(frameon=False)
    return row, svg(plot, what)


def _held_out(model: nn.Module, measure: Callable[..., tuple[Tensor, Tensor]], batch: Batch) -> float:
    model.eval()
    with torch.no_grad():
        _, value = measure(*batch)
    model.train()
    return value.item()
