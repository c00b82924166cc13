"""`linear` is torch's function by other ways: the same numbers, gradients and errors, whatever way it takes."""

import copy
import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerzoo.ops import linear as module
from layerzoo.ops.linear import linear


@pytest.fixture(autouse=True)
def every_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No product is too small to take another way than torch's."""
    monkeypatch.setattr(module, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(module, "LEAST_PRODUCTS", 0)
    return iter(())


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    given = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    out = linear(*given)
    grad = torch.randn(out.shape)
    a, b, g = (t.detach().double().numpy() for t in (x, weight, grad))
    wanted = [
        np.einsum("...k,nk->...n", a, b) + (0 if bias is None else bias.double().numpy()),
        np.einsum("...n,nk->...k", g, b),
        np.einsum("mn,mk->nk", g.reshape(-1, b.shape[0]), a.reshape(-1, b.shape[1])),
        g.reshape(-1, b.shape[0]).sum(0),
    ]
    got = [out, *torch.autograd.grad(out, given, grad)]
    for one, want in zip(got, wanted, strict=False):
        assert one.shape == want.shape
        assert np.linalg.norm(one.detach().double().numpy() - want) <= 3e-5 * np.linalg.norm(want)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), out) or x.numel() <= 8 * x.shape[-1]  # the kernel for few rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (9, 40), (3, 11, 40), (2, 1, 40), (3, 0, 40), (257, 40)])
def test_shapes(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    check(torch.randn(shape), torch.randn(31, 40), torch.randn(31) if bias else None)


LAYOUTS = {
    "contiguous": lambda x: x,
    "slice": lambda x: torch.cat([x * torch.nan, x], -1)[..., x.shape[-1] :],
    "gaps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "expanded rows": lambda x: x[..., :1, :].expand(x.shape),
}


@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("of_x", LAYOUTS)
def test_layouts(of_x: str, of_weight: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 11, 40), torch.randn(31, 40)
    check(LAYOUTS[of_x](x), LAYOUTS[of_weight](weight), torch.randn(62)[::2])


@pytest.mark.parametrize("wide", [False, True])
def test_either_way_to_the_gradient_of_the_weight(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDE", wide)
    check(torch.randn(3, 11, 40), torch.randn(31, 40), None)


@pytest.mark.parametrize("only", range(3))
@pytest.mark.parametrize("rows", [1, 9])
def test_each_gradient_alone(rows: int, only: int) -> None:
    given = [torch.randn(rows, 40), torch.randn(31, 40), torch.randn(31)]
    given[only].requires_grad_()
    [got], [want] = (torch.autograd.grad(way(*given).square().sum(), given[only]) for way in (linear, F.linear))
    torch.testing.assert_close(got, want)


def test_a_vector_as_weight() -> None:
    x, weight = torch.randn(9, 40), torch.randn(40)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ONEDNN", False)
    check(torch.randn(3, 11, 40), torch.randn(31, 40), torch.randn(31))


def test_the_ways_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("skinny_linear", "_product"):
        way = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, name=name, way=way: taken.append(name) or way(*given))
    weight = torch.randn(31, 40)
    for x, expected in ((torch.randn(1, 40), "skinny_linear"), (torch.randn(9, 40), "_product")):
        linear(x, weight)
        assert taken.pop() == expected
        linear(x.double(), weight.double())
        assert taken == (["skinny_linear"] if x.shape[0] == 1 else [])
        taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(9, 40), weight).dtype == torch.bfloat16
    assert not taken


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    x, weight = torch.randn(11, 40).to(dtype), torch.randn(31, 40).to(dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    "given",
    [
        (torch.zeros(9, 3), torch.zeros(5, 4)),
        (torch.zeros(9, 3), torch.zeros(5, 3).double()),
        (torch.tensor(1.0), torch.zeros(5, 3)),
        (torch.zeros(9, 3), torch.zeros(5, 3), torch.zeros(6)),
        (torch.zeros(9, 3), torch.zeros(5, 3), torch.zeros(5).double()),
        (torch.zeros(9, 3), torch.zeros(5, 3, 1)),
    ],
)
def test_errors_are_those_of_torch(given: tuple[Tensor, ...]) -> None:
    with pytest.raises((RuntimeError, TypeError)) as ours:
        linear(*given)
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        F.linear(*given)
    assert type(ours.value) is type(theirs.value)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 9])
def test_compile(rows: int) -> None:
    layer = nn.Linear(40, 31)
    x = torch.randn(rows, 40, requires_grad=True)

    def run(function: object) -> list[Tensor]:
        out = function(x, layer.weight, layer.bias)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]

    for got, want in zip(run(torch.compile(linear, fullgraph=True, backend="aot_eager")), run(linear), strict=True):
        torch.testing.assert_close(got, want)


def test_threads_and_copies_do_not_change_bits(threads) -> None:  # type: ignore[no-untyped-def]
    x, weight = torch.randn(300, 500), torch.randn(211, 500)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(linear(x, copy.deepcopy(weight)))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
def test_compile_by_inductor(grad: bool) -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    torch.manual_seed(0)
    x, weight, bias = torch.randn(9, 40, requires_grad=grad), torch.randn(7, 40, requires_grad=grad), torch.randn(7)
    out = torch.compile(linear, fullgraph=True)(x, weight, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias))
    if grad:
        for got, want in zip(
            torch.autograd.grad(out.sum(), (x, weight)),
            torch.autograd.grad(F.linear(x, weight, bias).sum(), (x, weight)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)
