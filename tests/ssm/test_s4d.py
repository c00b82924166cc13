"""nn.S4D and s4d_kernel: the kit, the kernel and the layer against loops in numpy, convolution against recurrence."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from layerzoo.nn import S4D
from layerzoo.ops import s4d_kernel
from layerzoo.testing import conformance

from .oracle import assert_close

test_s4d = conformance("ssm/s4d")


def system(channels: int, state: int, dtype: torch.dtype = torch.complex128) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    A = torch.complex(-torch.rand(channels, state) - 0.1, 20 * torch.randn(channels, state)).to(dtype)
    C = torch.randn(channels, state, dtype=torch.cfloat).to(dtype)
    return (torch.rand(channels) * 0.1 + 0.001).to(A.real.dtype), A, C


def impulse_response(dt: Tensor, A: Tensor, C: Tensor, length: int) -> Any:
    """Step by step in float64."""
    d, a, c = (x.detach().to(torch.complex128).numpy() for x in (dt, A, C))
    decay = np.exp(d[:, None] * a)
    h, out = (decay - 1) / a, []
    for _ in range(length):
        out.append(2 * (c * h).sum(1).real)
        h = decay * h
    return np.array(out).T.reshape(len(d), length)


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 300])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.complex128, 1e-9), (torch.complex64, 3e-5)], ids=str)
def test_the_kernel_is_the_impulse_response(length: int, dtype: torch.dtype, allowed: float) -> None:
    for channels, state in ((1, 1), (5, 3)):
        arguments = system(channels, state, dtype)
        kernel = s4d_kernel(*arguments, length)
        assert kernel.dtype == arguments[0].dtype
        assert_close("K", kernel, impulse_response(*arguments, length), allowed)


def test_small_steps_keep_their_digits() -> None:
    _, A, C = system(5, 3, torch.complex64)
    dt = torch.full((5,), 1e-6)
    assert_close("K", s4d_kernel(dt, A, C, 9), impulse_response(dt, A, C, 9), 3e-5)


def test_gradcheck() -> None:
    arguments = [x.requires_grad_() for x in system(2, 3)]
    assert torch.autograd.gradcheck(lambda *x: s4d_kernel(*x, 70), arguments, fast_mode=True)


def test_the_layer_is_its_formula() -> None:
    torch.manual_seed(0)
    layer, x = S4D(6, d_state=8), torch.randn(2, 50, 6, dtype=torch.float64)
    layer.double()
    dt, A, C = layer.kernel.system(torch.float64)
    kernel, u = impulse_response(dt, A, C, 50), x.numpy()
    y = np.stack([sum(kernel[:, s] * u[:, t - s] for s in range(t + 1)) for t in range(50)], 1)
    mixed = torch.nn.functional.gelu(torch.as_tensor(y) + layer.D.detach() * x)
    assert_close("y", layer(x), layer.output_linear(mixed.mT).mT, 1e-9)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-9), (torch.float32, 3e-5)], ids=str)
@pytest.mark.parametrize("length", [1, 7, 64, 500])
def test_recurrence_and_convolution_are_equal(length: int, dtype: torch.dtype, allowed: float) -> None:
    torch.manual_seed(0)
    layer, x = S4D(12).to(dtype), torch.randn(2, length, 12, dtype=dtype)
    results = []
    for run in (layer.forward, lambda x: layer.step(x)[0]):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])))
    for i, (one, two) in enumerate(zip(*results, strict=True)):
        assert_close(f"{i}", one, two, allowed * (10 if i else 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_by_step_is_the_whole(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = S4D(12, dtype=dtype), torch.randn(2, 20, 12).to(dtype)
    parts, state = [], None
    for part in x.split([11, 1, 6, 1, 1, 0], dim=1):
        y, state = layer.step(part, state)
        parts.append(y)
    assert state is not None
    assert (state.shape, state.dtype) == ((2, 12, 32), torch.complex64)
    assert_close("y", torch.cat(parts, 1), layer(x), 3e-5 if dtype == torch.float32 else 3e-2)


def test_an_empty_sequence() -> None:
    layer, x = S4D(12), torch.randn(2, 0, 12)
    y, state = layer.step(x)
    assert layer(x).shape == y.shape == (2, 0, 12)
    assert state.shape == (2, 12, 32)
    assert not state.any()


meta = {"device": "meta"}
ONE = {"dt": torch.ones(4), "A": torch.ones(4, 3).cfloat(), "C": torch.ones(4, 3).cfloat(), "length": 5}
BAD = [
    ({"dt": 1.0}, TypeError, "dt must be a tensor, got float"),
    ({"dt": torch.ones(4, 1)}, ValueError, "dt must have shape (channels), got (4, 1)"),
    ({"dt": torch.ones(4).half()}, TypeError, "dt must have dtype float32, float64, got float16"),
    ({"A": torch.ones(4, 3)}, TypeError, "A must have dtype complex64, complex128, got float32"),
    ({"A": torch.ones(5, 3).cfloat()}, ValueError, "A must have shape (channels, state) = (4, 3), got (5, 3)"),
    ({"C": torch.ones(4, 2).cfloat()}, ValueError, "C must have shape (channels, state) = (4, 3), got (4, 2)"),
    ({"C": torch.ones(4, 3).cdouble()}, TypeError, "C must have dtype complex64, got complex128"),
    ({"C": torch.ones(4, 3, **meta).cfloat()}, ValueError, "C must be on cpu"),
    ({"length": -1}, ValueError, "length must be at least 0, got -1"),
]


@pytest.mark.parametrize(("change", "error", "words"), BAD)
def test_bad_input_of_the_kernel(change: Any, error: Any, words: str) -> None:
    s4d_kernel(**ONE)  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        s4d_kernel(**ONE | change)
    assert f"s4d_kernel: {words}" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: S4D(0), "d_model must be at least 1, got 0"),
        (lambda: S4D(8, d_state=5), "d_state must be even and at least 2, got 5"),
        (lambda: S4D(8, dt_min=0.2), "must satisfy 0 < dt_min <= dt_max, got 0.2 and 0.1"),
        (lambda: S4D(8)(torch.ones(2, 3, 7)), "hidden_states must have shape (batch, length, d_model = 8), got (2, 3,"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^S4D: ") as caught:
        call()
    assert words in str(caught.value)
