"""The convolution kernel of S4D."""

import torch
from torch import Tensor

from layerzoo.ops._checks import COMPLEX, check_rank, check_tensor

_BLOCK = 64  # steps of the second factor of a Vandermonde matrix: as many as the first has at length 4096


def s4d_kernel(dt: Tensor, A: Tensor, C: Tensor, length: int) -> Tensor:
    """Convolution kernel of diagonal state spaces under zero-order hold, S4D (Gu et al., 2022, arXiv 2206.11893).

    `K_t = 2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(t dt A_n)`, for t from 0: what `h_t = exp(dt A) h_{t-1} +
    (exp(dt A) - 1) / A u_t`, `y_t = 2 Re sum_n C_n h_tn` make of a unit impulse.

    The Vandermonde matrix exp(t dt A_n) is never made: with t = 64 i + j it is a product of two small ones.

    Args:
        dt: (channels,), step sizes; float32 or float64. A, C: (channels, state), complex of the same precision; of each
            conjugate pair one. A must not be 0.
        length: number of steps.

    Returns:
        (channels, length) in dt's dtype, differentiable as often as wanted: it is made of torch's own operators.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; a negative length.
    """
    op = "s4d_kernel"
    check_rank(op, "dt", dt, ("(channels)",), (torch.float32, torch.float64))
    check_rank(op, "A", A, ("(channels, state)",), COMPLEX)
    shape = (dt.shape[0], A.shape[1])
    for name, value in (("A", A), ("C", C)):
        check_tensor(
            op, name, value, "(channels, state)", shape, dt.device, (torch.promote_types(dt.dtype, torch.cfloat),)
        )
    if length < 0:
        raise ValueError(f"{op}: length must be at least 0, got {length}")
    step = dt.unsqueeze(1) * A  # d n
    weight = 2 * C * torch.expm1(step) / A
    blocks = torch.arange((length + _BLOCK - 1) // _BLOCK, device=dt.device, dtype=dt.dtype) * _BLOCK
    within = torch.arange(_BLOCK, device=dt.device, dtype=dt.dtype)
    first = weight.unsqueeze(1) * torch.exp(step.unsqueeze(1) * blocks[:, None])  # d i n
    second = torch.exp(step.unsqueeze(2) * within)  # d n j
    real = torch.cat([first.real, -first.imag], 2) @ torch.cat([second.real, second.imag], 1)
    return real.flatten(1)[:, :length]
