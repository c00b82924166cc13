"""The registry: list, describe and build layers by name. Listing imports no layer; building imports that one only."""

import functools
import importlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from layerzoo.zoo.card import LayerCard, did_you_mean, parse_manifest
from layerzoo.zoo.plugins import MANIFEST, plugins

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger("layerzoo")
_registered: dict[str, tuple[LayerCard, "type[nn.Module]"]] = {}
_reported: set[tuple[str, str]] = set()


class LayerImportError(ImportError):
    """A card's target cannot be imported, or is not an ``nn.Module`` class."""


def list_layers(pattern: str = "*", *, domain: str | None = None, family: str | None = None) -> list[str]:
    """Names of the layers that match a glob, sorted; imports no plugin and no layer.

    Raises:
        ValueError: no layer at all has this domain or family; the message says which exist.
    """
    cards = all_cards().values()
    for key, wanted in (("domain", domain), ("family", family)):
        existing = sorted({getattr(card, key) for card in cards})
        if wanted is not None and wanted not in existing:
            raise ValueError(f"list_layers: {key} must be one of {', '.join(existing)}, got {wanted!r}")
    return sorted(
        card.name
        for card in cards
        if fnmatchcase(card.name, pattern) and domain in (None, card.domain) and family in (None, card.family)
    )


def card(name: str) -> LayerCard:
    """The card of a layer; imports nothing of it.

    Raises:
        ValueError: no such layer; the message offers close matches, or says why its plugin is not available.
    """
    known = _core().get(name) or _notebook().get(name)
    if known is not None:
        return known
    found = all_cards()
    if name in found:
        return found[name]
    prefix, colon, _ = str(name).partition(":")
    for info in plugins() if colon else ():
        if info.name == prefix and info.state != "ok":
            raise ValueError(f"card: {name!r} is not available, its plugin is {info.state}: {info.error}")
    raise ValueError(f"card: no layer is named {name!r}{did_you_mean(str(name), found)}")


def layer_class(name: str) -> "type[nn.Module]":
    """The class of a layer: imports its module, and only that.

    Raises:
        ValueError: no such layer.
        LayerImportError: its module raises on import, or its target is not an ``nn.Module`` class.
    """
    found = card(name)
    if name in _registered:
        return _registered[name][1]
    module, _, path = found.target.partition(":")
    try:
        target = functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (Exception, SystemExit) as error:  # a layer may raise anything; the caller's program must go on
        reason = f"{type(error).__name__}: {error}"
        raise LayerImportError(f"{name} cannot be imported from {found.target}: {reason}") from error
    from torch import nn

    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise LayerImportError(f"{name}: {found.target} must be a subclass of torch.nn.Module, got {target!r}")
    return target


def create(name: str, **config: Any) -> "nn.Module":
    """Build a layer from its name and its constructor's arguments (``device`` and ``dtype`` included).

    Raises:
        ValueError, TypeError: unknown layer, or an argument that its card does not allow (nothing was imported).
        LayerImportError: see ``layer_class``.
    """
    card(name).check_config(config)
    return layer_class(name)(**config)


def register(cls: "type[nn.Module]", card: LayerCard) -> None:
    """Add a layer to this process, for notebooks: ``card.target`` is filled in from the class.

    Registering the same class again, as a rerun cell does, replaces its card.

    Raises:
        TypeError: not an ``nn.Module`` class.
        ValueError: the name is not ``family/name``, or it is taken by another layer (both are named).
    """
    from torch import nn

    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register: cls must be a subclass of torch.nn.Module, got {cls!r}")
    if not card.name.startswith(f"{card.family}/"):
        raise ValueError(f"register: the name must be {card.family}/name, got {card.name!r}")
    card = replace(card, target=f"{cls.__module__}:{cls.__qualname__}")
    taken = _core().get(card.name) or _notebook().get(card.name)
    if taken is not None and (card.name in _core() or taken.target != card.target):
        raise ValueError(f"register: {card.name!r} is taken by {taken.target}, {card.target} needs another name")
    _registered[card.name] = card, cls


def all_cards() -> dict[str, LayerCard]:
    """Every card by name: core, working plugins, this process. A broken plugin is logged once and left out."""
    cards = {**_core(), **_notebook()}
    for info in plugins():
        if info.state in ("broken", "missing") and (info.name, info.error) not in _reported:
            _reported.add((info.name, info.error))
            _log.warning("plugin %s is %s: %s (see `layerzoo doctor`)", info.name, info.state, info.error)
        # Prefixes keep plugins out of each other's names and out of the core's.
        cards.update({card.name: card for card in info.cards})
    return cards


@functools.cache
def _core() -> Mapping[str, LayerCard]:
    text = files("layerzoo").joinpath(MANIFEST).read_text(encoding="utf-8")
    return {card.name: card for card in parse_manifest(text, None).cards}


def _notebook() -> Mapping[str, LayerCard]:
    return {name: card for name, (card, _) in _registered.items()}
