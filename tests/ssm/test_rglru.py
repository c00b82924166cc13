"""nn.RGLRU: the kit, the formula in numpy, transformers' unit, packed sequences, decoding."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layerzoo.nn import RGLRU
from layerzoo.testing import conformance

from .oracle import assert_close, sigmoid, softplus

test_rglru = conformance("ssm/rglru")


def layer(width: int = 12, num_heads: int = 3, **factory: Any) -> RGLRU:
    torch.manual_seed(0)
    unit = RGLRU(width, num_heads, **factory)
    with torch.no_grad():
        for bias in (unit.input_gate_bias, unit.recurrent_gate_bias):
            bias.normal_()
    return unit


def formula(unit: RGLRU, x: Tensor, starts: list[int]) -> Any:
    """Step by step in float64, each head's gate by itself."""
    value = {name: p.detach().double().numpy() for name, p in unit.named_parameters()}
    xs, block = x.double().numpy(), unit.width // unit.num_heads

    def gate(name: str, row: Any) -> Any:
        parts = [
            row[:, k * block : (k + 1) * block] @ value[f"{name}_weight"][k] + value[f"{name}_bias"][k]
            for k in range(unit.num_heads)
        ]
        return sigmoid(np.concatenate(parts, 1))

    h, out = np.zeros((x.shape[0], unit.width)), np.zeros(xs.shape)
    for t in range(x.shape[1]):
        a = np.exp(-8 * softplus(value["recurrent_param"]) * gate("recurrent_gate", xs[:, t]))
        i = gate("input_gate", xs[:, t])
        h = i * xs[:, t] if t in starts else a * h + np.sqrt(1 - a**2) * i * xs[:, t]
        out[:, t] = h
    return out


def test_the_formula() -> None:
    unit, x = layer().double(), torch.randn(2, 19, 12, dtype=torch.float64)
    assert_close("y", unit(x), formula(unit, x, [0]), 1e-9)
    positions = torch.tensor([*range(7), *range(9), *range(3)]).expand(2, 19)
    assert_close("packed", unit(x, positions), formula(unit, x, [0, 7, 16]), 1e-9)


def test_transformers_unit_with_its_own_weights() -> None:
    modeling = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = modeling.RecurrentGemmaConfig(hidden_size=12, lru_width=12, num_attention_heads=3)
    theirs, ours = modeling.RecurrentGemmaRglru(config), layer()
    theirs.load_state_dict(ours.state_dict())
    positions = torch.arange(21).expand(2, 21)
    x = [torch.randn(2, 21, 12, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    one, two = ours(x[0]), theirs(x[1], positions)
    assert_close("y", one, two, 1e-5)
    for unit, leaf, y in ((ours, x[0], one), (theirs, x[1], two)):
        y.square().sum().backward(inputs=[leaf, *unit.parameters()])
    assert_close("gradient of x", x[0].grad, x[1].grad, 1e-5)  # type: ignore[arg-type]
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_close(f"gradient of {name}", p.grad, q.grad, 1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_by_step_is_the_whole(dtype: torch.dtype) -> None:
    unit, x = layer(dtype=dtype), torch.randn(2, 20, 12).to(dtype)
    parts, state = [], None
    for part in x.split([11, 1, 6, 1, 1, 0], dim=1):
        y, state = unit.step(part, state)
        parts.append(y)
    assert state is not None
    assert state.dtype == torch.float32
    assert_close("y", torch.cat(parts, 1), unit(x), 1e-6 if dtype == torch.float32 else 5e-3)


def test_steps_of_padded_and_packed_rows() -> None:
    """Padding on the left is steps at place 0, each of which begins anew."""
    unit, x = layer(), torch.randn(2, 12, 12)
    positions = torch.tensor([[0] * 5 + [*range(7)], [*range(8), *range(4)]])
    y, state = unit.step(x, None, positions)
    assert_close("padded", y[:1, 5:], unit(x[:1, 5:]), 1e-6)
    assert_close("first", y[1:, :8], unit(x[1:, :8]), 1e-6)
    assert_close("second", y[1:, 8:], unit(x[1:, 8:]), 1e-6)
    first, state = unit.step(x[:, :7], None, positions[:, :7])
    second, state = unit.step(x[:, 7:], state, positions[:, 7:])
    assert_close("in two calls", torch.cat([first, second], 1), y, 1e-6)
    for row, begin in ((0, 5), (1, 8)):
        assert_close(f"state of row {row}", state[row : row + 1], unit.step(x[row : row + 1, begin:])[1], 1e-6)


def test_decays_begin_within_their_radius() -> None:
    unit = RGLRU(4096)
    radius = torch.exp(-8 * torch.nn.functional.softplus(unit.recurrent_param))
    assert 0.9 - 1e-4 < radius.min() < 0.902
    assert 0.998 < radius.max() < 0.999 + 1e-4
    assert float(radius.square().mean()) == pytest.approx((0.9**2 + 0.999**2) / 2, abs=5e-3)
    assert float(unit.input_gate_weight.std()) == pytest.approx(1 / math.sqrt(4096), rel=0.01)


def test_a_decay_of_one_keeps_values_and_gradients_finite() -> None:
    unit, x = layer(), torch.randn(2, 9, 12)
    with torch.no_grad():
        unit.recurrent_param.fill_(-200)
    y = unit(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unit.parameters())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: RGLRU(0), "width and num_heads must be at least 1, got 0 and 1"),
        (lambda: RGLRU(8, 3), "num_heads must divide the width 8, got 3"),
        (lambda: RGLRU(8)(torch.ones(2, 8)), "x must have shape (batch, length, width = 8), got (2, 8)"),
        (lambda: RGLRU(8)(torch.ones(2, 3, 7)), "x must have shape (batch, length, width = 8), got (2, 3, 7)"),
        (
            lambda: RGLRU(8)(torch.ones(2, 3, 8), torch.arange(3)),
            "segment_pos must have shape (batch, length) = (2, 3), got (3,)",
        ),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^RGLRU: ") as caught:
        call()
    assert words in str(caught.value)
