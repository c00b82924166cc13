"""Which experts a token goes to, and how much each of them counts."""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerzoo.nn.moe.losses import balance_loss, cv_squared, z_loss
from layerzoo.ops import balanced_assignment, expert_choice, moe_route, sinkhorn
from layerzoo.reference import accumulate_dtype
from layerzoo.reference.moe import TINY

Kind = Literal["softmax", "sigmoid", "topk_softmax", "noisy", "sinkhorn", "base", "expert_choice"]
KINDS = ("softmax", "sigmoid", "topk_softmax", "noisy", "sinkhorn", "base", "expert_choice")


class Routing(NamedTuple):
    """What a router says of T tokens and E experts.

    `ids`, `weights`: (T, k), where an id of E is dropped; or, where experts choose, the chosen tokens and their weights
    (pairs,), those of expert e at `offsets`[e] … [e + 1]. `counts` (E,): pairs of each expert, before any drop.
    `importance` (E,): sums over tokens of the probabilities; of the weights where these are a softmax over the chosen
    ones, and the balance loss then is of those. `dropped`: pairs without their expert. `losses`: scalars
    with gradients, by name: "balance" and "z" always, "importance" and "load" of noisy top-k.
    """

    weights: Tensor
    ids: Tensor
    offsets: Tensor | None
    counts: Tensor
    importance: Tensor
    dropped: Tensor
    losses: dict[str, Tensor]

    def dense(self) -> Tensor:
        """The weights of all experts, (T, E), zero for those that were not chosen; of (T, k) routings."""
        shape = (self.weights.shape[0], self.counts.shape[0] + 1)
        return self.weights.new_zeros(shape).scatter_add(1, self.ids, self.weights)[:, :-1]


