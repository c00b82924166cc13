"""skinny_linear against numpy in float64."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerzoo.ops import skinny_linear

TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}
LAYOUTS = ("plain", "transposed", "gaps")


def lay_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "gaps":
        wide = torch.full((x.shape[0], 2 * x.shape[1] + 3), torch.nan, dtype=x.dtype)
        view = wide[:, 3::2] if x.shape[1] % 2 else wide[:, 1 : x.shape[1] + 1]
        return view.copy_(x)
    return x


def arguments(
    rows: int,
    size_in: int,
    size_out: int,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
) -> tuple[Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, size_in).to(dtype), torch.randn(size_out, size_in).to(dtype)
    return lay_out(x, layout), lay_out(weight, layout), torch.randn(size_out).to(dtype) if bias else None


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    got = skinny_linear(x, weight, bias)
    want = np.einsum("...k,nk->...n", x.double().numpy(), weight.double().numpy())
    if bias is not None:
        want = want + bias.double().numpy()
    assert (got.dtype, got.shape, got.is_contiguous()) == (x.dtype, want.shape, True)
    off = np.linalg.norm(got.double().numpy() - want)
    assert off <= TOLERANCE[x.dtype] * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", range(18))
def test_rows(rows: int, dtype: torch.dtype) -> None:
    check(*arguments(rows, 150, 35, dtype=dtype))


@st.composite
def any_arguments(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    return arguments(
        draw(st.sampled_from([0, 1, 2, 3, 5, 8, 9, 17])),
        draw(st.sampled_from([0, 1, 2, 7, 31, 64, 65, 127, 521])),
        draw(st.sampled_from([0, 1, 2, 15, 16, 17, 101])),
        bias=draw(st.booleans()),
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@given(any_arguments())
def test_any_sizes_types_and_layouts(given: tuple[Tensor, Tensor, Tensor | None]) -> None:
    check(*given)


@pytest.mark.parametrize("shape", [(40,), (1, 1, 40), (2, 3, 40), (0, 3, 40)])
def test_any_rank(shape: tuple[int, ...]) -> None:
    check(torch.randn(shape), torch.randn(7, 40), torch.randn(7))


def test_nan_and_infinity_arrive() -> None:
    x, weight, bias = arguments(2, 70, 20)
    weight[3, 69], weight[4, 1] = torch.nan, torch.inf
    got = skinny_linear(x, weight, bias)
    assert torch.equal(got.isnan(), F.linear(x, weight, bias).isnan())
    assert torch.equal(got.isinf(), F.linear(x, weight, bias).isinf())


@pytest.mark.native
@given(st.sampled_from([1, 5, 8]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_same_bits_for_any_number_of_threads(rows: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    given = arguments(rows, 1031, 1031, dtype=dtype)
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(skinny_linear(*given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_gradients_are_those_of_torch() -> None:
    x, weight, bias = (t.requires_grad_() for t in arguments(3, 5, 4, dtype=torch.float64) if t is not None)
    assert torch.autograd.gradcheck(skinny_linear, (x, weight, bias))
    assert torch.autograd.gradgradcheck(skinny_linear, (x, weight, bias))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype: torch.dtype, bias: bool) -> None:
    torch.library.opcheck(torch.ops.layerzoo.skinny_linear.default, arguments(2, 9, 5, bias=bias, dtype=dtype))
    torch.library.opcheck(torch.ops.layerzoo.skinny_linear.default, (torch.randn(9), *arguments(2, 9, 5)[1:]))


@pytest.mark.slow
@torch.no_grad()
def test_compile_and_export() -> None:
    given = arguments(2, 9, 5)
    compiled = torch.compile(skinny_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), skinny_linear(*given))

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return skinny_linear(x, weight, bias)

    program = torch.export.export(Module(), given)
    assert torch.equal(program.module()(*given), skinny_linear(*given))


@torch.no_grad()
def test_autocast_does_as_torch() -> None:
    given = arguments(2, 40, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = skinny_linear(*given), F.linear(*given)
    assert got.dtype == want.dtype == torch.bfloat16
    assert torch.allclose(got, want, rtol=1e-2, atol=1e-2)


X, W, BIAS = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((1.0, W), TypeError, "skinny_linear: x must be a tensor, got float"),
        ((X, [1]), TypeError, "skinny_linear: weight must be a tensor, got list"),
        ((X, BIAS), ValueError, r"skinny_linear: weight must have shape \(out, in\), got \(5,\)"),
        ((torch.tensor(1.0), W), ValueError, r"skinny_linear: x must have shape \(..., in = 3\), got \(\)"),
        ((torch.zeros(2, 4), W), ValueError, r"x must have shape \(..., in\) = \(2, 3\), got \(2, 4\)"),
        ((X.double(), W), TypeError, "x must have dtype float32, got float64"),
        ((X, W.int()), TypeError, "weight must have dtype float32, bfloat16, float16, float64, got int32"),
        ((X, W, torch.zeros(3)), ValueError, r"bias must have shape \(out,\) = \(5,\), got \(3,\)"),
        ((X, W, BIAS.half()), TypeError, "bias must have dtype float32, got float16"),
        ((X, W.to("meta")), ValueError, "x must be on meta like the first argument, got cpu"),
    ],
)
def test_bad_input(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        skinny_linear(*given)


@pytest.mark.native
def test_the_kernel_checks_sizes_for_itself() -> None:
    with pytest.raises(RuntimeError, match="the last dimension of x must be 3"):
        torch.ops.layerzoo.skinny_linear(torch.zeros(2, 4), W, None)
    with pytest.raises(RuntimeError, match="bias must have shape"):
        torch.ops.layerzoo.skinny_linear(X, W, torch.zeros(4))
