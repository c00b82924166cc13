"""What a benchmark measures. Cases are data, and picklable; the runner is the only code that takes times."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "forward+backward", "prefill", "decode"]
Shape = Mapping[str, int]


@dataclass(frozen=True)
class Work:
    """One call that can be timed: `call()` gives the output, `leaves` and `grad_out` what a backward pass needs."""

    call: Callable[[], Tensor]
    leaves: Mapping[str, Tensor] = field(default_factory=dict)
    grad_out: Tensor | None = None

    def run(self, direction: Direction) -> dict[str, Tensor]:
        """Runs once; returns the output, and with a backward pass the gradient of every leaf, by name."""
        if direction != "forward+backward":
            with torch.no_grad():
                return {"output": self.call()}
        output = self.call()
        grads = torch.autograd.grad(output, list(self.leaves.values()), self.grad_out)
        return {"output": output.detach(), **{f"gradient of {n}": g for n, g in zip(self.leaves, grads, strict=True)}}


@dataclass(frozen=True)
class Candidate:
    """One way to do the work of a case. `build` gets the inputs of the case; its ImportError means: absent here."""

    name: str
    build: Callable[[Any], Work]
    full: bool = False  # takes minutes: measured only when asked for


@dataclass(frozen=True)
class Target:
    """What a figure of a case (see `report.Result.metrics`) should reach."""

    metric: str
    at_most: float | None = None
    at_least: float | None = None

    def met(self, value: float) -> bool:
        """Whether `value` lies within the bounds."""
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    def __str__(self) -> str:
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"


@dataclass(frozen=True)
class Case:
    """A benchmark: `ours` against `peers` at `shape`, after each agreed with `reference` at the small shape `check`.

    At `shape` the first peer that runs is the yardstick for all the others. `inputs` is deterministic, and every
    candidate gets what it returns.
    """

    name: str  # family.what
    variant: str
    direction: Direction
    shape: Shape
    check: Shape
    inputs: Callable[[Shape], Any]
    ours: Candidate
    reference: Candidate
    peers: tuple[Candidate, ...] = ()
    tolerance: float = 3e-5  # of each tensor, relative in norm
    elements: tuple[str, ...] = ()  # sizes whose product counts elements, for ns/element
    tokens: tuple[str, ...] = ()  # sizes whose product counts tokens, for tokens/s
    bytes: Callable[[Shape, Any], int] | None = None  # of shape and inputs: what has to be read from memory
    memory: bool = False  # whether to measure the peak extra memory of ours, relative to its leaves
    targets: tuple[Target, ...] = ()

    @property
    def id(self) -> str:
        """What patterns are matched with."""
        return "/".join(filter(None, (self.name, self.variant, self.direction)))
