"""One expert for each domain, chosen by the domain's number, and the posterior over domains of a text without one.

Gururangan et al., "DEMix Layers: Disentangling Domains for Modular Language Modeling" (2021), arXiv 2108.05036.
"""

from typing import Any

import torch
from torch import Tensor, nn

from layerzoo.nn.moe.experts import Experts
from layerzoo.ops.moe.experts import Activation


class DEMix(nn.Module):
    """Maps (batch, length, hidden_size) to the same shape: each sequence through the expert of its domain.

    Experts can be added and removed, which gives `experts` new parameters: make the optimizer anew.

    Args:
        hidden_size: width of input and output. num_domains: experts.
        intermediate_size: inner width of an expert; None: 4 hidden_size.
        activation: between its matrices. bias: whether they have biases.

    Raises:
        ValueError: a size that is not positive, an input or domains of another shape, a number that is no domain.
        RuntimeError: a number in a tensor that is no domain, on a CPU.
    """

    def __init__(
        self,
        hidden_size: int,
        num_domains: int,
        intermediate_size: int | None = None,
        activation: Activation = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        inner = 4 * hidden_size if intermediate_size is None else intermediate_size
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.experts = Experts(hidden_size, inner, num_domains, gated=False, activation=activation, bias=bias, **like)

    @property
    def num_domains(self) -> int:
        """Experts that there are now."""
        return self.experts.num_experts

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        self.experts.reset_parameters()

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_domains={self.num_domains}"

    def forward(self, hidden_states: Tensor, domain: Tensor | int) -> Tensor:
        """hidden_states (batch, length, hidden_size), domain (batch,), integer, or one for all -> the same shape."""
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(
                f"DEMix: hidden_states must have shape (batch, length, hidden_size = {self.hidden_size}), "
                f"got {tuple(hidden_states.shape)}"
            )
        batch, length, _ = hidden_states.shape
        if isinstance(domain, int):
            domain = torch.full((batch,), self._known(domain), device=hidden_states.device)
        if domain.shape != (batch,):
            raise ValueError(f"DEMix: domain must have shape (batch,) = ({batch},), got {tuple(domain.shape)}")
        # the op would drop what is sent to expert num_domains, and refuses what is below 0
        ids = domain.masked_fill(domain >= self.num_domains, -1).unsqueeze(1).expand(batch, length).reshape(-1, 1)
        rows = hidden_states.reshape(-1, self.hidden_size)
        return self.experts(rows, ids, torch.ones_like(ids, dtype=rows.dtype)).view(hidden_states.shape)  # type: ignore[no-any-return]

    @torch.no_grad()
    def add_expert(self, copy_from: int | None = None) -> int:
        """One more domain, and its number: the last. It begins as that of `copy_from`; None: drawn anew."""
        source = None if copy_from is None else self._known(copy_from)
        like: dict[str, Any] = {"device": self.experts.w13.device, "dtype": self.experts.w13.dtype}
        _, inner, hidden = self.experts.w13.shape
        fresh = Experts(hidden, inner, 1, gated=False, bias=self.experts.b13 is not None, **like)
        for name, old in list(self.experts.named_parameters()):
            new = getattr(fresh, name) if source is None else old[source : source + 1]
            setattr(self.experts, name, nn.Parameter(torch.cat([old, new]), old.requires_grad))
        return self.num_domains - 1

    @torch.no_grad()
    def remove_expert(self, domain: int) -> None:
        """One domain fewer: those behind it move up by one."""
        self._known(domain)
        if self.num_domains == 1:
            raise ValueError("DEMix: remove_expert needs two domains or more, got 1")
        for name, old in list(self.experts.named_parameters()):
            kept = torch.cat([old[:domain], old[domain + 1 :]])
            setattr(self.experts, name, nn.Parameter(kept, old.requires_grad))

    def _known(self, domain: int) -> int:
        if not 0 <= domain < self.num_domains:
            raise ValueError(f"DEMix: domain must be in [0, {self.num_domains}), got {domain}")
        return domain


class DomainPosterior:
    """How probable each domain is, after what was read of texts whose domain is unknown (Gururangan et al., section 5).

    A model with `DEMix` layers runs once for each domain. `update` takes how well each run predicted the next token,
    and `mix` weighs their predictions of the one after it, by Bayes' rule: p(d | x) is proportional to p(d) times the
    product of p(x_t | x_<t, d).

    Args:
        prior: (domains,), not negative, or the number of domains, all equally probable.

    Raises:
        ValueError: a prior of another shape, below zero or of nothing but zeros; another number of domains later.
    """

    def __init__(self, prior: Tensor | int) -> None:
        weights = torch.ones(prior) if isinstance(prior, int) else prior
        if weights.dim() != 1 or not len(weights) or not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError(f"DomainPosterior: prior must be (domains,), not negative and not all zero, got {prior}")
        self.log_posterior = (weights / weights.sum()).log().unsqueeze(0)
        """(batch, domains), or (1, domains) before the first update."""

    @property
    def probabilities(self) -> Tensor:
        """exp of `log_posterior`."""
        return self.log_posterior.exp()

    def update(self, log_likelihood: Tensor) -> Tensor:
        """log_likelihood (batch, domains): log p of what was read next, under each domain -> `probabilities`."""
        self._check("log_likelihood", log_likelihood, 2)
        self.log_posterior = (self.log_posterior.to(log_likelihood) + log_likelihood).log_softmax(dim=1)
        return self.probabilities

    def mix(self, log_probs: Tensor, top_k: int | None = None) -> Tensor:
        """log_probs (batch, domains, classes) of the next token under each domain -> its log p (batch, classes).

        `top_k`: only of the most probable domains.
        """
        self._check("log_probs", log_probs, 3)
        log_weights = self.log_posterior.to(log_probs)
        if top_k is not None:
            if not 1 <= top_k <= log_weights.shape[1]:
                raise ValueError(f"DomainPosterior: top_k must be in [1, {log_weights.shape[1]}], got {top_k}")
            left_out = log_weights.argsort(dim=1, descending=True, stable=True)[:, top_k:]
            log_weights = log_weights.scatter(1, left_out, -torch.inf).log_softmax(dim=1)
        return (log_weights.unsqueeze(2) + log_probs).logsumexp(dim=1)

    def _check(self, name: str, value: Tensor, rank: int) -> None:
        batch, domains = self.log_posterior.shape
        if value.dim() != rank or value.shape[1] != domains or batch not in (1, value.shape[0]):
            dims = "(batch, domains)" if rank == 2 else "(batch, domains, classes)"
            raise ValueError(
                f"DomainPosterior: {name} must have shape {dims} with {domains} domains and the same batch each time, "
                f"got {tuple(value.shape)}"
            )
