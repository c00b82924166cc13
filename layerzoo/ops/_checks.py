"""Checks of arguments before any kernel runs. A message says the op, the argument, what is allowed and what it got."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
INTEGER = (torch.int32, torch.int64)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    op: str,
    name: str,
    value: Tensor,
    dims: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = FLOATING,
) -> None:
    """Raises TypeError for what is no tensor of `dtypes`, ValueError for another shape or device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {dims} = {tuple(shape)}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must have dtype {_names(dtypes)}, got {_names((value.dtype,))}")
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the first argument, got {value.device}")


def check_rank(
    op: str, name: str, value: Tensor, dims: tuple[str, ...], dtypes: tuple[torch.dtype, ...] = FLOATING
) -> None:
    """Raises TypeError for what is no tensor of `dtypes`, ValueError for a rank that is none of `dims`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dim() not in [text.replace(",)", ")").count(",") + 1 for text in dims]:
        raise ValueError(f"{op}: {name} must have shape {' or '.join(dims)}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must have dtype {_names(dtypes)}, got {_names((value.dtype,))}")


def check_positive(op: str, name: str, what: str, size: int) -> None:
    """Raises ValueError unless `size`, called `what` in the message, is at least 1."""
    if size < 1:
        raise ValueError(f"{op}: {name} must have at least one {what}, got {size}")


def check_no_gradient(op: str, *tensors: Tensor | None) -> None:
    """Raises ValueError where a tensor of an op that works in place would need a gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f"{op}: works in place and has no gradient; call it under torch.no_grad()")


def check_writable(op: str, name: str, value: Tensor) -> None:
    """Raises ValueError where several elements of a tensor that is changed in place share memory."""
    if any(stride == 0 and size > 1 for size, stride in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(f"{op}: {name} is changed in place and must not be expanded, got strides {value.stride()}")
