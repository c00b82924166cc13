"""What a benchmark measures. Cases are data, and picklable; the runner is the only code that takes times."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["forward", "forward+backward", "prefill", "decode"]
Shape = Mapping[str, int]

# Relative in norm, of what is compared with the reference (docs of each family: Numerics).
TOLERANCES = {"float64": 1e-9, "float32": 3e-5, "bfloat16": 3e-2, "float16": 5e-3}


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
    """One way to do the work of a case.

    `build` gets the inputs of the case, and what the import string `needs` ("package.module" or
    "package.module:attribute") names, where there is one. What cannot be imported is shown as absent, with the reason.
    """

    name: str
    build: Callable[..., Work]
    needs: str = ""
    full: bool = False  # takes minutes: measured only when asked for

    def start(self, inputs: Any) -> Work:
        """Builds the work. Raises ImportError where what it needs is not installed, or another version of it is."""
        return self.build(inputs, imported(self.needs)) if self.needs else self.build(inputs)


def imported(name: str) -> Any:
    """What an import string names. Raises ImportError, for a missing attribute too."""
    path, _, attribute = name.partition(":")
    module = import_module(path)
    try:
        return attrgetter(attribute)(module) if attribute else module
    except AttributeError as error:
        raise ImportError(f"{path} has no {attribute}") from error


@dataclass(frozen=True)
class Cost:
    """The least that a call has to do: every tensor passes once, whatever the implementation.

    The arithmetic is in operations, and a multiply-add counts as two of them.
    """

    read: float = 0  # bytes
    written: float = 0  # bytes
    gathered: float = 0  # bytes, read in rows from random places
    products: float = 0  # operations of matrix products
    flops: float = 0  # all other operations but exponentials
    exps: float = 0

    @property
    def bytes(self) -> float:
        """Bytes that pass between memory and the processor."""
        return self.read + self.written + self.gathered

    @property
    def operations(self) -> float:
        """Operations, with an exponential counted as one."""
        return self.products + self.flops + self.exps


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

    At `shape` the first peer that runs is the yardstick for all the others. `inputs` is deterministic and in float32 on
    the CPU; the runner casts and moves what it returns (tensors and modules in dicts and lists) to the type and device
    of the run, all but the `wide` ones, and every candidate gets the same.
    """

    name: str  # family.what; in a plugin plugin:what
    variant: str
    direction: Direction
    shape: Shape
    check: Shape
    inputs: Callable[[Shape], Any]
    ours: Candidate
    reference: Candidate
    peers: tuple[Candidate, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)  # the first is the default
    devices: tuple[str, ...] = ("cpu",)
    wide: tuple[str, ...] = ()  # names of inputs that stay in float32 for 16-bit types
    tolerance: float = 0  # where the type's own (`TOLERANCES`) is too strict
    elements: tuple[str, ...] = ()  # sizes whose product counts elements, for ns/element
    tokens: tuple[str, ...] = ()  # sizes whose product counts tokens, for tokens/s
    cost: Callable[[Shape, Any], Cost] | None = None  # of a shape and its inputs, whose types tell the bytes
    targets: tuple[Target, ...] = ()

    @property
    def id(self) -> str:
        """What patterns are matched with."""
        return "/".join(filter(None, (self.name, self.variant, self.direction)))

    def allowed(self, dtype: str) -> float:
        """How far from the reference a tensor may be, relative in norm."""
        return max(self.tolerance, TOLERANCES[dtype])
