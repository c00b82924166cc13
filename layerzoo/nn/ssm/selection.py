"""What Mamba and its kin share: step sizes, B and C that depend on the input, the scan with them, how they begin."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerzoo.ops import selective_scan
from layerzoo.ops.linear import linear


@dataclass(frozen=True)
class StepInit:
    """How step sizes begin: log-uniform in [low, high], at least `floor`; their projection "random" or "constant"."""

    kind: str
    scale: float
    low: float
    high: float
    floor: float

    def check(self, layer: str) -> None:
        """Raises ValueError for an unknown kind, or bounds that are not in order."""
        if self.kind not in ("random", "constant"):
            raise ValueError(f"{layer}: dt_init must be 'random' or 'constant', got {self.kind!r}")
        if not 0 < self.low <= self.high:
            raise ValueError(
                f"{layer}: dt_min and dt_max must satisfy 0 < dt_min <= dt_max, got {self.low} and {self.high}"
            )


def check_sizes(layer: str, **sizes: int) -> None:
    """Raises ValueError for a size that is not positive."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{layer}: {name} must be at least 1, got {size}")


def rank_of(dt_rank: int | str, d_model: int) -> int:
    """The rank of the step sizes; "auto" is d_model / 16, rounded up."""
    return math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank


@torch.no_grad()
def reset_scan(init: StepInit, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> None:
    """Sets the parameters of a scan to their start: dt_weight (..., d, R), dt_bias (..., d), A_log (d, n), D (d,)."""
    bound = dt_weight.shape[-1] ** -0.5 * init.scale
    if init.kind == "constant":
        dt_weight.fill_(bound)
    else:
        dt_weight.uniform_(-bound, bound)
    dt = torch.empty(dt_bias.shape, dtype=D.dtype, device=D.device)
    dt = dt.uniform_(math.log(init.low), math.log(init.high)).exp().clamp(min=init.floor)
    dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
    A_log.copy_(torch.arange(1, A_log.shape[1] + 1, device=A_log.device).log().expand_as(A_log))
    D.fill_(1.0)


def decay(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 or wider."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def select(projected: Tensor, dt_proj: Tensor, state: int) -> tuple[Tensor, Tensor, Tensor]:
    """projected (..., R + 2 n), dt_proj (d, R) -> step sizes before their bias (..., d), B and C (..., n)."""
    low, B, C = projected.split([dt_proj.shape[1], state, state], dim=-1)
    return linear(low, dt_proj), B, C


def scan_arguments(
    u: Tensor, projected: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, z: Tensor | None
) -> dict[str, Any]:
    """Of selective_scan: u and its gate z (b, d, l), projected (b, l, R + 2 n), dt_proj (d, R), A_log (d, n)."""
    delta, B, C = select(projected, dt_proj, A_log.shape[1])
    scan = {"u": u, "delta": delta.mT, "A": decay(A_log), "B": B.mT, "C": C.mT, "D": D, "z": z}
    return scan | {"delta_bias": dt_bias, "delta_softplus": True}


def scan_selected(
    u: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    z: Tensor | None = None,
    *,
    reverse: bool = False,
) -> Tensor:
    """The selective scan of u (b, d, l), gated by z, with step sizes, B and C projected from u itself.

    x_proj (R + 2 n, d): rows of the step size, B, C. dt_proj (d, R), dt_bias (d,), A_log (d, n), D (d,).
    """
    scan = scan_arguments(u, linear(u.mT, x_proj), dt_proj, dt_bias, A_log, D, z)
    y: Tensor = selective_scan(**scan, reverse=reverse)
    return y
