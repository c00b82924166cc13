"""Routed low-rank experts on a whole model: `attach_lora_experts` and back.

Gao et al., "Higher Layers Need More LoRA Experts" (2024), arXiv 2402.08562.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from layerzoo.hosts.places import Place, Target, places, select
from layerzoo.hosts.report import Report
from layerzoo.hosts.surgery import SWAPPED, swap, take_back
from layerzoo.nn.moe.moe_lora import MoELoRA

FROZEN = "_layerzoo_frozen"  # on the model: names of the parameters that could be trained before


def attach_lora_experts(
    model: nn.Module,
    target: Target,
    num_experts: int | Sequence[int] = (2, 4, 6, 8),
    *,
    top_k: int = 2,
    rank: int = 8,
    alpha: float = 16.0,
) -> Report:
    """Puts `MoELoRA` around the linear layers of `model` that `target` names, as `swap` does; all else is frozen.

    Afterwards the parameters of the experts and their routers are the only ones that need gradients, and the model
    computes what it did. `detach_lora_experts` takes it all off.

    Args:
        target: as in `swap`; every match must be an nn.Linear.
        num_experts: of each layer, or a schedule over depth: of n numbers the i-th is for the i-th of n equal parts of
            the blocks, the lowest first. A block is what the first number in a dotted name counts.
        top_k, rank, alpha: as in `MoELoRA`.

    Raises:
        TypeError: a match that is no nn.Linear; what `swap` raises. ValueError: a target without a match, a model that
            has experts already, an empty schedule, or one for a match whose name has no number.
    """
    if FROZEN in vars(model):
        raise ValueError("attach_lora_experts: model has LoRA experts already; detach_lora_experts first")
    chosen = select(model, target)
    for place in chosen:
        if not isinstance(place.module, nn.Linear):
            kind = type(place.module).__name__
            raise TypeError(f"attach_lora_experts: target must name nn.Linear layers, but {place.name} is a {kind}")
    counts = {place.module: _count(model, place, num_experts) for place in chosen}

    def around(old: nn.Module) -> nn.Module:
        assert isinstance(old, nn.Linear)
        return MoELoRA.around(old, counts[old], top_k, rank, alpha)

    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    report = swap(model, target, around)
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, MoELoRA):
            for parameter in (*module.router.parameters(), module.lora_A, module.lora_B):
                parameter.requires_grad_(True)
    vars(model)[FROZEN] = tuple(trainable)
    return report


def detach_lora_experts(model: nn.Module) -> Report:
    """Undoes `attach_lora_experts`: the same linear layers in their places, trainable what was. Other changes stay.

    Raises:
        ValueError: a model without LoRA experts.
    """
    if FROZEN not in vars(model):
        raise ValueError("detach_lora_experts: model has no LoRA experts; attach_lora_experts puts them on")
    entries = [
        take_back(place.module, key, place.names[0])
        for place in places(model)
        for key, swapped in list(vars(place.module).get(SWAPPED, {}).items())
        if isinstance(swapped.new, MoELoRA)
    ]
    trainable = vars(model).pop(FROZEN)
    for name, parameter in model.named_parameters():
        if name in trainable:
            parameter.requires_grad_(True)
    return Report("detach_lora_experts", tuple(entries))


def _count(model: nn.Module, place: Place, num_experts: int | Sequence[int]) -> int:
    if isinstance(num_experts, int):
        return num_experts
    found = re.match(r"(?:(.*?)\.)??(\d+)(?:\.|$)", place.name)
    if not found or not num_experts:
        what = "at least one number" if not num_experts else f"one number, since the name {place.name!r} has no block's"
        raise ValueError(f"attach_lora_experts: num_experts must be {what}, got {num_experts!r}")
    blocks = len(list(model.get_submodule(found[1] or "").children()))
    return num_experts[int(found[2]) * len(num_experts) // blocks]
