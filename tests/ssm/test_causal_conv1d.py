"""causal_conv1d against the numpy oracle: values, gradients, layouts, types, threads."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerzoo.ops import causal_conv1d

from . import oracle
from .inputs import LAYOUTS, conv_arguments, lay_out, leaves, plain
from .oracle import TOLERANCE, array, assert_close

OPTIONAL = ("bias", "seq_idx", "initial_states")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check(arguments: dict[str, Any]) -> None:
    """Holds outputs and every gradient to the oracle."""
    x = arguments["x"]
    inputs = leaves(arguments)
    out, final = causal_conv1d(**arguments, return_final_states=True)
    assert (out.dtype, final.dtype) == (x.dtype, x.dtype)
    assert out.stride() == torch.empty_like(x).stride()
    grad_out, grad_final = torch.randn(out.shape).to(x.dtype), torch.randn(final.shape).to(x.dtype)
    grads = torch.autograd.grad([out, final], list(inputs.values()), [grad_out, grad_final])

    values = plain(arguments)
    values["silu"] = values.pop("activation") is not None
    want_out, want_final = oracle.causal_conv1d(**values)
    tolerance = TOLERANCE[x.dtype]
    assert_close("out", out, want_out, tolerance)
    assert_close("final_states", final, want_final, tolerance)
    want = oracle.causal_conv1d_gradients(array(grad_out), array(grad_final), **values)
    for (name, leaf), grad in zip(inputs.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype, f"gradient of {name}: {grad.dtype}"
        allowed = max(TOLERANCE[torch.promote_types(x.dtype, torch.float32)], TOLERANCE[leaf.dtype])
        assert_close(f"gradient of {name}", grad, want[name], allowed)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_oracle_gradients_are_finite_differences(activation: str | None) -> None:
    values, rng = plain(conv_arguments(2, 3, 9, 4, activation=activation)), np.random.default_rng(0)
    values["silu"] = values.pop("activation") is not None
    grad_out, grad_final = rng.normal(size=(2, 3, 9)), rng.normal(size=(2, 3, 3))
    for name, grad in oracle.causal_conv1d_gradients(grad_out, grad_final, **values).items():
        direction = rng.normal(size=grad.shape)

        def loss(step: float, name: str = name, direction: Any = direction) -> float:
            out, final = oracle.causal_conv1d(**values | {name: values[name] + step * direction})
            return float((grad_out * out).sum() + (grad_final * final).sum())

        assert (grad * direction).sum() == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-7), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 40])
def test_widths(width: int, activation: str | None, dtype: torch.dtype) -> None:
    check(conv_arguments(2, 9, 71, width, activation=activation, dtype=dtype))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("leave_out", [(), *((name,) for name in OPTIONAL), OPTIONAL], ids="+".join)
def test_optional_arguments(leave_out: tuple[str, ...], width: int, reverse: bool) -> None:
    check(conv_arguments(2, 9, 41, width, leave_out=leave_out, reverse=reverse))


def test_reverse_looks_ahead() -> None:
    x, weight = torch.randn(2, 5, 9), torch.randn(5, 3)
    out, final = causal_conv1d(x, weight, reverse=True, return_final_states=True)
    ahead = torch.nn.functional.pad(x, (0, 2))
    want = sum(weight[:, k, None] * ahead[:, :, 2 - k : 11 - k] for k in range(3))
    assert_close("out", out, want, 1e-6)
    assert torch.equal(final, x[:, :, :2])


@pytest.mark.parametrize("channels", [24, 37])  # whole vectors, and not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, channels: int) -> None:
    check(conv_arguments(2, channels, 67, 4, dtype=dtype, layouts=(layout,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 1, 2, 64, 65, 130])  # blocks of 64 steps
@pytest.mark.parametrize("width", [1, 3, 4, 6])
@pytest.mark.parametrize("layout", ["channel-last", "chunk"])
@pytest.mark.parametrize("reverse", [False, True])
def test_rows(reverse: bool, layout: str, width: int, length: int, dtype: torch.dtype) -> None:
    options = {"leave_out": ("seq_idx",), "dtype": dtype, "layouts": (layout,), "reverse": reverse}
    check(conv_arguments(2, 21, length, width, **options))


def test_long_rows() -> None:
    check(conv_arguments(1, 1033, 67, 4, leave_out=("seq_idx",), layouts=("channel-last",)))


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype: torch.dtype, other: torch.dtype) -> None:
    check(conv_arguments(2, 9, 41, 4, dtype=dtype, parameters=other))


@st.composite
def any_arguments(draw: st.DrawFn) -> dict[str, Any]:
    return conv_arguments(
        draw(st.sampled_from([0, 1, 2, 2])),
        draw(st.sampled_from([1, 7, 8, 17, 64, 65, 131])),
        draw(st.sampled_from([0, 1, 2, 3, 31, 32, 33, 64, 65, 97])),
        draw(st.sampled_from([1, 2, 3, 4, 5, 37])),
        leave_out=tuple(draw(st.sets(st.sampled_from(OPTIONAL)))),
        activation=draw(st.sampled_from([None, "silu"])),
        reverse=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        layouts=tuple(draw(st.permutations(LAYOUTS))),
        seed=draw(st.integers(0, 99)),
    )


@given(any_arguments())
def test_any_arguments(arguments: dict[str, Any]) -> None:
    check(arguments)


def test_packed_sequences_equal_separate_ones() -> None:
    arguments = conv_arguments(1, 5, 70, 4, leave_out=("initial_states",))
    marks = torch.tensor([[-1] * 3 + [0] * 30 + [-1] * 2 + [4] * 1 + [5] * 30 + [-1] * 4])
    out = causal_conv1d(**arguments | {"seq_idx": marks})
    for mark in (0, 4, 5):
        where = marks[0] == mark
        alone = causal_conv1d(**arguments | {"x": arguments["x"][..., where], "seq_idx": None})
        assert_close(f"sequence {mark}", out[..., where], alone, 1e-6)
    assert not out[..., marks[0] < 0].any()


def test_final_states_go_on_where_the_first_half_ended() -> None:
    arguments = conv_arguments(2, 5, 40, 4, leave_out=("seq_idx",))
    whole, final = causal_conv1d(**arguments, return_final_states=True)
    x = arguments.pop("x")
    for at in (0, 1, 2, 3, 17, 40):
        first, state = causal_conv1d(x[..., :at], **arguments, return_final_states=True)
        second, end = causal_conv1d(x[..., at:], **arguments | {"initial_states": state}, return_final_states=True)
        assert_close("out", torch.cat([first, second], 2), whole, 1e-6)
        assert torch.equal(end, final)


def test_what_stands_in_padding_does_not_matter() -> None:
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        arguments = conv_arguments(2, 9, 40, 4)
        padding = (arguments["seq_idx"] < 0).unsqueeze(1)
        arguments["x"] = arguments["x"].masked_fill(padding, garbage)
        inputs = leaves(arguments)
        out = causal_conv1d(**arguments)
        grads = torch.autograd.grad(out, list(inputs.values()), torch.ones_like(out).masked_fill(padding, garbage))
        results.append({"out": out} | dict(zip(inputs, grads, strict=True)))
    for other in results[1:]:
        for name, x in results[0].items():
            assert_close(name, other[name], x, 1e-6)


def test_only_the_gradient_of_final_states() -> None:
    arguments = conv_arguments(2, 9, 2, 4)
    inputs = leaves(arguments)
    final = causal_conv1d(**arguments, return_final_states=True)[1]
    grads = dict(zip(inputs, torch.autograd.grad(final.sum(), list(inputs.values())), strict=True))
    assert not grads["weight"].any()
    assert not grads["bias"].any()
    assert torch.equal(grads["x"], torch.ones(2, 9, 2))
    assert torch.equal(grads["initial_states"], torch.tensor([0.0, 0.0, 1.0]).expand(2, 9, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expanded_or_strided_grad_out(layout: str) -> None:
    arguments = conv_arguments(2, 9, 40, 4, layouts=(layout,))
    inputs = leaves(arguments)
    out = causal_conv1d(**arguments)
    want = torch.autograd.grad(out, list(inputs.values()), torch.full_like(out, 0.5), retain_graph=True)
    for other in (lay_out(torch.full_like(out, 0.5), layout), torch.tensor(0.5).expand(out.shape)):
        got = torch.autograd.grad(out, list(inputs.values()), other, retain_graph=True)
        for name, one, two in zip(inputs, got, want, strict=True):
            assert_close(name, one, two, 1e-6)


def test_the_activation_far_out() -> None:
    arguments = conv_arguments(2, 9, 40, 4)
    arguments["x"] = arguments["x"] * 100
    check(arguments)


def run_all(arguments: dict[str, Any]) -> list[Tensor]:
    inputs = leaves(arguments)
    out, final = causal_conv1d(**arguments, return_final_states=True)
    grads = torch.autograd.grad(out.float().square().sum() + final.float().square().sum(), list(inputs.values()))
    return [out, final, *grads]


@pytest.mark.native
@given(st.sampled_from([17, 64, 131]), st.sampled_from([33, 1000]), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS))
def test_any_number_of_threads_gives_the_same_bits(channels: int, length: int, dtype: torch.dtype, layout: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 7):
            torch.set_num_threads(count)
            results.append(run_all(conv_arguments(2, channels, length, 4, dtype=dtype, layouts=(layout,))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_the_memory_between_them_are_not_written(layout: str) -> None:
    arguments = conv_arguments(2, 9, 40, 4, layouts=(layout,))
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]
    before = [bytes(x.untyped_storage()) for x in tensors]
    run_all(arguments)
    assert [bytes(x.untyped_storage()) for x in tensors] == before


def test_gradcheck() -> None:
    for activation in (None, "silu"):
        arguments = conv_arguments(2, 2, 6, 3, dtype=torch.float64, activation=activation)
        inputs = leaves(arguments)

        def call(*tensors: Tensor, arguments: Any = arguments, inputs: Any = inputs) -> Any:
            return causal_conv1d(**arguments | dict(zip(inputs, tensors, strict=True)), return_final_states=True)

        assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_a_second_derivative_is_a_clear_error() -> None:
    arguments = conv_arguments(1, 3, 5, 2)
    x = arguments["x"].requires_grad_()
    (grad,) = torch.autograd.grad(causal_conv1d(**arguments).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()
