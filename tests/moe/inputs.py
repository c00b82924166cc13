"""Random arguments for the ops of mixtures of experts, in every memory layout."""

from typing import Any

import torch
from ssm.inputs import lay_out
from torch import Tensor

ROUTINGS = ("distinct", "one", "some empty", "repeated", "dropped")
LAYOUTS = ("time-last", "channel-last", "rows", "gaps")  # of the last two dimensions: see lay_out
# What stands between the two matrices.
GATES: dict[str, dict[str, Any]] = {
    **{name: {"activation": name} for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2")},
    **{
        f"{name} alone": {"activation": name, "gated": False} for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2")
    },
    "gpt-oss": {"alpha": 1.702, "limit": 0.7},
    "clamped silu": {"limit": 0.5},
    "clamped gelu": {"activation": "gelu", "limit": 0.5},
}


def route(tokens: int, experts: int, k: int, routing: str) -> Tensor:
    """(tokens, k) ids. distinct: of a row; some empty: and only of the upper half; dropped: half of them the id E."""
    if routing == "one":
        return torch.full((tokens, k), experts - 1)
    if routing == "repeated":
        return torch.randint(0, experts, (tokens, 1)).repeat(1, k)
    ids = torch.rand(tokens, experts).argsort(1)[:, :k]
    if routing == "some empty":
        return ids // 2 + experts // 2
    return torch.where(torch.rand(ids.shape) < 0.5, experts, ids) if routing == "dropped" else ids


def expert_arguments(
    tokens: int,
    outer: int,
    inner: int,
    experts: int,
    k: int,
    *,
    gate: str = "silu",
    routing: str = "distinct",
    transposed: bool = False,
    interleaved: bool = False,
    biases: bool = True,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    scores: torch.dtype | None = None,
    ids: torch.dtype = torch.int64,
    layouts: tuple[str, ...] = ("time-last",),
    ragged: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of moe_experts, or of moe_experts_ragged; `layouts` are taken in turn.

    `parameters` is the type of the matrices, and `scores` that of weights and biases, else that of x.
    """
    torch.manual_seed(seed)
    options = GATES[gate]
    gated = options.get("gated", True)
    width = 2 * inner if gated else inner
    shapes = {"w13": (experts, width, outer), "w2": (experts, outer, inner)}
    tensors = {"x": torch.randn(tokens, outer).to(dtype)}
    for name, shape in shapes.items():
        w = (torch.randn(shape) / shape[2] ** 0.5).to(parameters or dtype)
        tensors[name] = w.mT if transposed else w
    picked = route(tokens, experts, k, routing)
    if ragged:
        local = picked.flatten()
        order = local.argsort(stable=True)[: int((local < experts).sum())]
        tensors["tokens"] = (order // max(k, 1)).to(ids)
        tensors["offsets"] = torch.bincount(local, minlength=experts)[:experts].cumsum(0)
        tensors["offsets"] = torch.cat([torch.zeros(1), tensors["offsets"]]).to(ids)
        tensors["weights"] = torch.rand(order.shape)
    else:
        tensors["ids"] = picked.to(ids)
        tensors["weights"] = torch.rand(tokens, k)
    tensors["weights"] = tensors["weights"].to(scores or dtype)
    if biases:
        tensors["b13"] = (torch.randn(experts, width) / 4).to(scores or dtype)
        tensors["b2"] = (torch.randn(experts, outer) / 4).to(scores or dtype)
    laid = {name: lay_out(x, layouts[i % len(layouts)]) for i, (name, x) in enumerate(tensors.items())}
    return laid | options | {"transposed": transposed, "interleaved": interleaved and gated}
