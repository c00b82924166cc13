"""State-space ops: selective scan and causal convolution, whole sequences and step by step.

Letters: batch b, channels d, length l, state n, groups g (channels that share B and C), kernel width w. Floating-point
arguments may be float32, bfloat16, float16 or float64 and need not agree: everything is computed in float32, in float64
where the first argument is, and results have the type of the first argument (states: the type computed in). Any strides
are read as they are.
"""

from layerzoo.ops.ssm.causal_conv1d import causal_conv1d, causal_conv1d_update
from layerzoo.ops.ssm.cross_scan import cross_merge, cross_scan
from layerzoo.ops.ssm.linear_scan import linear_scan
from layerzoo.ops.ssm.s4d_kernel import s4d_kernel
from layerzoo.ops.ssm.selective_scan import selective_scan
from layerzoo.ops.ssm.selective_state_update import selective_state_update
from layerzoo.ops.ssm.seq_idx import seq_idx_from_cu_seqlens
from layerzoo.ops.ssm.ssd_chunk_scan import ssd_chunk_scan

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "cross_merge",
    "cross_scan",
    "linear_scan",
    "s4d_kernel",
    "selective_scan",
    "selective_state_update",
    "seq_idx_from_cu_seqlens",
    "ssd_chunk_scan",
]
