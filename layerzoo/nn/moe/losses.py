"""Losses that keep a router from sending everything to a few experts.

All are float32 (float64 for float64) scalars that are differentiable by what the router computed; each is averaged over
tokens, so that a coefficient does not depend on their number. Leave padding out of the rows before calling.
"""

import torch
from torch import Tensor


def balance_loss(counts: Tensor, importance: Tensor, top_k: int) -> Tensor:
    """E sum over experts of f_e P_e: 1 where the choices or the probabilities are uniform, E where one expert has all.

    Fedus et al., "Switch Transformers" (2021), equation 4, over top_k: transformers' `load_balancing_loss_func` is
    top_k times as large. Not bounded below by 1.

    Args:
        counts: (E,), how many tokens chose each expert; no gradient. importance: (E,), sums over all tokens of the
            probability of each expert, before anything was chosen. top_k: experts for each token.
    """
    experts, tokens = counts.numel(), counts.sum() / top_k
    share = counts.to(importance.dtype) / (tokens * top_k).clamp(min=1)
    return experts * (share * importance).sum() / tokens.clamp(min=1)


def z_loss(logits: Tensor) -> Tensor:
    """The mean squared logarithm of the softmax's denominator: keeps logits (T, E) small (Zoph et al., 2022)."""
    return logits.logsumexp(dim=-1).square().sum() / max(logits.shape[0], 1)


def cv_squared(x: Tensor) -> Tensor:
    """The squared coefficient of variation of x (E,), by the population variance; 0 where all are equal or zero.

    The balance loss of Shazeer et al. (2017), of importance and of load. Its gradient is finite at perfect balance.
    """
    mean = x.mean()
    return (x - mean).square().mean() / mean.square().clamp(min=torch.finfo(x.dtype).tiny)


def sequence_balance_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """`balance_loss` within each sequence, then their mean (DeepSeek-AI, "DeepSeek-V3", 2024, equation 17).

    Args:
        probabilities: (sequences, length, E), summing to 1 over E. chosen: (sequences, length, k), ids in [0, E);
            E is passed over.
    """
    _, length, experts = probabilities.shape
    hits = torch.nn.functional.one_hot(chosen, experts + 1)[..., :experts].sum(dim=(1, 2)).to(probabilities.dtype)
    share = hits * experts / (max(chosen.shape[2], 1) * max(length, 1))
    return (share * probabilities.mean(dim=1)).sum(dim=1).mean()


def mutual_information_loss(probabilities: Tensor) -> Tensor:
    """Minus the mutual information of token and expert: sure about each token, even over all (Chen et al., 2023).

    Args:
        probabilities: (T, E), summing to 1 over E. The result is in [-log E, 0].
    """

    def entropy(p: Tensor) -> Tensor:
        negative: Tensor = torch.special.xlogy(p, p).sum(dim=-1)
        return -negative

    return entropy(probabilities).mean() - entropy(probabilities.mean(dim=0))
