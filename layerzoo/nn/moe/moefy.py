"""MoEfication: a dense feed-forward layer whose neurons are split into experts, of which each token meets few.

Zhang et al., "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (2022), arXiv 2110.01786.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerzoo.ops import moe_experts
from layerzoo.ops.moe.experts import Activation
from layerzoo.reference import accumulate_dtype
from layerzoo.reference.moe import ACTIVATIONS, activate


class MoEfiedFFN(nn.Module):
    """Maps (..., hidden_size) to the same shape: W2 act(W1 x + b1) + b2, with the neurons of `top_k` experts only.

    The `num_experts` experts are equal parts of the neurons, each with weight 1, so top_k = num_experts is the dense
    layer. The router is linear and begins at the centre of each expert's rows of W1 and b1: it says the mean of what
    the expert's neurons have before the activation. `moefy` makes such a layer of a dense one; `dense` is the way back.

    Parameters: w13 (E, I / E, H), b13 (E, I / E), w2 (E, H, I / E), bias (H,), router (E, H) with bias; the buffer
    `neurons` (I,) says which neuron of the dense layer stands where.

    Args:
        hidden_size, intermediate_size: H and I of the dense layer. num_experts: divides intermediate_size.
        top_k: experts for each token. activation: one of `moe_experts`'. bias: whether there are b1 and b2.

    Raises:
        ValueError: a size that is not positive, a number of experts that does not divide, top_k out of range, another
            activation, an input of another width.
    """

    neurons: Tensor

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        activation: Activation = "relu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(hidden_size, intermediate_size, num_experts) < 1 or intermediate_size % num_experts:
            raise ValueError(
                f"MoEfiedFFN: hidden_size, intermediate_size and num_experts must be positive and num_experts divide "
                f"intermediate_size, got {hidden_size}, {intermediate_size} and {num_experts}"
            )
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"MoEfiedFFN: top_k must be in [1, num_experts = {num_experts}], got {top_k}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MoEfiedFFN: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.activation: Activation = activation
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = intermediate_size // num_experts
        self.w13 = nn.Parameter(torch.empty(num_experts, inner, hidden_size, **like))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, inner, **like))
        self.b13 = nn.Parameter(torch.empty(num_experts, inner, **like)) if bias else None
        self.bias = nn.Parameter(torch.empty(hidden_size, **like)) if bias else None
        self.router = nn.Linear(hidden_size, num_experts, bias, **like)
        self.register_buffer("neurons", torch.arange(intermediate_size, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws a dense layer anew, as `nn.Linear` does, and sets the router to its centres."""
        one, other = self.hidden_size**-0.5, self.neurons.numel() ** -0.5
        for weight, bound in ((self.w13, one), (self.b13, one), (self.w2, other), (self.bias, other)):
            if weight is not None:
                nn.init.uniform_(weight, -bound, bound)
        self.reset_router()

    @torch.no_grad()
    def reset_router(self) -> None:
        """Sets the router to the centres of the experts, as they are now."""
        self.router.weight.copy_(self.w13.mean(dim=1))
        if self.b13 is not None:
            self.router.bias.copy_(self.b13.mean(dim=1))

    def extra_repr(self) -> str:
        size = f"hidden_size={self.hidden_size}, intermediate_size={self.neurons.numel()}"
        return f"{size}, num_experts={self.num_experts}, top_k={self.top_k}, activation={self.activation!r}"

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., hidden_size) -> the same shape."""
        rows = self._rows(hidden_states)
        ids = self._route(rows)
        weights = torch.ones_like(ids, dtype=rows.dtype)
        options: dict[str, Any] = {"activation": self.activation, "b13": self.b13, "gated": False}
        y = moe_experts(rows, ids, weights, self.w13, self.w2, **options).view(hidden_states.shape)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def activations_kept(self, hidden_states: Tensor) -> float:
        """The share of sum |act(W1 x + b1)| over all neurons that the chosen experts have; inputs (..., H)."""
        rows = self._rows(hidden_states)
        wide = accumulate_dtype(rows)
        bias = None if self.b13 is None else self.b13.flatten().to(wide)
        inner = F.linear(rows.to(wide), self.w13.flatten(0, 1).to(wide), bias)
        size = activate(self.activation, inner, 1.0)[0].abs().unflatten(1, (self.num_experts, -1)).sum(2)
        total = float(size.sum())
        return float(size.gather(1, self._route(rows)).sum()) / total if total else 1.0

    @torch.no_grad()
    def dense(self) -> tuple[nn.Linear, nn.Linear]:
        """The two linear layers of the dense layer, new ones, with the neurons where they were before `moefy`."""
        back = self.neurons.argsort()
        inner, like = self.neurons.numel(), {"device": self.w13.device, "dtype": self.w13.dtype}
        up = nn.Linear(self.hidden_size, inner, self.bias is not None, **like)
        down = nn.Linear(inner, self.hidden_size, self.bias is not None, **like)
        up.weight.copy_(self.w13.flatten(0, 1)[back])
        down.weight.copy_(self.w2.transpose(1, 2).flatten(0, 1)[back].mT)
        if self.b13 is not None and self.bias is not None:
            up.bias.copy_(self.b13.flatten()[back])
            down.bias.copy_(self.bias)
        return up, down

    def _rows(self, hidden_states: Tensor) -> Tensor:
        if not hidden_states.dim() or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"MoEfiedFFN: hidden_states must have shape (..., hidden_size = {self.hidden_size}), "
                f"got {tuple(hidden_states.shape)}"
            )
        return hidden_states.reshape(-1, self.hidden_size)

    def _route(self, rows: Tensor) -> Tensor:
        order: Tensor = self.router(rows).sort(dim=1, descending=True, stable=True).indices
        return order[:, : self.top_k]


@torch.no_grad()
def moefy(
    mlp: nn.Module, num_experts: int, top_k: int, *, activation: Activation | None = None, seed: int = 0
) -> MoEfiedFFN:
    """A `MoEfiedFFN` with the weights of a dense feed-forward layer, which stays as it is.

    Neurons with similar rows of W1 come into one expert, by k-means with clusters of equal size. In a trained layer
    with relu few neurons are above zero for a token, so few experts have most of what it computes: `activations_kept`
    measures how much.

    Args:
        mlp: holds two nn.Linear, the one into the inner width first, and besides at most an activation, dropout, which
            is left out, and nn.Identity.
        num_experts: divides the inner width. top_k: experts for each token.
        activation: needed where it cannot be read from an nn.ReLU, nn.GELU or nn.SiLU in `mlp`.
        seed: of the first centres.

    Raises:
        TypeError: mlp is no module. ValueError: it holds something else; what `MoEfiedFFN` raises.
    """
    up, down, found = _parts(mlp, activation)
    bias = up.bias is not None
    like: dict[str, Any] = {"device": up.weight.device, "dtype": up.weight.dtype}
    layer = MoEfiedFFN(up.in_features, up.out_features, num_experts, top_k, found, bias, **like)
    order = _clusters(up.weight.to(accumulate_dtype(up.weight)), num_experts, seed)
    layer.neurons.copy_(order)
    layer.w13.copy_(up.weight[order].view_as(layer.w13))
    layer.w2.copy_(down.weight.mT[order].view(num_experts, -1, up.in_features).mT)
    if layer.b13 is not None and layer.bias is not None:
        layer.b13.copy_(up.bias[order].view_as(layer.b13))
        layer.bias.copy_(down.bias)
    layer.reset_router()
    return layer.train(mlp.training)


def _parts(mlp: nn.Module, activation: Activation | None) -> tuple[nn.Linear, nn.Linear, Activation]:
    if not isinstance(mlp, nn.Module):
        raise TypeError(f"moefy: mlp must be an nn.Module, got {type(mlp).__name__}")
    leaves = [module for module in mlp.modules() if not any(True for _ in module.children())]
    linears = [module for module in leaves if isinstance(module, nn.Linear)]
    rest = [module for module in leaves if not isinstance(module, nn.Linear | nn.Dropout | nn.Identity)]
    shapes = [(linear.in_features, linear.out_features, linear.bias is not None) for linear in linears]
    if len(linears) != 2 or shapes[0] != (shapes[1][1], shapes[1][0], shapes[1][2]):
        raise ValueError(
            "moefy: mlp must hold two nn.Linear, (H, I) and (I, H), both with a bias or both without, "
            f"got (in, out, bias) {shapes}"
        )
    if len(rest) > 1 or any(True for module in rest for _ in module.parameters()):
        raise ValueError(
            "moefy: mlp must hold nothing but linear layers, dropout and one activation, "
            f"got {', '.join(type(module).__name__ for module in rest)}"
        )
    if activation is None:
        read = [_NAMES[kind](module) for module in rest for kind in _NAMES if type(module) is kind]
        if not read:
            raise ValueError(
                f"moefy: activation must be one of {', '.join(ACTIVATIONS)} where mlp holds no nn.ReLU, nn.GELU or "
                "nn.SiLU, got None"
            )
        activation = read[0]
    return linears[0], linears[1], activation


_NAMES: dict[type[nn.Module], Any] = {
    nn.ReLU: lambda module: "relu",
    nn.GELU: lambda module: "gelu" if module.approximate == "none" else "gelu_tanh",
    nn.SiLU: lambda module: "silu",
}


def _clusters(rows: Tensor, clusters: int, seed: int, rounds: int = 30) -> Tensor:
    """The order of the rows (n, H) in which each n / clusters of them lie close together."""
    generator = torch.Generator().manual_seed(seed)
    centres = rows[torch.randperm(rows.shape[0], generator=generator)[:clusters].to(rows.device)]
    owner = rows.new_full((rows.shape[0],), -1, dtype=torch.int64)
    for _ in range(rounds):
        before, owner = owner, _balanced(torch.cdist(rows, centres))
        if torch.equal(owner, before):
            break
        centres = torch.stack([rows[owner == cluster].mean(0) for cluster in range(clusters)])
    return owner.argsort(stable=True)


def _balanced(distance: Tensor) -> Tensor:
    """The cluster of each row, of distances (n, clusters): each takes n / clusters, the nearest pairs first."""
    rows, clusters = distance.shape
    owner = distance.new_full((rows,), -1, dtype=torch.int64)
    room = [rows // clusters] * clusters
    while (owner < 0).any():
        # every row without a cluster asks the nearest one with room, which takes the nearest of those
        full = torch.tensor([not size for size in room], device=distance.device)
        nearest, wish = distance.masked_fill(full, torch.inf).min(dim=1)
        for cluster in range(clusters):
            asking = ((owner < 0) & (wish == cluster)).nonzero().flatten()
            taken = asking[nearest[asking].argsort(stable=True)[: room[cluster]]]
            owner[taken] = cluster
            room[cluster] -= len(taken)
    return owner
