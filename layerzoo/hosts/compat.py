"""Stand-ins for mamba-ssm and causal-conv1d, for code that imports those packages itself.

Nothing happens before `compat` is called. The arguments are those of mamba-ssm 2.3.2 and causal-conv1d 1.6; one that we
do not have is a ValueError.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from layerzoo import ops
from layerzoo.nn import Mamba, Mamba2
from layerzoo.ops.linear import linear


def _none(function: str, why: str, **arguments: object) -> None:
    """Raises ValueError for an argument that is neither None nor False."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{function}: {name} must be None with layerzoo, got {got}: {why}")


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """`layerzoo.ops.selective_state_update`; as in mamba-ssm it has no gradient, whatever it is called under."""
    return ops.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layerzoo.ops.ssd_chunk_scan`. States are float32 (float64 for float64 x)."""
    name = "mamba_chunk_scan_combined"
    why = "packed sequences are told apart by seq_idx"
    _none(name, why, cu_seqlens=cu_seqlens, return_varlen_states=return_varlen_states)
    _none(name, "states are float32", state_dtype=None if state_dtype == torch.float32 else state_dtype)
    rest = (D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit, return_final_states)
    result: Any = ops.ssd_chunk_scan(x, dt, A, B, C, chunk_size, *rest)  # type: ignore[call-overload]
    return result  # type: ignore[no-any-return]


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """What a Mamba block does behind its first projection: xz (batch, 2 channels, length) -> (batch, length, width).

    B and C come from `x_proj_weight` where they are None, else they are constant, (channels, state). `checkpoint_lvl`
    changes nothing here. The norms of Falcon Mamba are refused.
    """
    why = "there are no norms inside"
    _none("mamba_inner_fn", why, b_rms_weight=b_rms_weight, c_rms_weight=c_rms_weight, dt_rms_weight=dt_rms_weight)
    x, z = xz.chunk(2, dim=1)  # b d l each
    x = ops.causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, state = delta_proj_weight.shape[1], A.shape[1]
    low, *varying = linear(x.mT, x_proj_weight).split([rank, *[state] * ((B is None) + (C is None))], dim=2)
    if B is None:
        B = _biased(varying.pop(0), B_proj_bias).mT
    if C is None:
        C = _biased(varying.pop(0), C_proj_bias).mT
    delta = linear(low, delta_proj_weight).mT
    y = ops.selective_scan(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return linear(y.mT, out_proj_weight, None if out_proj_bias is None else out_proj_bias.to(out_proj_weight.dtype))


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype)


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layerzoo.ops.causal_conv1d`."""
    _none("causal_conv1d_fn", "the final states are returned", final_states_out=final_states_out)
    rest = (bias, seq_idx, initial_states, return_final_states, activation)
    result: Any = ops.causal_conv1d(x, weight, *rest)  # type: ignore[call-overload]
    return result  # type: ignore[no-any-return]


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """`layerzoo.ops.causal_conv1d_update`; as in causal-conv1d it has no gradient, whatever it is called under."""
    return ops.causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)


SCANS = {
    "mamba_inner_fn": mamba_inner_fn,
    "selective_scan_fn": ops.selective_scan,
    "selective_scan_ref": ops.selective_scan,
}
CONVOLUTIONS = {"causal_conv1d_fn": causal_conv1d_fn, "causal_conv1d_update": causal_conv1d_update}
# By the name of the package that is imported: what it says its version is, and what its modules hold.
PACKAGES: dict[str, tuple[str, dict[str, dict[str, object]]]] = {
    "mamba_ssm": (
        "2.3.2+layerzoo",
        {
            "mamba_ssm": {
                "Mamba": Mamba,
                "Mamba2": Mamba2,
                "mamba_inner_fn": mamba_inner_fn,
                "selective_scan_fn": ops.selective_scan,
            },
            "mamba_ssm.modules": {},
            "mamba_ssm.modules.mamba_simple": {"Mamba": Mamba},
            "mamba_ssm.modules.mamba2": {"Mamba2": Mamba2},
            "mamba_ssm.ops": {},
            "mamba_ssm.ops.selective_scan_interface": {**SCANS},
            "mamba_ssm.ops.triton": {},
            "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
            "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
        },
    ),
    "causal_conv1d": (
        "1.6.0+layerzoo",
        {"causal_conv1d": {**CONVOLUTIONS}, "causal_conv1d.causal_conv1d_interface": {**CONVOLUTIONS}},
    ),
}


class StandIn(ModuleType):
    """A module of a package that is not there. `__file__` is this file, so that a failed import says who it was."""

    def __init__(self, name: str, contents: Mapping[str, object], *, package: bool) -> None:
        super().__init__(name, "layerzoo's stand-in: see layerzoo.compat.")
        self.__file__ = __file__
        self.__spec__ = ModuleSpec(name, None, origin=__file__, is_package=package)
        self.__package__ = name if package else name.rpartition(".")[0]
        if package:
            self.__path__: list[str] = []
        vars(self).update(contents)

    def __getattr__(self, name: str) -> Any:
        there = ", ".join(sorted(key for key in vars(self) if not key.startswith("__")))
        raise AttributeError(f"layerzoo's stand-in for {self.__name__} has no {name!r}; it has {there}")


class Compat:
    """The stand-ins that one call of `compat` put into `sys.modules`, by name."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self.modules = modules

    def undo(self) -> None:
        """Takes them out again. What was imported from them before stays with those who did, and works."""
        for name, module in self.modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def compat(*packages: str) -> Compat:
    """Lets code import `mamba_ssm` and `causal_conv1d` (or the one that is named), and gives it our layers and ops.

    For the whole process, until `undo()` of what is returned, or the end of a `with` block. Call it before that code is
    imported. Of transformers' models `accelerate` is what to use; which of them notice stands in docs/ssm.md.

    Raises ValueError for another package, RuntimeError for one that is installed or has been imported: nothing is
    changed then.
    """
    chosen = list(dict.fromkeys(packages or PACKAGES))
    for name in chosen:
        if name not in PACKAGES:
            raise ValueError(f"compat: package must be one of {', '.join(PACKAGES)}, got {name!r}")
        if name in sys.modules:
            who = "layerzoo's stand-in, undo that first" if isinstance(sys.modules[name], StandIn) else "another one"
            raise RuntimeError(f"compat: {name} has been imported already: {who}")
        if (found := importlib.util.find_spec(name)) is not None:
            raise RuntimeError(f"compat: {name} is installed, at {found.origin}; layerzoo does not take its place")
    modules = {name: module for package in chosen for name, module in _stand_ins(package).items()}
    sys.modules.update(modules)
    return Compat(modules)


def _stand_ins(package: str) -> dict[str, ModuleType]:
    version, contents = PACKAGES[package]
    modules: dict[str, ModuleType] = {}
    for name, inside in contents.items():
        parent, _, leaf = name.rpartition(".")
        is_package = any(other.startswith(f"{name}.") for other in contents)
        modules[name] = StandIn(name, inside if parent else {"__version__": version, **inside}, package=is_package)
        if parent:
            setattr(modules[parent], leaf, modules[name])
    return modules
