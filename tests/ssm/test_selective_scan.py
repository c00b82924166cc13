"""selective_scan against the numpy oracle: values, gradients, layouts, types, threads."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerzoo.ops import selective_scan
from layerzoo.reference.ssm import CHUNK

from . import oracle
from .inputs import LAYOUTS, lay_out, leaves, plain, scan_arguments
from .oracle import TOLERANCE, array, assert_close

OPTIONAL = ("D", "z", "delta_bias", "initial_state", "seq_idx")
KINDS = ("constant", "varying", "grouped")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(arguments: dict[str, Any], tolerances: dict[torch.dtype, float] = TOLERANCE) -> None:
    """Holds outputs and every gradient to the oracle."""
    u = arguments["u"]
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    inputs = leaves(arguments)
    out, last = selective_scan(**arguments, return_last_state=True)
    assert (out.dtype, last.dtype) == (u.dtype, wide)
    assert out.stride() == torch.empty_like(u).stride()
    grad_out, grad_last = torch.randn(out.shape).to(out.dtype), torch.randn(last.shape).to(wide)
    grads = torch.autograd.grad([out, last], list(inputs.values()), [grad_out, grad_last])

    values = plain(arguments)
    want_out, want_last = oracle.selective_scan(**values)
    assert_close("out", out, want_out, tolerances[u.dtype])
    assert_close("last_state", last, want_last, tolerances[wide])
    want = oracle.selective_scan_gradients(array(grad_out), array(grad_last), **values)
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        assert grad.dtype == x.dtype, f"gradient of {name}: {grad.dtype}"
        assert_close(f"gradient of {name}", grad, want[name], max(tolerances[wide], tolerances[x.dtype]))


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("reverse", [True, False])
def test_oracle_gradients_are_complex_step_derivatives(softplus: bool, reverse: bool) -> None:
    arguments = scan_arguments(2, 4, 7, 3, B="grouped", C="constant", groups=2, softplus=softplus, reverse=reverse)
    values, rng = plain(arguments), np.random.default_rng(0)
    grad_out, grad_last = rng.normal(size=(2, 4, 7)), rng.normal(size=(2, 4, 3))
    grads = oracle.selective_scan_gradients(grad_out, grad_last, **values)
    for name, grad in grads.items():
        direction = rng.normal(size=grad.shape)
        out, last = oracle.selective_scan(**values | {name: values[name] + 1e-30j * direction})
        want = ((grad_out * out).sum() + (grad_last * last).sum()).imag / 1e-30
        assert (grad * direction).sum() == pytest.approx(want, rel=1e-11), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", KINDS)
@pytest.mark.parametrize("B", KINDS)
def test_constant_varying_and_grouped_coefficients(B: str, C: str, dtype: torch.dtype) -> None:
    groups = 1 if "varying" in (B, C) else 3
    check(scan_arguments(2, 6, 37, 5, B=B, C=C, groups=groups, dtype=dtype))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize(
    "leave_out", [(), *((name,) for name in OPTIONAL), OPTIONAL], ids=lambda names: "+".join(names)
)
def test_optional_arguments(leave_out: tuple[str, ...], softplus: bool, reverse: bool) -> None:
    check(scan_arguments(2, 9, 41, 6, leave_out=leave_out, softplus=softplus, reverse=reverse))


@pytest.mark.parametrize("channels", [24, 37])  # whole vectors, and not
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, reverse: bool, channels: int) -> None:
    check(scan_arguments(2, channels, 67, 4, dtype=dtype, reverse=reverse, layouts=(layout,)))


@pytest.mark.parametrize("wide", DTYPES, ids=str)
@pytest.mark.parametrize("narrow", DTYPES, ids=str)
def test_mixed_dtypes(wide: torch.dtype, narrow: torch.dtype) -> None:
    arguments = scan_arguments(1, 11, 35, 3, B="grouped", C="constant", dtype=wide, parameters=narrow)
    arguments["delta"] = arguments["delta"].to(narrow)
    arguments["z"] = arguments["z"].to(narrow)
    check(arguments)


@pytest.mark.parametrize("layout", ["time-last", "channel-last"])
@pytest.mark.parametrize("channels", [200, 400, 800, 1600, 3100])  # each is cut into larger units than the one before
def test_many_channels(channels: int, layout: str) -> None:
    check(scan_arguments(1, channels, 5, 3, layouts=(layout,)))


@st.composite
def any_arguments(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2, 3]))
    B, C = (draw(st.sampled_from(KINDS)) for _ in "BC")
    if "varying" in (B, C):
        groups = 1
    return scan_arguments(
        draw(st.sampled_from([0, 1, 2, 2])),
        groups * draw(st.sampled_from([1, 7, 8, 17, 64, 65, 131])),
        draw(st.sampled_from([0, 1, 2, 31, 32, 33, 63, 64, 65, 97, 129])),
        draw(st.sampled_from([1, 2, 3, 4, 5, 16, 17, 37])),
        B=B,
        C=C,
        groups=groups,
        leave_out=tuple(draw(st.sets(st.sampled_from(OPTIONAL)))),
        softplus=draw(st.booleans()),
        reverse=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        layouts=tuple(draw(st.permutations(LAYOUTS))),
        seed=draw(st.integers(0, 99)),
    )


@given(any_arguments())
def test_any_arguments(arguments: dict[str, Any]) -> None:
    check(arguments)


@pytest.mark.parametrize("ids", ["int32", "int64"])
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_sequences_equal_separate_ones(ids: str, reverse: bool) -> None:
    arguments = scan_arguments(1, 5, 70, 4, reverse=reverse, leave_out=("initial_state",))
    marks = [-1] * 3 + [0] * 30 + [-1] * 2 + [4] * 1 + [5] * 30 + [-1] * 4
    arguments["seq_idx"] = torch.tensor([marks], dtype=getattr(torch, ids))
    out, last = selective_scan(**arguments, return_last_state=True)
    along = ("u", "delta", "B", "C", "z")
    for mark in (0, 4, 5):
        where = arguments["seq_idx"][0] == mark
        alone = {name: x[..., where] if name in along else x for name, x in arguments.items() if name != "seq_idx"}
        separate, state = selective_scan(**alone, return_last_state=True)
        assert_close(f"sequence {mark}", out[..., where], separate, 1e-6)
        if mark == (0 if reverse else 5):
            assert_close("last_state", last, state, 1e-6)
    assert not out[..., arguments["seq_idx"][0] < 0].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_what_stands_in_padding_does_not_matter(reverse: bool) -> None:
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        arguments = scan_arguments(2, 9, 40, 4, reverse=reverse)
        padding = (arguments["seq_idx"] < 0).unsqueeze(1)
        assert padding.any()
        for name in ("u", "delta", "z", "B", "C"):
            arguments[name] = arguments[name].masked_fill(padding, garbage)
        inputs = leaves(arguments)
        out, last = selective_scan(**arguments, return_last_state=True)
        grad_out = torch.ones_like(out).masked_fill(padding, garbage)
        grads = torch.autograd.grad([out, last], list(inputs.values()), [grad_out, torch.ones_like(last)])
        results.append({"out": out, "last_state": last} | dict(zip(inputs, grads, strict=True)))
    for other in results[1:]:
        for name, x in results[0].items():
            assert_close(name, other[name], x, 1e-6)


def test_only_the_gradient_of_last_state() -> None:
    arguments = scan_arguments(2, 9, 40, 4)
    inputs = leaves(arguments)
    _, last = selective_scan(**arguments, return_last_state=True)
    grads = torch.autograd.grad(last, list(inputs.values()), torch.ones_like(last))
    want = oracle.selective_scan_gradients(np.zeros((2, 9, 40)), np.ones((2, 9, 4)), **plain(arguments))
    for name, grad in zip(inputs, grads, strict=True):
        assert_close(f"gradient of {name}", grad, want[name], 3e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expanded_or_strided_grad_out(layout: str) -> None:
    arguments = scan_arguments(2, 9, 40, 4, layouts=(layout,))
    inputs = leaves(arguments)
    out = selective_scan(**arguments)
    grad = lay_out(torch.full_like(out, 0.5), layout)
    want = torch.autograd.grad(out, list(inputs.values()), torch.full_like(out, 0.5), retain_graph=True)
    for other in (grad, torch.tensor(0.5).expand(out.shape)):
        got = torch.autograd.grad(out, list(inputs.values()), other, retain_graph=True)
        for name, one, two in zip(inputs, got, want, strict=True):
            assert_close(name, one, two, 1e-6)


def test_expanded_inputs() -> None:
    arguments = scan_arguments(2, 9, 40, 4, B="grouped", C="grouped", leave_out=("seq_idx",))
    for name in ("u", "delta", "z", "B", "C", "initial_state"):
        arguments[name] = arguments[name][:1].expand(arguments[name].shape)
    arguments["A"] = arguments["A"][:1].expand(9, 4)
    check(arguments)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_one_gradient_alone_equals_that_of_all(name: str) -> None:
    arguments = scan_arguments(2, 9, 40, 4)
    one = arguments[name].clone().requires_grad_()
    (alone,) = torch.autograd.grad(selective_scan(**arguments | {name: one}).square().sum(), one)
    inputs = leaves(arguments)
    (among_all,) = torch.autograd.grad(selective_scan(**arguments).square().sum(), inputs[name])
    assert torch.equal(alone, among_all)


def test_the_op_without_kept_states_has_the_same_gradients() -> None:
    arguments = scan_arguments(2, 9, 40, 4)
    inputs = leaves(arguments)
    order = (
        "u",
        "delta",
        "A",
        "B",
        "C",
        "D",
        "z",
        "delta_bias",
        "delta_softplus",
        "initial_state",
        "seq_idx",
        "reverse",
    )
    outs = [torch.ops.layerzoo.selective_scan(*(arguments[name] for name in order), chunk)[0] for chunk in (0, CHUNK)]
    first, second = (torch.autograd.grad(out.square().sum(), list(inputs.values())) for out in outs)
    for name, one, two in zip(inputs, first, second, strict=True):
        assert torch.equal(one, two), name


# ---- values at the edge ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_exponents_down_to_minus_ten_thousand(dtype: torch.dtype) -> None:
    arguments = scan_arguments(1, 9, 40, 4, softplus=False, dtype=dtype)
    arguments["delta"] = arguments["delta"] * torch.logspace(-3, 2.3, 40, dtype=dtype)
    arguments["A"] = arguments["A"] * torch.tensor([1e-3, 1, 30, 100], dtype=dtype)
    assert (arguments["delta"].max() * arguments["A"].min()) < -1e4
    check(arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_growing_states(dtype: torch.dtype) -> None:
    arguments = scan_arguments(1, 9, 40, 4, softplus=False, dtype=dtype)
    arguments["A"] = -arguments["A"]
    arguments["delta"] = arguments["delta"] * 4
    check(arguments)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "rtol"),
    [
        (-80, 50, torch.float64, 3e-9),  # torch's softplus is the identity above 20, where the exact one is 2e-9 more
        (-80, 50, torch.float32, 6e-6),  # the argument of an exp is rounded: 2^-24 of 80
        (-10, 50, torch.float32, 1e-6),
    ],
)
def test_softplus_is_accurate_everywhere(low: float, high: float, dtype: torch.dtype, rtol: float) -> None:
    s = torch.linspace(low, high, 1301, dtype=dtype)
    one, bias = torch.ones(s.numel(), 1, dtype=dtype), torch.full_like(s, 0.25)
    delta = (s - bias).reshape(1, -1, 1).requires_grad_()
    dt = selective_scan(torch.ones_like(delta), delta, one, one, one, delta_bias=bias, delta_softplus=True)
    (slope,) = torch.autograd.grad(dt.sum(), delta)
    exact = (delta.detach().flatten() + bias).double()
    torch.testing.assert_close(dt.double().flatten(), exact.exp().log1p(), rtol=rtol, atol=0)
    torch.testing.assert_close(slope.double().flatten(), exact.sigmoid(), rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gates_and_step_sizes_far_out(dtype: torch.dtype) -> None:
    arguments = scan_arguments(2, 9, 40, 4, dtype=dtype)
    arguments["z"] = torch.linspace(-100, 100, 40, dtype=dtype).expand(2, 9, 40)
    arguments["delta"] = (
        torch.linspace(-50, 50, 360, dtype=dtype)[torch.randperm(360)].reshape(1, 9, 40).expand(2, 9, 40)
    )
    check(arguments)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_large_and_small_inputs(scale: float) -> None:
    arguments = scan_arguments(2, 9, 40, 4, leave_out=("initial_state",))
    arguments["u"] = arguments["u"] * scale
    out, last = selective_scan(**arguments, return_last_state=True)
    want_out, want_last = oracle.selective_scan(**plain(arguments))
    assert_close("out", out, want_out, 3e-5)
    assert_close("last_state", last, want_last, 3e-5)


def test_no_decay_is_exactly_no_decay() -> None:
    u = torch.randint(-9, 9, (1, 17, 1000)).float()
    one = torch.ones(17, 1)
    out = selective_scan(u, torch.ones_like(u), 0 * one, one, one)
    assert torch.equal(out, u.cumsum(2))


@pytest.mark.parametrize("name", ["u", "delta", "B", "C", "z"])
def test_nan_goes_where_it_must_and_nowhere_else(name: str) -> None:
    arguments = scan_arguments(2, 9, 70, 4, leave_out=("seq_idx",))
    want = selective_scan(**arguments)
    arguments[name][1, 2, 35] = torch.nan
    got = selective_scan(**arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, :, :35], want[1, :, :35])
    after = got[1, 2, 35:] if name in ("u", "delta") else got[1, :, 35]
    assert after.isnan().all() if name != "z" else got[1, 2, 35].isnan()


# ---- the same bits ----


def run_all(arguments: dict[str, Any]) -> list[Tensor]:
    inputs = leaves(arguments)
    out, last = selective_scan(**arguments, return_last_state=True)
    grads = torch.autograd.grad(out.float().square().sum() + last.float().square().sum(), list(inputs.values()))
    return [out, last, *grads]


SHAPES = st.tuples(
    st.sampled_from([1, 2]), st.sampled_from([17, 64, 131]), st.sampled_from([33, 200]), st.sampled_from([5, 16])
)


@pytest.mark.native
@given(SHAPES, st.sampled_from(KINDS), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS))
def test_any_number_of_threads_gives_the_same_bits(
    shape: tuple[int, int, int, int], B: str, dtype: torch.dtype, layout: str
) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 7):
            torch.set_num_threads(count)
            results.append(run_all(scan_arguments(*shape, B=B, dtype=dtype, layouts=(layout,))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_the_memory_between_them_are_not_written(layout: str) -> None:
    arguments = scan_arguments(2, 9, 40, 4, layouts=(layout,))
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]

    def memory() -> list[bytes]:
        return [bytes(x.untyped_storage()) for x in tensors]

    before = memory()
    run_all(arguments)
    assert memory() == before


def test_the_output_shares_no_memory_with_an_input() -> None:
    arguments = scan_arguments(1, 8, 0, 4)
    u, initial = arguments["u"], arguments["initial_state"]
    for x in (arguments, scan_arguments(1, 8, 40, 4)):
        out, last = selective_scan(**x, return_last_state=True)
        assert last.data_ptr() != x["initial_state"].data_ptr()
        assert not out.numel() or out.data_ptr() != x["u"].data_ptr()
    assert torch.equal(selective_scan(**arguments, return_last_state=True)[1], initial)
    assert u.shape == (1, 8, 0)


@pytest.mark.parametrize("call", [torch.no_grad, torch.inference_mode])
def test_without_gradients(call: Callable[[], Any]) -> None:
    arguments = scan_arguments(2, 9, 40, 4)
    want = selective_scan(**arguments)
    leaves(arguments)
    with call():
        out = selective_scan(**arguments)
    assert not out.requires_grad
    assert torch.equal(out, want)


# ---- finite differences ----


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, reverse: bool) -> None:
    arguments = scan_arguments(2, 2, 5, 2, B=kind, C=kind, groups=2, dtype=torch.float64, reverse=reverse)
    inputs = leaves(arguments)

    def call(*tensors: Tensor) -> Any:
        return selective_scan(**arguments | dict(zip(inputs, tensors, strict=True)), return_last_state=True)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_a_second_derivative_is_a_clear_error() -> None:
    u = torch.randn(1, 3, 5, requires_grad=True)
    arguments = scan_arguments(1, 3, 5, 2) | {"u": u}
    (grad,) = torch.autograd.grad(selective_scan(**arguments).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()