class Router(nn.Module):
    """Maps tokens (T, hidden_size) to a `Routing`; all of it in float32 (float64 for float64).

    Args:
        hidden_size: width of a token. num_experts: E. top_k: experts for each token.
        kind: "softmax": the top_k largest probabilities (Fedus et al., 2021). "sigmoid": of the logits, each for
            itself; a bias that only the choice sees keeps the load even, see `update_bias` (DeepSeek-V3, 2024).
            "topk_softmax": softmax over the chosen logits only (Mixtral). "noisy": the same of logits with learned
            noise while training (Shazeer et al., 2017). "sinkhorn": while training the choice is that of a balanced
            transport plan, the weights are sigmoid (top_k 1) or softmax of the logits (Clark et al., 2022). "base":
            while training every expert gets the same number of tokens, by linear assignment; top_k must be 1 and the
            weight is the sigmoid of the score (Lewis et al., 2021). "expert_choice": each expert takes its
            T top_k / E most probable tokens; not causal (Zhou et al., 2022).
        normalize: the weights of a token sum to 1. scale: factor of all weights.
        groups: (number of groups, groups to choose from, "top2" or "max"): see `moe_route`.
        capacity_factor: an expert takes at most ceil(capacity_factor T top_k / E) tokens; None: any number. For
            "softmax", "sigmoid", "topk_softmax" and "noisy". eval_capacity_factor: the same in eval mode; None: any.
        drop: whom an expert over its capacity drops: the last ones ("position") or those of least weight ("weight").
        jitter: while training the router sees x times uniform numbers in [1 - jitter, 1 + jitter].
        num_gates: as many routers over the same experts, of which each token names its own: one for each task.

    Raises:
        ValueError: a size, kind or combination that is not said above; an input whose width is not hidden_size.
    """

    correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        kind: Kind = "softmax",
        *,
        normalize: bool = False,
        scale: float = 1.0,
        groups: tuple[int, int, Literal["top2", "max"]] | None = None,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        drop: Literal["position", "weight"] = "position",
        jitter: float = 0.0,
        num_gates: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(hidden_size, num_experts, top_k, num_gates) < 1 or top_k > num_experts:
            raise ValueError(
                f"Router: hidden_size, num_experts, top_k and num_gates must be positive and top_k at most "
                f"num_experts, got {hidden_size}, {num_experts}, {top_k} and {num_gates}"
            )
        if kind not in KINDS:
            raise ValueError(f"Router: router must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "base" and top_k != 1:
            raise ValueError(f"Router: top_k must be 1 with 'base', got {top_k}")
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None and (factor <= 0 or kind in ("sinkhorn", "base", "expert_choice")):
                raise ValueError(f"Router: {name} must be positive, and None with {kind!r}, got {factor}")
        if not 0 <= jitter < 1:
            raise ValueError(f"Router: jitter must be in [0, 1), got {jitter}")
        if groups is not None and kind not in ("softmax", "sigmoid", "topk_softmax"):
            raise ValueError(f"Router: groups must be None with {kind!r}, got {groups}")
        self.hidden_size, self.num_experts, self.top_k, self.kind = hidden_size, num_experts, top_k, kind
        self.normalize, self.scale, self.groups, self.drop, self.jitter = normalize, scale, groups, drop, jitter
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.num_gates = num_gates
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (num_gates * num_experts, hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, **like))
        self.noise_weight = nn.Parameter(torch.empty(shape, **like)) if kind == "noisy" else None
        # in bfloat16 it could not move by thousandths
        bias = torch.zeros(num_experts, device=device, dtype=torch.float32) if kind == "sigmoid" else None
        self.register_buffer("correction_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew: equal load at first for "noisy", orthogonal rows for "base", small otherwise."""
        if self.noise_weight is not None:
            nn.init.zeros_(self.noise_weight)
            nn.init.normal_(self.weight, std=0.01 / math.sqrt(self.hidden_size))
        elif self.kind == "base":
            start = torch.empty_like(self.weight, dtype=torch.float32)  # no orthogonal start in half precision
            with torch.no_grad():
                self.weight.copy_(nn.init.orthogonal_(start, gain=0.1))
        else:
            nn.init.normal_(self.weight, std=1 / math.sqrt(self.hidden_size))
        if self.kind == "sigmoid":
            self.correction_bias.zero_()

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.num_experts}, top_k={self.top_k}, {self.kind}"

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Routing:
        """x (T, hidden_size) -> `Routing`; `gate` (T,), int64: which of the `num_gates`, the first if None."""
        if x.dim() != 2 or x.shape[1] != self.hidden_size:
            raise ValueError(f"Router: x must have shape (T, hidden_size = {self.hidden_size}), got {tuple(x.shape)}")
        x = x.to(accumulate_dtype(x))
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = self._linear(x, self.weight, gate)
        if self.kind == "expert_choice":
            return self._chosen_by_experts(logits)
        if self.kind in ("sinkhorn", "base"):
            return self._balanced(logits)
        losses: dict[str, Tensor] = {}
        scores = logits
        if self.noise_weight is not None:
            scores, losses["load"] = self._noisy(x, logits, gate)
        weights, ids, stats = moe_route(
            scores,
            self.top_k,
            score="topk_softmax" if self.kind == "noisy" else self.kind,  # type: ignore[arg-type]
            bias=self.correction_bias.to(x.dtype) if self.kind == "sigmoid" else None,
            groups=self.groups,
            normalize=self.normalize,
            scale=self.scale,
            capacity=self._capacity(x.shape[0]),
            drop=self.drop,
        )
        losses["balance"] = balance_loss(stats.counts, stats.importance, self.top_k)
        losses["z"] = stats.z_loss
        routing = Routing(weights, ids, None, stats.counts, stats.importance, stats.dropped, losses)
        if self.noise_weight is not None:
            losses["importance"] = cv_squared(routing.dense().sum(0))
        return routing

    @torch.no_grad()
    def update_bias(self, counts: Tensor, rate: float = 1e-3) -> None:
        """Moves the bias of "sigmoid" towards even load: up for experts with fewer tokens than the mean, down for more.

        Call it once after each optimizer step, with the counts (E,) of the whole batch: summed over micro-batches and
        machines (`RouterStats` has them). Not part of forward, which gradient checkpointing runs twice.
        """
        if self.kind != "sigmoid":
            raise ValueError(f"Router: update_bias is for 'sigmoid', this router is {self.kind!r}")
        counts = counts.to(self.correction_bias)
        self.correction_bias += rate * torch.sign(counts.mean() - counts)

    def _linear(self, x: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
        every = F.linear(x, weight.to(x.dtype))
        if self.num_gates == 1:
            return every
        every = every.view(-1, self.num_gates, self.num_experts)
        if gate is None:
            return every[:, 0]
        return every.gather(1, gate.view(-1, 1, 1).expand(-1, 1, self.num_experts)).squeeze(1)

    def _capacity(self, tokens: int) -> int | None:
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return None if factor is None else max(1, math.ceil(factor * tokens * self.top_k / self.num_experts))

    def _noisy(self, x: Tensor, clean: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits with noise, and the loss of the smooth load: each expert's chance if its noise were drawn again."""
        assert self.noise_weight is not None
        if not self.training:
            return clean, clean.new_zeros(())
        spread = F.softplus(self._linear(x, self.noise_weight, gate)) + 1e-2
        noisy = clean + torch.randn_like(clean) * spread
        if self.top_k == self.num_experts or not x.shape[0]:
            return noisy, clean.new_zeros(())  # every expert is always chosen
        best = noisy.topk(self.top_k + 1, dim=1).values
        inside = noisy >= best[:, -2:-1]
        # what it has to beat: the k-th of the others
        rival = torch.where(inside, best[:, -1:], best[:, -2:-1])
        load = torch.special.ndtr((clean - rival) / spread).sum(0)
        return noisy, cv_squared(load)

    def _balanced(self, logits: Tensor) -> Routing:
        if not self.training:
            ids = moe_route(logits, self.top_k)[1]
        elif self.kind == "base":
            ids = balanced_assignment(logits.detach())
        else:
            ids = sinkhorn(logits.detach(), n_iterations=20).topk(self.top_k, dim=1).indices
        probabilities = logits.softmax(dim=1)
        weights = (torch.sigmoid(logits) if self.top_k == 1 else probabilities).gather(1, ids)
        if self.normalize:
            weights = weights / (weights.sum(dim=1, keepdim=True) + TINY)
        counts = torch.zeros(self.num_experts, dtype=torch.int64, device=ids.device)
        counts = counts.scatter_add(0, ids.flatten(), torch.ones_like(ids).flatten())
        return self._routing(weights * self.scale, ids, None, counts, logits, probabilities)

    def _chosen_by_experts(self, logits: Tensor) -> Routing:
        tokens, experts = logits.shape
        capacity = min(tokens, math.ceil(tokens * self.top_k / experts))
        chosen, weights, offsets = expert_choice(logits, max(capacity, 1))
        if self.normalize:
            total = weights.new_zeros(tokens).index_add(0, chosen, weights)
            weights = weights / (total[chosen] + TINY)
        counts = torch.full((experts,), capacity, dtype=torch.int64, device=logits.device)
        return self._routing(weights * self.scale, chosen, offsets, counts, logits, logits.softmax(dim=1))

    def _routing(
        self, weights: Tensor, ids: Tensor, offsets: Tensor | None, counts: Tensor, logits: Tensor, probability: Tensor
    ) -> Routing:
        importance = probability.sum(0)
        losses = {"balance": balance_loss(counts, importance, self.top_k), "z": z_loss(logits)}
        return Routing(weights, ids, offsets, counts, importance, counts.new_zeros(()), losses)
