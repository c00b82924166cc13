"""Layers of the mixture-of-experts family, and what trains and watches their routers."""

from layerzoo.nn.moe.losses import (
    balance_loss,
    cv_squared,
    mutual_information_loss,
    sequence_balance_loss,
    z_loss,
)
from layerzoo.nn.moe.router import Router, Routing
from layerzoo.nn.moe.router_stats import RouterStats

__all__ = [
    "Router",
    "RouterStats",
    "Routing",
    "balance_loss",
    "cv_squared",
    "mutual_information_loss",
    "sequence_balance_loss",
    "z_loss",
]
