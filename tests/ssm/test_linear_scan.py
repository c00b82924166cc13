"""linear_scan against the numpy oracle: values, gradients, layouts, types, threads, and what else it promises."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from layerzoo import _native
from layerzoo.ops import linear_scan

from . import oracle
from .inputs import LAYOUTS, lay_out, recurrence_arguments
from .oracle import TOLERANCE, assert_close

REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX = (torch.complex128, torch.complex64)
PARTS = {torch.complex128: torch.float64, torch.complex64: torch.float32}


def array(x: Tensor) -> Any:
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64).resolve_conj().numpy().copy()


def close(name: str, got: Tensor, want: Any, *dtypes: torch.dtype) -> None:
    """Within the widest tolerance of `dtypes`; a complex number is two real ones."""
    expected = torch.as_tensor(np.array(want))
    if got.is_complex():
        got, expected = torch.view_as_real(got.detach().resolve_conj()), torch.view_as_real(expected.to(torch.cdouble))
    assert_close(name, got, expected, max(TOLERANCE[PARTS.get(dtype, dtype)] for dtype in dtypes))


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    found = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
    for x in found.values():
        x.requires_grad_()
    return found


def check(arguments: dict[str, Any]) -> None:
    """Holds the result and every gradient to the oracle. That of a 16-bit result is of the state as it was rounded."""
    x, inputs = arguments["x"], leaves(arguments)
    h = linear_scan(**arguments)
    assert h.dtype == x.dtype
    assert h.stride() == torch.empty_like(x).stride()
    grad = torch.randn(h.shape, dtype=torch.cfloat if h.is_complex() else None).to(h.dtype)
    grads = torch.autograd.grad(h, list(inputs.values()), grad)
    values = {name: array(value) for name, value in inputs.items()} | {"reverse": arguments["reverse"]}
    acc = torch.promote_types(x.dtype, torch.float32)
    close("h", h, oracle.linear_scan(**values), x.dtype)
    want = oracle.linear_scan_gradients(array(grad), **values)
    for (name, leaf), got in zip(inputs.items(), grads, strict=True):
        assert got.dtype == leaf.dtype, f"gradient of {name}: {got.dtype}"
        expected = want[name] if leaf.is_complex() or not x.is_complex() else want[name].real
        close(f"gradient of {name}", got, expected, x.dtype if name == "a" else acc, leaf.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_oracle_gradients_are_finite_differences(dtype: torch.dtype) -> None:
    arguments, rng = recurrence_arguments(2, 7, 3, dtype=dtype), np.random.default_rng(0)
    values = {name: array(x) for name, x in arguments.items() if isinstance(x, Tensor)}

    def draw(shape: tuple[int, ...]) -> Any:
        return rng.normal(size=shape) + (1j * rng.normal(size=shape) if dtype.is_complex else 0)

    grad = draw((2, 7, 3))
    for name, found in oracle.linear_scan_gradients(grad, **values).items():
        direction = draw(found.shape)

        def loss(step: float, name: str = name, direction: Any = direction) -> float:
            h = oracle.linear_scan(**values | {name: values[name] + step * direction})
            return float((np.conj(grad) * h).sum().real)

        slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
        assert (np.conj(found) * direction).sum().real == pytest.approx(slope, rel=1e-6), name


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", REAL + COMPLEX, ids=str)
def test_types(dtype: torch.dtype, reverse: bool, initial: bool) -> None:
    check(recurrence_arguments(2, 19, 37, dtype=dtype, reverse=reverse, initial=initial))


@pytest.mark.parametrize("channels", [24, 37])  # whole vectors, and not
@pytest.mark.parametrize("dtype", REAL + COMPLEX, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, channels: int) -> None:
    check(recurrence_arguments(2, 21, channels, dtype=dtype, layouts=(layout,)))


@pytest.mark.parametrize("others", REAL, ids=str)
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_mixed_types(dtype: torch.dtype, others: torch.dtype) -> None:
    check(recurrence_arguments(2, 13, 9, dtype=dtype, others=others))


@pytest.mark.parametrize("others", [torch.float32, torch.bfloat16, torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_mixed_types_with_complex_x(dtype: torch.dtype, others: torch.dtype) -> None:
    check(recurrence_arguments(2, 13, 9, dtype=dtype, others=others))


@pytest.mark.parametrize("length", [4, 5, 127, 257, 270])  # around the steps of a buffer
@pytest.mark.parametrize("layout", ["time-last", "channel-last"])
def test_lengths(length: int, layout: str) -> None:
    for channels, dtype in ((3, torch.float32), (9, torch.bfloat16), (5, torch.complex64)):
        check(recurrence_arguments(1, length, channels, dtype=dtype, layouts=(layout,)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_rows_longer_than_a_task(dtype: torch.dtype) -> None:
    check(recurrence_arguments(1, 6, 1100, dtype=dtype))


@st.composite
def any_arguments(draw: st.DrawFn) -> dict[str, Any]:
    dtype = draw(st.sampled_from(REAL + COMPLEX))
    return recurrence_arguments(
        draw(st.sampled_from([0, 1, 2, 3])),
        draw(st.sampled_from([0, 1, 2, 3, 7, 31])),
        draw(st.sampled_from([0, 1, 2, 7, 8, 17, 64, 65, 131])),
        initial=draw(st.booleans()),
        reverse=draw(st.booleans()),
        dtype=dtype,
        others=draw(st.sampled_from(REAL + (COMPLEX if dtype.is_complex else ()))),
        layouts=tuple(draw(st.permutations(LAYOUTS))),
        seed=draw(st.integers(0, 99)),
    )


@given(any_arguments())
def test_any_arguments(arguments: dict[str, Any]) -> None:
    check(arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_an_expanded_decay(dtype: torch.dtype) -> None:
    arguments = recurrence_arguments(2, 21, 9, dtype=dtype)
    for decay in (arguments["a"][0, 0], arguments["a"][0, :, :1], arguments["a"][:, :1]):
        expanded = arguments | {"a": decay.detach().expand(2, 21, 9)}
        close("h", linear_scan(**expanded), oracle.linear_scan(*(array(expanded[n]) for n in ORDER)), dtype)
        leaf = decay.detach().clone().requires_grad_()
        (got,) = torch.autograd.grad(linear_scan(**arguments | {"a": leaf.expand(2, 21, 9)}).real.sum(), leaf)
        alone = leaf.detach().expand(2, 21, 9).clone().requires_grad_()
        (each,) = torch.autograd.grad(linear_scan(**arguments | {"a": alone}).real.sum(), alone)
        close("gradient", got, array(each.sum_to_size(leaf.shape)), dtype)


ORDER = ("a", "x", "initial_state")


def test_a_conjugate_view() -> None:
    arguments = recurrence_arguments(2, 9, 5, dtype=torch.complex64)
    lazy = linear_scan(**arguments | {"a": arguments["a"].conj(), "x": arguments["x"].conj()})
    want = oracle.linear_scan(*(np.conj(array(arguments[n])) for n in ORDER[:2]), array(arguments["initial_state"]))
    close("h", lazy, want, torch.complex64)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_sequence_in_two_parts(reverse: bool) -> None:
    arguments = recurrence_arguments(2, 40, 9, reverse=reverse)
    whole, last = linear_scan(**arguments), 0 if reverse else -1
    for at in (1, 17, 39):
        parts = [{n: arguments[n][:, part] for n in ("a", "x")} for part in (slice(at), slice(at, None))]
        first, second = reversed(parts) if reverse else parts
        one = linear_scan(**arguments | first)
        two = linear_scan(**arguments | second | {"initial_state": one[:, last]})
        assert torch.equal(torch.cat([two, one] if reverse else [one, two], 1), whole)


def test_what_is_not_finite_stays_in_its_channel_and_after_its_step() -> None:
    arguments = recurrence_arguments(2, 30, 9)
    arguments["x"][1, 11, 4] = torch.nan
    bad = linear_scan(**arguments).isnan()
    want = torch.zeros(2, 30, 9, dtype=torch.bool)
    want[1, 11:, 4] = True
    assert torch.equal(bad, want)


def test_a_long_sum_keeps_its_digits() -> None:
    x = torch.rand(1, 20000, 3)
    h = linear_scan(torch.ones(()).expand(x.shape), x)
    assert_close("h", h, x.double().cumsum(1), TOLERANCE[torch.float32])


def run_all(arguments: dict[str, Any]) -> list[Tensor]:
    inputs = leaves(arguments)
    h = linear_scan(**arguments)
    return [h, *torch.autograd.grad(h, list(inputs.values()), h.detach())]


@pytest.mark.native
@given(
    st.sampled_from([17, 131, 1500]),
    st.sampled_from([5, 70]),
    st.sampled_from(REAL + COMPLEX),
    st.sampled_from(LAYOUTS),
)
def test_any_number_of_threads_gives_the_same_bits(channels: int, length: int, dtype: torch.dtype, layout: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 7):
            torch.set_num_threads(count)
            results.append(run_all(recurrence_arguments(1, length, channels, dtype=dtype, layouts=(layout,))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_the_memory_between_them_are_not_written(layout: str, dtype: torch.dtype) -> None:
    arguments = recurrence_arguments(2, 40, 9, dtype=dtype, layouts=(layout,))
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    before = [bytes(x.untyped_storage()) for x in tensors]
    run_all(arguments)
    assert [bytes(x.untyped_storage()) for x in tensors] == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expanded_or_strided_grad(layout: str) -> None:
    arguments = recurrence_arguments(2, 20, 9, layouts=(layout,))
    inputs = list(leaves(arguments).values())
    h = linear_scan(**arguments)
    want = torch.autograd.grad(h, inputs, torch.full_like(h, 0.5), retain_graph=True)
    for other in (lay_out(torch.full_like(h, 0.5), layout), torch.tensor(0.5).expand(h.shape)):
        for one, two in zip(torch.autograd.grad(h, inputs, other, retain_graph=True), want, strict=True):
            assert_close("gradient", one, two, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(dtype: torch.dtype, reverse: bool) -> None:
    arguments = recurrence_arguments(2, 5, 3, dtype=dtype, reverse=reverse)
    inputs = leaves(arguments)
    assert torch.autograd.gradcheck(lambda *x: linear_scan(*x, reverse), tuple(inputs.values()))


def test_a_second_derivative_is_a_clear_error() -> None:
    arguments = recurrence_arguments(1, 5, 3)
    x = arguments["x"].requires_grad_()
    (grad,) = torch.autograd.grad(linear_scan(**arguments).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("layouts", [("time-last",), ("channel-last", "chunk", "gaps")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("initial", [True, False])
def test_opcheck(initial: bool, dtype: torch.dtype, layouts: tuple[str, ...]) -> None:
    arguments = recurrence_arguments(2, 5, 6, initial=initial, dtype=dtype, layouts=layouts)
    a, x, first = arguments["a"], arguments["x"], arguments.get("initial_state")
    h = torch.ops.layerzoo.linear_scan(a, x, first, True)
    torch.library.opcheck(torch.ops.layerzoo.linear_scan_backward.default, (torch.ones_like(h), a, h, first, True))
    leaves(arguments)
    torch.library.opcheck(torch.ops.layerzoo.linear_scan.default, (a, x, first, True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_compile_without_graph_breaks_and_with_one_graph_for_all_sizes(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_scan, fullgraph=True, backend=counter, dynamic=True)
    for batch, length in ((2, 7), (5, 20)):
        results = []
        for function in (linear_scan, compiled):
            arguments = recurrence_arguments(batch, length, 6, dtype=dtype)
            inputs = leaves(arguments)
            h = function(**arguments)
            results.append([h, *torch.autograd.grad(h.abs().sum(), list(inputs.values()))])
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two)
            assert one.stride() == two.stride()
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_autocast_leaves_it_alone(dtype: torch.dtype) -> None:
    arguments = recurrence_arguments(2, 9, 5, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        h = linear_scan(**arguments)
    assert h.dtype == dtype
    assert torch.equal(h, linear_scan(**arguments))


@pytest.mark.native
def test_the_call_counters_rise() -> None:
    names = ("linear_scan", "linear_scan_backward")
    before = [_native.calls(name) for name in names]
    run_all(recurrence_arguments(1, 3, 2))
    assert [_native.calls(name) for name in names] == [count + 1 for count in before]


meta = {"device": "meta"}
BAD: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"x": 1.0}, TypeError, ("x must be a tensor", "got float")),
    ({"x": torch.ones(2, 6)}, ValueError, ("x must have shape (batch, length, channels)", "got (2, 6)")),
    ({"x": torch.ones(2, 6, 4).int()}, TypeError, ("x must have dtype float32", "complex64", "got int32")),
    ({"x": torch.ones(2, 5, 4)}, ValueError, ("a", "(batch, length, channels) = (2, 5, 4)", "got (2, 6, 4)")),
    ({"a": None}, TypeError, ("a must be a tensor", "got NoneType")),
    ({"a": torch.ones(4)}, ValueError, ("a", "(2, 6, 4)", "got (4,)")),
    ({"a": torch.ones(2, 6, 4).bool()}, TypeError, ("a must have dtype float32", "got bool")),
    ({"a": torch.ones(2, 6, 4).cfloat()}, TypeError, ("a must have dtype float32", "got complex64")),
    ({"a": torch.ones(2, 6, 4, **meta)}, ValueError, ("a must be on cpu", "got meta")),
    ({"initial_state": torch.ones(2, 1, 4)}, ValueError, ("initial_state", "(batch, channels) = (2, 4)", "(2, 1, 4)")),
    ({"initial_state": torch.ones(2, 4).cfloat()}, TypeError, ("initial_state must have dtype", "got complex64")),
    ({"initial_state": torch.ones(2, 4, **meta)}, ValueError, ("initial_state must be on cpu", "got meta")),
]


@pytest.mark.parametrize("row", BAD, ids=[f"{i}-{next(iter(row[0]))}" for i, row in enumerate(BAD)])
def test_bad_input(row: Any) -> None:
    change, error, words = row
    good = recurrence_arguments(2, 6, 4)
    linear_scan(**good)
    with pytest.raises(error) as caught:
        linear_scan(**good | change)
    message = str(caught.value)
    assert message.startswith("linear_scan: ")
    assert all(word in message for word in words), message


@pytest.mark.native
def test_the_kernel_refuses_what_the_checks_in_python_would() -> None:
    x = torch.ones(1, 2, 3)
    with pytest.raises(RuntimeError, match="a must have shape"):
        torch.ops.layerzoo.linear_scan(x[:, :1], x, None, False)
    with pytest.raises(RuntimeError, match="a must have the complex type of x"):
        torch.ops.layerzoo.linear_scan(x, x.cfloat(), None, False)
    with pytest.raises(RuntimeError, match="a must be float32"):
        torch.ops.layerzoo.linear_scan(x.cfloat(), x, None, False)
