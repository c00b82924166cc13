"""Linear layers of shapes that a general matrix product is slow at."""

import torch
import torch.nn.functional as F
from torch import Tensor

from layerzoo.ops._checks import check_rank, check_tensor
from layerzoo.ops._define import define

_skinny_linear = define(
    "skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=F.linear,
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    autocast=(0, 1, 2),
    inference=True,
)


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for few rows, as in decoding: as fast as the weight can be read from memory.

    Right for any number of rows; faster than torch on a CPU up to about 8, where torch uses one thread for one row.
    Where a gradient is needed it is torch's function.

    Args:
        x: (..., in). weight: (out, in); rows that are not contiguous cost a copy. bias: (out,). All of one dtype.

    Returns:
        (..., out) in that dtype; sums are in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
    """
    op = "skinny_linear"
    check_rank(op, "weight", weight, ("(out, in)",))
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape (..., in = {weight.shape[1]}), got ()")
    same = (weight.dtype,)
    check_tensor(op, "x", x, "(..., in)", (*x.shape[:-1], weight.shape[1]), weight.device, same)
    if bias is not None:
        check_tensor(op, "bias", bias, "(out,)", (weight.shape[0],), weight.device, same)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return F.linear(x, weight, bias)
    y: Tensor = _skinny_linear(x, weight, bias)
    return y
