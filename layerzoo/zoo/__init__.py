"""The zoo: cards (data about layers), the registry that finds and builds layers, and plugins that add to it."""

from layerzoo.zoo.card import LayerCard, ManifestError, Option, Paper, Sample
from layerzoo.zoo.registry import LayerImportError, card, create, layer_class, list_layers, register

__all__ = [
    "LayerCard",
    "LayerImportError",
    "ManifestError",
    "Option",
    "Paper",
    "Sample",
    "card",
    "create",
    "layer_class",
    "list_layers",
    "register",
]
