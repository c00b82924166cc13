"""Surgery on existing models: `accelerate` keeps the mathematics, `swap` changes a layer, `restore` undoes both.

`accelerate` gives a module another class: same object, same parameters, buffers and keys, so optimizers, hooks and
weight tying stay. Our class knows the host's (`Accelerated.host`); nothing else has to be remembered.

`swap` puts another module into the slots of the parents. What stood there stays in the parent's `__dict__`, which
deepcopy and pickle carry along and state_dict does not see. Until `restore` it costs the memory of what did not move.

Only the model at hand is touched: no class, function or config of the host's library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layerzoo.hosts.places import Place, Target, places, select
from layerzoo.hosts.recipe import Accelerated, find_recipe, is_recipe, qualified, why_not
from layerzoo.hosts.report import Entry, Report
from layerzoo.hosts.transfer import reference_tensor, transfer
from layerzoo.zoo import registry

SWAPPED = "_layerzoo_swapped"  # on a parent: {key: Swapped}
SHARDED = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}


@dataclass(frozen=True)
class Swapped:
    """What stood in a slot before the first swap, what the last one put there, and the device at that time."""

    old: nn.Module
    new: nn.Module
    device: torch.device | None


def accelerate(model: nn.Module, *, dry_run: bool = False, strict: bool = False, verify: bool = False) -> Report:
    """Lets every module of `model` that a recipe knows run on our kernels; parameters, buffers and keys stay.

    `dry_run`: only report. `strict`: a refused module, or none to serve, is an error and nothing is changed. `verify`:
    host's and our forward are compared on a small random input first; where they differ the module is refused.

    Raises TypeError for a model that contains DDP or FSDP (accelerate before wrapping), ValueError under `strict`.
    """
    report, _ = _accelerate(model, dry_run, strict, verify)
    return report


@contextmanager
def accelerated(model: nn.Module, *, strict: bool = False, verify: bool = False) -> Iterator[Report]:
    """`with accelerated(model) as report:` accelerates for the block; what earlier calls changed stays as it is."""
    report, changed = _accelerate(model, False, strict, verify)
    try:
        yield report
    finally:
        for module in changed:
            if isinstance(module, Accelerated):
                _put_back(module)


def swap(model: nn.Module, target: Target, layer: str | Callable[..., nn.Module], **config: Any) -> Report:
    """Replaces the modules that `target` names by new layers, in all their parents.

    `target`: a glob on dotted names (`*` stays inside a segment, `**` crosses), an exact class, a predicate
    (name, module) -> bool, or a list of those. `layer`: the name of a card or a module class, built with `config`, or a
    callable (old, **config) -> new. One layer is built for each place; of matches inside each other the outer counts.

    Parameters of the same name and shape move (the same object), buffers are copied; the rest is fresh or dropped, as
    the report says. Device, dtype, training mode and hooks are the old module's; fresh parameters are frozen where all
    of the old ones were. Everything is built before the model is touched.

    Raises TypeError for a model that contains DDP or FSDP (swap before wrapping), for another kind of target or layer,
    and where a callable returns no module; ValueError where the target, or one of the list, matches nothing.
    """
    root = _unwrap(model, "swap")
    chosen = select(root, target)
    outer = tuple(f"{name}." for place in chosen for name in place.names)
    entries: list[Entry] = []
    plan: list[tuple[Place, nn.Module]] = []
    for place in chosen:
        old = qualified(type(place.module))
        if all(name.startswith(outer) for name in place.names):
            entries.append(Entry(place.name, old, old, "skipped", "inside a module that is replaced"))
            continue
        new = _build(layer, place.module, config)
        entries.append(transfer(root, place, new))
        plan.append((place, new))
    for place, new in plan:
        _fill(place, new)
    return Report("swap", tuple(entries))


def restore(model: nn.Module) -> Report:
    """Undoes every `swap` and `accelerate` in `model`: the same objects in their slots, each of its own class.

    Weights that had moved are as they are now. A module that comes back follows where the model went meanwhile, in
    training mode and device, not in dtype. A slot that somebody else has changed since is left alone and refused.

    Raises TypeError for a model that contains DDP or FSDP.
    """
    entries: list[Entry] = []
    pending, seen = [("", _unwrap(model, "restore"))], set[nn.Module]()
    while pending:
        name, module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        if isinstance(module, Accelerated):
            entries.append(_put_back(module, name))
        entries += [take_back(module, key, name) for key in list(vars(module).get(SWAPPED, ()))]
        # what came back may hold more to undo
        children = [(f"{name}.{key}".lstrip("."), child) for key, child in module._modules.items() if child is not None]
        pending += reversed(children)
    return Report("restore", tuple(entries))


def _accelerate(model: nn.Module, dry_run: bool, strict: bool, verify: bool) -> tuple[Report, list[nn.Module]]:
    entries: list[Entry] = []
    plan: list[tuple[nn.Module, type[Accelerated]]] = []
    companions: dict[type[nn.Module], type[Accelerated]] = {}
    everywhere = places(_unwrap(model, "accelerate"))
    for place in everywhere:
        module, kind = place.module, qualified(type(place.module))
        if isinstance(module, Accelerated):
            entries.append(Entry(place.name, qualified(type(module).host), kind, "already"))
            companions |= {companion.host: companion for companion in type(module).companions}
            continue
        recipe, reason = find_recipe(module, verify=verify)
        if recipe is not None:
            entries.append(Entry(place.name, kind, qualified(recipe), "accelerated", place.shared))
            plan.append((module, recipe))
            companions |= {companion.host: companion for companion in recipe.companions}
        elif reason:
            entries.append(Entry(place.name, kind, kind, "refused", reason))
    for place in everywhere:
        if companion := companions.get(type(place.module)):
            kind = qualified(companion.host)
            if reason := why_not(companion, place.module, verify):
                entries.append(Entry(place.name, kind, kind, "skipped", reason))
            else:
                entries.append(Entry(place.name, kind, qualified(companion), "accelerated", place.shared))
                plan.append((place.module, companion))
    if strict:
        refused = [f"{entry.name}: {entry.reason}" for entry in entries if entry.action == "refused"]
        if refused or not entries:
            raise ValueError(f"accelerate: strict, but {'; '.join(refused) or 'no module of the model has a recipe'}")
    if not dry_run:
        for module, recipe in plan:
            module.__class__ = recipe
    return Report("accelerate", tuple(entries), dry_run), [] if dry_run else [module for module, _ in plan]


def _build(layer: str | Callable[..., nn.Module], old: nn.Module, config: dict[str, Any]) -> nn.Module:
    if isinstance(layer, str):
        return registry.create(layer, **config)
    if isinstance(layer, nn.Module) or not callable(layer):
        raise TypeError(f"swap: layer must be a card's name, a class or a callable (old) -> module, got {layer!r}")
    new = layer(**config) if isinstance(layer, type) else layer(old, **config)
    if not isinstance(new, nn.Module) or new is old:
        raise TypeError(f"swap: layer must give a new nn.Module, got {'the old one' if new is old else repr(new)}")
    return new


def _fill(place: Place, new: nn.Module) -> None:
    """Puts `new` into every slot of the place; the parents remember what stood there before the first swap."""
    tensor = reference_tensor(new)
    for parent, key in place.slots:
        kept: dict[str, Swapped] = vars(parent).setdefault(SWAPPED, {})
        old = kept[key].old if key in kept else place.module
        kept[key] = Swapped(old, new, None if tensor is None else tensor.device)
        parent._modules[key] = new


def take_back(parent: nn.Module, key: str, parent_name: str) -> Entry:
    """Puts what stood in a slot before the first swap back into it."""
    kept: dict[str, Swapped] = vars(parent)[SWAPPED]
    swapped, now = kept[key], parent._modules.get(key)
    name, here, there = f"{parent_name}.{key}".lstrip("."), qualified(type(now)), qualified(type(swapped.old))
    if now is not swapped.new:
        return Entry(name, here, there, "refused", "not the module that swap put there: changed by somebody else")
    if swapped.old.training != now.training:
        swapped.old.train(now.training)
    tensor = reference_tensor(now)
    if tensor is not None and tensor.device != swapped.device:
        swapped.old.to(tensor.device)
    parent._modules[key] = swapped.old
    del kept[key]
    if not kept:
        del vars(parent)[SWAPPED]
    return Entry(name, here, there, "restored")


def _put_back(module: Accelerated, name: str = "") -> Entry:
    """Gives an accelerated module the class of its host."""
    name, ours, host = name or "(model)", qualified(type(module)), type(module).host
    if not is_recipe(type(module)):
        return Entry(name, ours, qualified(host), "refused", "its class was changed since (a parametrization?)")
    module.__class__ = host  # type: ignore[assignment]
    return Entry(name, ours, qualified(host), "restored")


def _unwrap(model: nn.Module, verb: str) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb}: model must be an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        # by name: importing torch.distributed.fsdp takes longer than the surgery
        wrapper = next((kind.__name__ for kind in type(module).__mro__ if kind.__name__ in SHARDED), None)
        if wrapper:
            where = f"its module {name!r}" if name else "it"
            raise TypeError(f"{verb}: model must not be wrapped, but {where} is a {wrapper}; {verb} before wrapping")
    inside = model._modules.get("_orig_mod")  # of torch.compile, which traces again where a class changed
    return model if inside is None else inside
