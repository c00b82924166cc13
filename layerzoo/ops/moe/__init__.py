"""Ops of the mixture-of-experts family."""

from layerzoo.ops.moe.experts import moe_experts, moe_experts_ragged
from layerzoo.ops.moe.routing import RouteStats, balanced_assignment, expert_choice, moe_route, sinkhorn

__all__ = [
    "RouteStats",
    "balanced_assignment",
    "expert_choice",
    "moe_experts",
    "moe_experts_ragged",
    "moe_route",
    "sinkhorn",
]
