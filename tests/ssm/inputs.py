"""Random arguments for the state-space ops, in every memory layout."""

import math
from typing import Any

import torch
from torch import Tensor

from .oracle import array

LAYOUTS = ("time-last", "channel-last", "chunk", "rows", "gaps")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values, laid out so; memory between them holds NaN (or 2^31 - 1).

    chunk: half of the channels of a wider channel-last tensor, as z is in Mamba. rows: a window of longer rows.
    gaps: every second element along every dimension.
    """
    if layout == "time-last" or (x.dim() == 1 and layout in ("channel-last", "chunk")):
        return x.contiguous()
    filler = torch.nan if x.is_floating_point() or x.is_complex() else 2**31 - 1

    def room(*shape: int) -> Tensor:
        return torch.full(shape, filler, dtype=x.dtype)

    *front, last = x.shape
    if layout == "channel-last":
        view = room(*x.mT.shape).mT
    elif layout == "chunk":
        view = room(*front[:-1], last, 2 * front[-1])[..., front[-1] :].mT
    elif layout == "rows":
        view = room(*front, last + 3)[..., 2 : last + 2]
    else:
        view = room(*(2 * size for size in x.shape))[(slice(1, None, 2),) * x.dim()]
    return view.copy_(x)


def sequence_marks(batch: int, length: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """(batch, length) ids that do not decrease, with padding (-1) at the start, in the middle and at the end."""
    ids = (torch.rand(batch, length) < 0.15).long().mul(torch.randint(1, 3, (batch, length))).cumsum(1)
    ids[torch.rand(batch, length) < 0.15] = -1
    for row in ids:
        begin, end = (int(torch.randint(0, 4, ()) * torch.rand(())) for _ in range(2))
        row[:begin] = row[length - end :] = -1
    return ids.to(dtype)


def scan_arguments(
    batch: int,
    channels: int,
    length: int,
    state: int,
    *,
    B: str = "varying",
    C: str = "varying",
    groups: int = 1,
    leave_out: tuple[str, ...] = (),
    softplus: bool = True,
    reverse: bool = False,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    layouts: tuple[str, ...] = ("time-last",),
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of selective_scan. `B` and `C`: "constant", "varying" (3-d) or "grouped"; `layouts` are taken in turn;
    `parameters` is the type of A, D, delta_bias and initial_state, else float32 or wider."""
    torch.manual_seed(seed)
    kind = parameters or torch.promote_types(dtype, torch.float32)
    shapes = {
        "constant": (channels, state),
        "varying": (batch, state, length),
        "grouped": (batch, groups, state, length),
    }
    sequence = (batch, channels, length)
    tensors = {
        "u": torch.randn(sequence).to(dtype),
        "delta": (torch.randn(sequence) * 0.5 if softplus else torch.rand(sequence) * 0.5).to(dtype),
        "A": (-0.05 - 2 * torch.rand(channels, state)).to(kind),
        "B": torch.randn(shapes[B]).to(dtype if B != "constant" else kind),
        "C": torch.randn(shapes[C]).to(dtype if C != "constant" else kind),
        "D": torch.randn(channels).to(kind),
        "z": torch.randn(sequence).to(dtype),
        "delta_bias": (torch.rand(channels) * 0.2).to(kind),
        "initial_state": torch.randn(batch, channels, state).to(kind),
        "seq_idx": sequence_marks(batch, length),
    }
    laid = {name: lay_out(x, layouts[i % len(layouts)]) for i, (name, x) in enumerate(tensors.items())}
    return {name: x for name, x in laid.items() if name not in leave_out} | {
        "delta_softplus": softplus,
        "reverse": reverse,
    }


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Makes every floating-point tensor of `arguments` require a gradient, and returns those."""
    found = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    for x in found.values():
        x.requires_grad_()
    return found


def conv_arguments(
    batch: int,
    channels: int,
    length: int,
    width: int,
    *,
    leave_out: tuple[str, ...] = (),
    activation: str | None = "silu",
    reverse: bool | None = None,
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    layouts: tuple[str, ...] = ("time-last",),
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of causal_conv1d; `parameters` is the type of all but x, else x's or at least float32; without
    `reverse` (None) they are those of the one-step op too."""
    torch.manual_seed(seed)
    kind = parameters or torch.promote_types(dtype, torch.float32)
    tensors = {
        "x": torch.randn(batch, channels, length).to(dtype),
        "weight": torch.randn(channels, width).to(kind),
        "bias": torch.randn(channels).to(kind),
        "seq_idx": sequence_marks(batch, length),
        "initial_states": torch.randn(batch, channels, width - 1).to(kind),
    }
    laid = {name: lay_out(x, layouts[i % len(layouts)]) for i, (name, x) in enumerate(tensors.items())}
    chosen = {"activation": activation} | ({} if reverse is None else {"reverse": reverse})
    return {name: x for name, x in laid.items() if name not in leave_out} | chosen


