"""layerzoo: install a layer instead of writing it.

Everything is imported on first use, so that `import layerzoo` costs nothing beside `import torch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from layerzoo.hosts.compat import compat
    from layerzoo.hosts.surgery import accelerate, accelerated, restore, swap
    from layerzoo.zoo.registry import card, create, list_layers, register

_NAMES = {
    **dict.fromkeys(("card", "create", "list_layers", "register"), "layerzoo.zoo.registry"),
    **dict.fromkeys(("accelerate", "accelerated", "restore", "swap"), "layerzoo.hosts.surgery"),
    "compat": "layerzoo.hosts.compat",
}
_MODULES = ("bench", "hosts", "nn", "ops", "reference", "testing", "zoo")

__all__ = [
    "__version__",
    "accelerate",
    "accelerated",
    "card",
    "compat",
    "create",
    "list_layers",
    "register",
    "restore",
    "swap",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(_NAMES[name]), name)
    if name in _MODULES:
        return import_module(f"layerzoo.{name}")
    raise AttributeError(f"module 'layerzoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_MODULES])
