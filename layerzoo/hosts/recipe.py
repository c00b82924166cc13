"""Which class of ours stands in for which class of a host, and whether it fits a given module."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# The families of transformers with a Mamba mixer, and its class; ours has the same name.
MIXERS = {
    "mamba": "MambaMixer",
    "mamba2": "Mamba2Mixer",
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "falcon_mamba": "FalconMambaMixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "jamba": "JambaMambaMixer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "zamba": "ZambaMambaMixer",
    "zamba2": "Zamba2MambaMixer",
}
# The host's class -> ours. By name, so that no host is imported before a model of it is at hand.
RECIPES = {
    f"transformers.models.{family}.modeling_{family}.{name}": f"layerzoo.hosts.transformers.{family}:{name}"
    for family, name in MIXERS.items()
}
# Classes of experts are many, but all get their forward, which asks the model's config whom to call, from one module.
DISPATCH = "transformers.integrations.moe"
EXPERTS = "layerzoo.hosts.transformers.experts:recipe_for"
# of a whole module on a probe, relative in norm: a few ops deep, and a host may round more often than we do
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Accelerated(nn.Module):
    """The mark of a class of ours that stands in for `host` in existing modules: other forward, same parameters.

    A recipe is `class X(Accelerated, HostX)` with `host = HostX`, importable by name (so that accelerated modules can
    be pickled), without an `__init__`. Its forward takes exactly the arguments of the host's and needs no attribute of
    an instance that the host does not have. `renamed` maps what another version of the host calls an argument to our
    name for it; the forward then has to take both.
    """

    host: ClassVar[type[nn.Module]]
    renamed: ClassVar[Mapping[str, str]] = MappingProxyType({})
    # recipes for other classes, applied in every model that has a module of this one
    companions: ClassVar[tuple[type[Accelerated], ...]] = ()

    @classmethod
    def refusal(cls, module: Any) -> str:
        """Why this module of the host cannot be served; empty where it can."""
        raise NotImplementedError

    @classmethod
    def probe(cls, module: Any) -> tuple[Tensor, ...]:
        """A small random input for `forward`, drawn without touching the global generators."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return ", ".join(filter(None, ("layerzoo", super().extra_repr())))


def qualified(kind: type) -> str:
    """The dotted name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_recipe(kind: type[nn.Module]) -> bool:
    """True for a recipe itself, False for what others derive from it (parametrizations, FSDP)."""
    return "host" in vars(kind)


def has_kernel(op: str, device: str) -> bool:
    """Whether a kernel of `layerzoo::op` is loaded for a type of device; without one the op runs in plain PyTorch."""
    key = torch._C._dispatch_key_for_device(device)
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"layerzoo::{op}", key)


def find_recipe(module: nn.Module, *, verify: bool = False) -> tuple[type[Accelerated] | None, str]:
    """The recipe for a module, or None and the reason; (None, "") where the module is of no known host."""
    kind = type(module)
    known = next((base for base in kind.__mro__ if qualified(base) in RECIPES or _dispatches(base)), None)
    if known is None:
        return None, ""
    if known is not kind:
        return None, f"a subclass of {qualified(known)}, whose forward may differ; the recipe is for exactly that class"
    path, _, name = RECIPES.get(qualified(kind), EXPERTS).partition(":")
    try:
        found: Any = getattr(importlib.import_module(path), name)
        recipe: type[Accelerated] = found(kind) if _dispatches(kind) else found
    except (ImportError, AttributeError) as error:
        return None, f"the installed host lacks what the recipe is built on: {error}"
    reason = why_not(recipe, module, verify)
    return (None, reason) if reason else (recipe, "")


def _dispatches(kind: type) -> bool:
    forward = getattr(kind, "forward", None)
    return getattr(forward, "__globals__", {}).get("__name__") == DISPATCH


def why_not(recipe: type[Accelerated], module: nn.Module, verify: bool) -> str:
    """Why the recipe cannot serve a module of its host; empty where it can."""
    reason = _changed(recipe) or _patched(module) or recipe.refusal(module)
    return _differs(recipe, module) if verify and not reason else reason


def _changed(recipe: type[Accelerated]) -> str:
    """Compares the arguments of the host's forward with ours: another host would give wrong results, not errors."""
    ours, theirs = (
        [(recipe.renamed.get(arg.name, arg.name), arg.kind, arg.default) for arg in arguments.parameters.values()]
        for arguments in map(inspect.signature, (recipe.forward, recipe.host.forward))
    )
    if ours == theirs:
        return ""
    want, got = (", ".join(name for name, _, _ in arguments) for arguments in (ours, theirs))
    return f"written for {recipe.host.__name__}.forward({want}), the installed one is forward({got})"


def _patched(module: nn.Module) -> str:
    return "its forward is patched on the instance (a device map?)" if "forward" in vars(module) else ""


def _differs(recipe: type[Accelerated], module: nn.Module) -> str:
    """Runs the host's forward and ours on the recipe's probe."""
    probe = recipe.probe(module)
    if probe[0].is_meta:
        return "a module on the meta device cannot be verified"
    ours = copy.copy(module)
    ours.__class__ = recipe
    with torch.no_grad():
        expected: Any = recipe.host.forward(module, *probe)
        error = float((ours.forward(*probe) - expected).norm() / expected.norm())
    allowed = TOLERANCE[expected.dtype]
    return "" if error <= allowed else f"on a probe its output differs by {error:.1e} (relative), allowed {allowed:.0e}"
