"""Experts that are modules of any kind, in a list."""

from collections.abc import Iterable
from typing import Any

from torch import nn


def factory_of(experts: Iterable[nn.Module]) -> dict[str, Any]:
    """Device and dtype of the first parameter there is, for the layers beside the experts; nothing without one."""
    for parameter in (p for expert in experts for p in expert.parameters()):
        return {"device": parameter.device, "dtype": parameter.dtype}
    return {}


class AnyExperts(nn.Module):
    """A layer around such experts."""

    def reset_parameters(self) -> None:
        """Draws every parameter anew; experts of `around` need a method of this name in each module with parameters."""
        for module in self.modules():
            if module is not self and any(True for _ in module.parameters(recurse=False)):
                module.reset_parameters()  # type: ignore[operator]
