"""nn.HGRN: the kit, the formula step by step in numpy, the bounds of a stack, decoding, what bounds are good for."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn import HGRN, hgrn_lower_bounds
from layerzoo.testing import conformance

from .oracle import assert_close, sigmoid

test_hgrn = conformance("ssm/hgrn")


def formula(layer: HGRN, x: Tensor, bound: Any) -> Any:
    """Step by step in float64, with e^{i theta} as a complex number."""
    value = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
    xs, width = x.double().numpy(), layer.d_model

    def linear(name: str, row: Any) -> Any:
        return row @ value[f"{name}.weight"].T + value[f"{name}.bias"]

    def silu(z: Any) -> Any:
        return z * sigmoid(z)

    h, out = np.zeros((x.shape[0], width), complex), np.zeros(xs.shape)
    for t in range(x.shape[1]):
        c = silu(linear("input_proj", xs[:, t]))
        f = bound + (1 - bound) * sigmoid(linear("forget_proj", xs[:, t]))
        h = f * np.exp(1j * value["theta"]) * h + (1 - f) * (c[:, :width] + 1j * c[:, width:])
        mixed = silu(linear("gate_proj", xs[:, t])) * np.concatenate([h.real, h.imag], 1)
        mixed = (mixed - mixed.mean(1, keepdims=True)) / np.sqrt(mixed.var(1, keepdims=True) + 1e-5)
        out[:, t] = linear("out_proj", mixed * value["norm.weight"] + value["norm.bias"])
    return out


def test_the_formula() -> None:
    torch.manual_seed(0)
    layer, x, bound = HGRN(12, lower_bound=0.4), torch.randn(2, 40, 12), torch.rand(12)
    assert_close("y", layer(x), formula(layer, x, 0.4), 1e-5)
    assert_close("y", layer(x, bound), formula(layer, x, bound.double().numpy()), 1e-5)
    layer.double()
    assert_close("y", layer(x.double()), formula(layer, x, 0.4), 1e-9)


def test_bounds_begin_at_zero_and_rise_with_depth() -> None:
    bounds = hgrn_lower_bounds(torch.randn(7, 12))
    assert not bounds[0].any()
    assert (bounds.diff(dim=0) > 0).all()
    assert bounds.max() < 1
    assert torch.equal(hgrn_lower_bounds(torch.randn(1, 3)), torch.zeros(1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_by_step_is_the_whole(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x, bound = HGRN(12, dtype=dtype), torch.randn(2, 20, 12).to(dtype), torch.rand(12)
    parts, state = [], None
    for part in x.split([11, 1, 6, 1, 1, 0], dim=1):
        y, state = layer.step(part, state, bound)
        parts.append(y)
    assert state is not None
    assert state.dtype == torch.complex64
    assert_close("y", torch.cat(parts, 1), layer(x, bound), 1e-5 if dtype == torch.float32 else 2e-2)


def test_steps_of_padded_and_packed_rows() -> None:
    """Padding on the left is tokens at place 0, each of which begins anew."""
    torch.manual_seed(0)
    layer, x, bound = HGRN(12), torch.randn(2, 12, 12), torch.rand(12)
    positions = torch.tensor([[0] * 5 + [*range(7)], [*range(8), *range(4)]])
    y, state = layer.step(x, None, bound, positions)
    assert_close("padded", y[:1, 5:], layer(x[:1, 5:], bound), 1e-5)
    assert_close("first", y[1:, :8], layer(x[1:, :8], bound), 1e-5)
    assert_close("second", y[1:, 8:], layer(x[1:, 8:], bound), 1e-5)
    first, state = layer.step(x[:, :7], None, bound, positions[:, :7])
    second, state = layer.step(x[:, 7:], state, bound, positions[:, 7:])
    assert_close("in two calls", torch.cat([first, second], 1), y, 1e-5)
    for row, begin in ((0, 5), (1, 8)):
        want = layer.step(x[row : row + 1, begin:], None, bound)[1]
        assert_close(f"state of row {row}", torch.view_as_real(state[row]), torch.view_as_real(want[0]), 1e-5)


def recall_error(bound: float, delay: int = 60) -> float:
    """The share of wrong answers, after training, to: which of 4 marks stood first, `delay` steps of noise ago?"""
    torch.manual_seed(0)
    layer, head = HGRN(16, lower_bound=bound), nn.Linear(16, 4)
    optimizer = torch.optim.AdamW([*layer.parameters(), *head.parameters()], lr=1e-2)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        answer = torch.randint(4, (size,))
        x = torch.randn(size, delay + 1, 16) * 0.1
        x[:, 0] = F.one_hot(answer, 16) * 3.0
        return x, answer

    for _ in range(80):
        x, answer = batch(64)
        loss = F.cross_entropy(head(layer(x)[:, -1]), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x, answer = batch(512)
        return float((head(layer(x)[:, -1]).argmax(1) != answer).float().mean())


@pytest.mark.slow
def test_scan_bounds_and_recall_over_a_long_delay() -> None:
    """The catalogue's check."""
    test_the_formula()
    test_bounds_begin_at_zero_and_rise_with_depth()
    bounded, free = recall_error(0.95), recall_error(0.0)
    assert bounded < 0.1, f"bounded gates: {bounded:.0%} wrong"
    assert free > 0.5, f"free gates: {free:.0%} wrong"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: HGRN(0), "HGRN: d_model must be at least 1, got 0"),
        (lambda: HGRN(8, lower_bound=1.0), "HGRN: lower_bound must be in [0, 1), got 1.0"),
        (lambda: HGRN(8)(torch.ones(2, 8)), "HGRN: hidden_states must have shape (batch, length, d_model = 8), got (2"),
        (
            lambda: HGRN(8)(torch.ones(2, 3, 8), segment_pos=torch.arange(3)),
            "HGRN: segment_pos must have shape (batch, length) = (2, 3), got (3,)",
        ),
        (lambda: hgrn_lower_bounds(torch.ones(3)), "hgrn_lower_bounds: logits must have shape (layers, d_model), got"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
