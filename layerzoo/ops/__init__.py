"""The functional API: checks of arguments, then one call into `torch.ops.layerzoo`."""

from layerzoo import _native
from layerzoo.ops.linear import skinny_linear
from layerzoo.ops.moe import (
    balanced_assignment,
    expert_choice,
    moe_experts,
    moe_experts_ragged,
    moe_route,
    sinkhorn,
)
from layerzoo.ops.ssm import (
    causal_conv1d,
    causal_conv1d_update,
    cross_merge,
    cross_scan,
    linear_scan,
    s4d_kernel,
    selective_scan,
    selective_state_update,
    seq_idx_from_cu_seqlens,
    ssd_chunk_scan,
)

_native.status()  # loads the kernels, or says under LAYERZOO_NATIVE=require why it cannot

__all__ = [
    "balanced_assignment",
    "causal_conv1d",
    "causal_conv1d_update",
    "cross_merge",
    "cross_scan",
    "expert_choice",
    "linear_scan",
    "moe_experts",
    "moe_experts_ragged",
    "moe_route",
    "s4d_kernel",
    "selective_scan",
    "selective_state_update",
    "seq_idx_from_cu_seqlens",
    "sinkhorn",
    "skinny_linear",
    "ssd_chunk_scan",
]