def ssd_arguments(
    batch: int,
    length: int,
    heads: int,
    width: int,
    state: int,
    *,
    groups: int = 1,
    wide_D: bool = False,
    leave_out: tuple[str, ...] = (),
    softplus: bool = True,
    limit: tuple[float, float] = (0.0, math.inf),
    dtype: torch.dtype = torch.float32,
    parameters: torch.dtype | None = None,
    layouts: tuple[str, ...] = ("time-last",),
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of ssd_chunk_scan; `layouts` are of the last two dimensions, taken in turn; `parameters` is the type of
    A, D, dt_bias and initial_states, else float32 or wider."""
    torch.manual_seed(seed)
    kind = parameters or torch.promote_types(dtype, torch.float32)
    sequence = (batch, length, heads)
    tensors = {
        "x": torch.randn(*sequence, width).to(dtype),
        "dt": (torch.randn(sequence) * 0.5 if softplus else torch.rand(sequence) * 0.5).to(dtype),
        "A": (-0.05 - 2 * torch.rand(heads)).to(kind),
        "B": torch.randn(batch, length, groups, state).to(dtype),
        "C": torch.randn(batch, length, groups, state).to(dtype),
        "D": torch.randn((heads, width) if wide_D else (heads,)).to(kind),
        "z": torch.randn(*sequence, width).to(dtype),
        "dt_bias": (torch.rand(heads) * 0.2).to(kind),
        "initial_states": torch.randn(batch, heads, width, state).to(kind),
        "seq_idx": sequence_marks(batch, length),
    }
    laid = {name: lay_out(x, layouts[i % len(layouts)]) for i, (name, x) in enumerate(tensors.items())}
    return {name: x for name, x in laid.items() if name not in leave_out} | {
        "dt_softplus": softplus,
        "dt_limit": limit,
    }


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for the oracle."""
    return {
        name: x if not isinstance(x, Tensor) else array(x) if x.is_floating_point() else x.numpy()
        for name, x in arguments.items()
    }


def recurrence_arguments(
    batch: int,
    length: int,
    channels: int,
    *,
    initial: bool = True,
    reverse: bool = False,
    dtype: torch.dtype = torch.float32,
    others: torch.dtype | None = None,
    layouts: tuple[str, ...] = ("time-last",),
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of linear_scan; `others` is the type of a and initial_state. What LAYOUTS call time is the last
    dimension, here that of channels."""
    torch.manual_seed(seed)
    kind = others or dtype
    phase = torch.exp(2j * torch.pi * torch.rand(batch, length, channels)) if kind.is_complex else 1
    tensors = {
        "a": ((0.3 + 0.7 * torch.rand(batch, length, channels)) * phase).to(kind),
        "x": torch.randn(batch, length, channels, dtype=torch.cfloat if dtype.is_complex else None).to(dtype),
        "initial_state": torch.randn(batch, channels, dtype=torch.cfloat if kind.is_complex else None).to(kind),
    }
    laid = {name: lay_out(x, layouts[i % len(layouts)]) for i, (name, x) in enumerate(tensors.items())}
    return {name: x for name, x in laid.items() if initial or name != "initial_state"} | {"reverse": reverse}
