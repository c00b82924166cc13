"""nn.VisionMamba: the kit, Mamba's formula on the sequence and on the sequence turned round, and what it sees."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layerzoo import _native
from layerzoo.nn import VisionMamba
from layerzoo.testing import conformance

from . import oracle
from .oracle import assert_close

test_vision_mamba = conformance("ssm/vision_mamba")


def formula(layer: VisionMamba, x: Tensor) -> Any:
    """In numpy, the second pass on arrays that are turned round."""
    p = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
    xz = np.einsum("bli,oi->bol", x.detach().double().numpy(), p["in_proj.weight"])
    xz = xz + p["in_proj.bias"][:, None] if "in_proj.bias" in p else xz
    both = np.zeros(1)
    for way, turn in (("", 1), ("_b", -1)):
        u, z = (part[..., ::turn] for part in np.split(xz, 2, axis=1))
        u, _ = oracle.causal_conv1d(u, p[f"conv1d{way}.weight"][:, 0], p.get(f"conv1d{way}.bias"), silu=True)
        chosen = np.einsum("bdl,od->bol", u, p[f"x_proj{way}.weight"])
        low, B, C = np.split(chosen, [layer.dt_rank, layer.dt_rank + layer.d_state], axis=1)
        delta = np.einsum("brl,dr->bdl", low, p[f"dt_proj{way}.weight"])
        A, D = -np.exp(p["A_b_log" if way else "A_log"]), p[f"D{way}"]
        y, _ = oracle.selective_scan(u, delta, A, B, C, D, z, p[f"dt_proj{way}.bias"], True)
        both = both + y[..., ::turn]
    y = np.einsum("bdl,od->blo", both / 2 if layer.if_divide_out else both, p["out_proj.weight"])
    return y + p.get("out_proj.bias", 0)


def shaken(layer: VisionMamba) -> VisionMamba:
    """No parameter at its start, so that each of them counts."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return layer


@pytest.mark.parametrize(
    "config",
    [{}, {"if_divide_out": True}, {"bias": True, "conv_bias": False, "d_conv": 3, "expand": 1, "dt_rank": 3}],
    ids=str,
)
def test_the_formula(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer, x = shaken(VisionMamba(12, d_state=5, **config)), torch.randn(2, 21, 12)
    assert_close("y", layer(x), formula(layer, x), 1e-5)
    layer.double()
    assert_close("y", layer(x.double()), formula(layer, x), 1e-9)


def test_names_and_shapes_are_those_of_the_authors() -> None:
    got = {name: tuple(value.shape) for name, value in VisionMamba(32, d_state=16).state_dict().items()}
    one_way = {
        "conv1d{}.weight": (64, 1, 4),
        "conv1d{}.bias": (64,),
        "x_proj{}.weight": (34, 64),
        "dt_proj{}.weight": (64, 2),
        "dt_proj{}.bias": (64,),
        "D{}": (64,),
    }
    want = {name.format(way): shape for way in ("", "_b") for name, shape in one_way.items()}
    want |= {"in_proj.weight": (128, 32), "out_proj.weight": (32, 64), "A_log": (64, 16), "A_b_log": (64, 16)}
    assert got == want


def test_turned_round_with_its_directions_exchanged_it_is_the_same() -> None:
    torch.manual_seed(0)
    layer, x = shaken(VisionMamba(8)), torch.randn(2, 9, 8)
    exchanged, state = VisionMamba(8), layer.state_dict()

    def other(name: str) -> str:
        if name.startswith("A_"):
            return "A_log" if name == "A_b_log" else "A_b_log"
        module, dot, rest = name.partition(".")
        ways = ("conv1d", "x_proj", "dt_proj", "D")
        return f"{module}_b{dot}{rest}" if module in ways else f"{module.removesuffix('_b')}{dot}{rest}"

    exchanged.load_state_dict({other(name): value for name, value in state.items()})
    assert_close("y", exchanged(x.flip(1)).flip(1), layer(x), 1e-6)


def test_each_token_sees_both_sides() -> None:
    torch.manual_seed(0)
    layer, x = VisionMamba(8), torch.randn(1, 9, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0, 4].sum(), x)
    assert (grad.abs().sum(2) > 0).all()


@pytest.mark.native
def test_both_passes_run_on_the_kernels() -> None:
    ops = ("selective_scan", "causal_conv1d", "selective_scan_backward", "causal_conv1d_backward")
    before = {op: _native.calls(op) for op in ops}
    VisionMamba(8)(torch.randn(1, 9, 8)).sum().backward()
    for op in ops:
        assert _native.calls(op) - before[op] == 2, op


def test_reset_parameters_draws_every_parameter_anew() -> None:
    layer = VisionMamba(8)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: VisionMamba(0), "VisionMamba: d_model must be at least 1, got 0"),
        (lambda: VisionMamba(8, dt_init="zeros"), "VisionMamba: dt_init must be 'random' or 'constant', got 'zeros'"),
        (lambda: VisionMamba(8, dt_min=1.0), "VisionMamba: dt_min and dt_max must satisfy 0 < dt_min <= dt_max, got 1"),
        (
            lambda: VisionMamba(8)(torch.ones(2, 8)),
            "hidden_states must have shape (batch, length, d_model = 8), got (2",
        ),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
