"""How an op of layerzoo is defined: schema, fallback, fake, autograd and autocast in one call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from layerzoo import _native

library = torch.library.Library("layerzoo", "FRAGMENT")
Op = Callable[..., Any]


def define(
    schema: str,
    *,
    reference: Op,
    fake: Op,
    setup_context: Op | None = None,
    backward: Op | None = None,
    autocast: tuple[int, ...] = (),
    inference: bool = False,
) -> Op:
    """Defines `layerzoo::<schema>` and returns its overload.

    `reference` runs where no kernel is registered, with one warning. `autocast` lists the positions of the arguments
    that an autocast region turns into its own type; all others stay as they are. Without `backward` a gradient through
    the op is an error that says so; `inference` leaves that out, and the Python call that it costs, for an op that its
    public function never calls where a gradient is needed.
    """
    name = schema.partition("(")[0]
    qualified = f"layerzoo::{name}"
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: Op = getattr(torch.ops.layerzoo, name).default

    def fallback(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        _native.warn_fallback(name, device)
        with torch.autocast(device.type, enabled=False):  # kernels compute in the types that they are given
            return reference(*args)

    library.impl(name, fallback, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=library)
    if not inference:
        torch.library.register_autograd(
            qualified, backward or _no_gradient(name), setup_context=setup_context, lib=library
        )
    for device in ("cpu", "cuda") if autocast else ():
        _register_autocast(name, op, device, autocast)
    return op


def _no_gradient(name: str) -> Op:
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"layerzoo::{name} has no gradient: second derivatives are not implemented")

    return backward


def _register_autocast(name: str, op: Op, device: str, positions: tuple[int, ...]) -> None:
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

    def cast(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        changed = [
            arg.to(dtype) if i in positions and arg is not None and arg.dtype != torch.float64 else arg
            for i, arg in enumerate(args)
        ]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(*changed)

    library.impl(name, cast, f"Autocast{device.upper()}")
