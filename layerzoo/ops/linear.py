"""Linear layers on a CPU: few rows by our own kernel, many through the faster of torch's two libraries."""

from typing import Any

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


# Rows up to which skinny_linear is faster than torch, which has instructions for bfloat16 on some processors.
MOST_ROWS = {torch.float64: 8, torch.float32: 8, torch.float16: 8, torch.bfloat16: 4}
LEAST_WEIGHTS = 2**19  # below, one row costs torch less than our checks
LEAST_PRODUCTS = 2**24  # likewise for many rows


# torch gives float32 products to MKL, which on AMD processors reaches half of what oneDNN does there (docs/linear.md).
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
# Without AVX-512 its lead is smaller than the copies that the gradient of a weight costs.
WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # its strides would be passed over without a word
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        # contiguous, since oneDNN has no fast code for a slice
        columns, rows = grad.reshape(-1, weight.shape[0]).contiguous().mT, x.reshape(-1, weight.shape[1]).contiguous()
        return (
            _product(grad, weight.mT) if of_x else None,
            (_product(columns, rows.mT) if WIDE else columns @ rows) if of_weight else None,
            columns.sum(1) if of_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` by the fastest way on a CPU that there is for the shape; elsewhere torch's own.

    Arguments, result and errors are torch's. Differentiable once where it is not torch's own.
    """
    tensors = [t for t in (x, weight, bias) if t is not None]
    if (
        x.dim() == 0
        or weight.dim() != 2
        or x.shape[-1] != weight.shape[1]
        or (bias is not None and bias.shape != weight.shape[:1])
        or any(not t.is_cpu or t.dtype != x.dtype for t in tensors)
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()  # inductor chooses itself, and takes that operator for constants only
    ):
        return F.linear(x, weight, bias)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if x.numel() <= MOST_ROWS.get(x.dtype, 0) * x.shape[-1]:
        few = weight.numel() >= LEAST_WEIGHTS and not needs_gradient
        return skinny_linear(x, weight, bias) if few else F.linear(x, weight, bias)
    if x.dtype != torch.float32 or x.numel() * weight.shape[0] < LEAST_PRODUCTS or not ONEDNN:
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias) if needs_gradient else _product(x, weight, bias)
