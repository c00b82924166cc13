"""Where in a model: every module once, with all its names and parents, and the targets that choose among them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from layerzoo.hosts.recipe import Accelerated

OneTarget = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Target = OneTarget | Sequence[OneTarget]


@dataclass(eq=False)
class Place:
    """A module, its dotted names (several where it is shared), and the (parent, key) pairs that hold it."""

    module: nn.Module
    names: list[str] = field(default_factory=list)
    slots: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0] or "(model)"

    @property
    def shared(self) -> str:
        """Where else the module stands, in words."""
        return f"shared with {', '.join(self.names[1:])}" if len(self.names) > 1 else ""

    @property
    def kind(self) -> type[nn.Module]:
        """The class that the user knows: the host's, for an accelerated module."""
        module = self.module
        return type(module).host if isinstance(module, Accelerated) else type(module)


def places(model: nn.Module) -> list[Place]:
    """Every module of the model once, in the order of `named_modules`, the model itself first."""
    found: dict[nn.Module, Place] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, Place(module)).names.append(name)
    for parent in found:
        for key, child in parent._modules.items():
            if child is not None:
                found[child].slots.append((parent, key))
    return list(found.values())


def select(model: nn.Module, target: Target) -> list[Place]:
    """The places inside `model` that a target names: a glob (`*` stays inside a segment, `**` crosses dots, `**.` may
    be empty), an exact class, a predicate (name, module) -> bool, or a list of those.

    Raises TypeError for another kind of target, ValueError where one of them matches nothing.
    """
    candidates = places(model)[1:]  # the model itself has no parent in which it could be replaced
    chosen: set[Place] = set()
    for one in target if isinstance(target, list | tuple) else [target]:
        if isinstance(one, nn.Module) or not (isinstance(one, str | type) or callable(one)):
            raise TypeError(f"swap: target must be a glob, class, predicate (name, module) or list, got {one!r}")
        hits = [place for place in candidates if _matches(one, place)]
        if not hits:
            raise ValueError(_nothing_matched(one, model, candidates))
        chosen.update(hits)
    return [place for place in candidates if place in chosen]


def _matches(target: OneTarget, place: Place) -> bool:
    if isinstance(target, str):
        pattern = _regex(target)
        return any(pattern.fullmatch(name) for name in place.names)
    if isinstance(target, type):
        return place.kind is target or type(place.module) is target
    return any(target(name, place.module) for name in place.names)


def _regex(glob: str) -> re.Pattern[str]:
    words = {"**.": r"(?:.*\.)?", "**": ".*", "*": r"[^.]*"}
    parts = re.split(r"(\*\*\.|\*\*|\*)", glob)
    return re.compile("".join(words.get(part, re.escape(part)) for part in parts))


def _nothing_matched(target: OneTarget, model: nn.Module, candidates: list[Place]) -> str:
    if isinstance(target, str):
        names = [name for place in candidates for name in place.names]
        near = ", ".join(difflib.get_close_matches(target, names, 5, cutoff=0.3)) or "none"
        return f"swap: target {target!r} matches no module; closest names: {near}"
    if isinstance(target, type):
        kinds = ", ".join(dict.fromkeys(place.kind.__name__ for place in candidates))
        itself = "; the model itself is one, but has no parent in which to replace it" if type(model) is target else ""
        return f"swap: target {target.__name__} matches no module; classes in the model: {kinds}{itself}"
    return f"swap: target {target!r} holds for none of the model's {len(candidates)} modules"
