"""Ops of the mixture-of-experts family."""

from layerzoo.ops.moe.experts import moe_experts, moe_experts_ragged

__all__ = ["moe_experts", "moe_experts_ragged"]
