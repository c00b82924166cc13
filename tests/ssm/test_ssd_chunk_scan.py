"""ssd_chunk_scan against the numpy oracle: values, gradients, layouts, types, threads."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerzoo import _native, reference
from layerzoo.ops import selective_scan, ssd_chunk_scan
from layerzoo.reference.ssm import CHUNK

from . import oracle
from .inputs import LAYOUTS, lay_out, leaves, plain, ssd_arguments
from .oracle import TOLERANCE, array, assert_close

OPTIONAL = ("D", "z", "dt_bias", "initial_states", "seq_idx")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
POSITIONS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states", "seq_idx", "dt_softplus")


def scan(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return ssd_chunk_scan(**arguments, chunk_size=256, return_final_states=True)


def positions(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """For torch.ops.layerzoo.ssd_chunk_scan and the reference."""
    return (*(arguments.get(name) for name in POSITIONS), *arguments["dt_limit"])


def check(arguments: dict[str, Any]) -> None:
    """Holds outputs and every gradient to the oracle."""
    x = arguments["x"]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = leaves(arguments)
    out, final = scan(arguments)
    assert (out.dtype, final.dtype) == (x.dtype, wide)
    assert out.stride() == torch.empty_like(x).stride()
    grad_out, grad_final = torch.randn(out.shape).to(out.dtype), torch.randn(final.shape).to(wide)
    grads = torch.autograd.grad([out, final], list(inputs.values()), [grad_out, grad_final])

    values = plain(arguments)
    want_out, want_final = oracle.ssd_chunk_scan(**values)
    assert_close("out", out, want_out, TOLERANCE[x.dtype])
    assert_close("final_states", final, want_final, TOLERANCE[wide])
    want = oracle.ssd_chunk_scan_gradients(array(grad_out), array(grad_final), **values)
    for (name, value), grad in zip(inputs.items(), grads, strict=True):
        assert grad.dtype == value.dtype, f"gradient of {name}: {grad.dtype}"
        assert_close(f"gradient of {name}", grad, want[name], max(TOLERANCE[wide], TOLERANCE[value.dtype]))


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.2, 0.7)])
@pytest.mark.parametrize("softplus", [True, False])
def test_oracle_gradients_are_complex_step_derivatives(softplus: bool, limit: tuple[float, float]) -> None:
    arguments = ssd_arguments(2, 7, 4, 3, 2, groups=2, wide_D=True, softplus=softplus, limit=limit)
    values, rng = plain(arguments), np.random.default_rng(0)
    grad_out, grad_final = rng.normal(size=(2, 7, 4, 3)), rng.normal(size=(2, 4, 3, 2))
    grads = oracle.ssd_chunk_scan_gradients(grad_out, grad_final, **values)
    for name, grad in grads.items():
        direction = rng.normal(size=grad.shape)
        out, final = oracle.ssd_chunk_scan(**values | {name: values[name] + 1e-30j * direction})
        want = ((grad_out * out).sum() + (grad_final * final).sum()).imag / 1e-30
        assert (grad * direction).sum() == pytest.approx(want, rel=1e-11), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide_D", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups(groups: int, wide_D: bool, dtype: torch.dtype) -> None:
    check(ssd_arguments(2, 77, 4, 6, 5, groups=groups, wide_D=wide_D, dtype=dtype))


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize(
    "leave_out", [(), *((name,) for name in OPTIONAL), OPTIONAL], ids=lambda names: "+".join(names)
)
def test_optional_arguments(leave_out: tuple[str, ...], softplus: bool) -> None:
    check(ssd_arguments(2, 141, 2, 5, 6, leave_out=leave_out, softplus=softplus))


@pytest.mark.parametrize("width", [32, 13])  # whole vectors, and not
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, width: int) -> None:
    check(ssd_arguments(2, 67, 2, width, 4, dtype=dtype, layouts=(layout,)))


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 2, 3, 1), (3, 2, 1, 0)], ids=str)
def test_orders_of_the_dimensions_in_memory(order: tuple[int, ...]) -> None:
    arguments = ssd_arguments(2, 67, 3, 9, 4)
    back = [order.index(i) for i in range(4)]
    for name in ("x", "z", "B", "C"):
        arguments[name] = arguments[name].permute(order).contiguous().permute(back)
    check(arguments)


def test_views_of_one_projection() -> None:
    """As Mamba-2 calls it: x, B, C and dt are columns of one tensor."""
    arguments = ssd_arguments(2, 70, 4, 16, 8, leave_out=("seq_idx", "initial_states", "z"))
    sizes = (64, 8, 8, 4)
    whole = torch.randn(2, 70, sum(sizes))
    x, B, C, dt = whole.split(sizes, 2)
    check(arguments | {"x": x.unflatten(2, (4, 16)), "B": B.unsqueeze(2), "C": C.unsqueeze(2), "dt": dt})


@pytest.mark.parametrize("wide", DTYPES, ids=str)
@pytest.mark.parametrize("narrow", DTYPES, ids=str)
def test_mixed_dtypes(wide: torch.dtype, narrow: torch.dtype) -> None:
    arguments = ssd_arguments(1, 35, 2, 11, 3, dtype=wide, parameters=narrow)
    for name in ("dt", "z", "C"):
        arguments[name] = arguments[name].to(narrow)
    check(arguments)


def test_the_shape_of_mamba2() -> None:
    check(ssd_arguments(1, 150, 2, 64, 128, leave_out=("seq_idx", "z")))


@pytest.mark.parametrize("heads", [7, 40])  # one unit of heads, and several
def test_many_heads(heads: int) -> None:
    check(ssd_arguments(1, 70, heads, 3, 4))


@st.composite
def any_arguments(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2, 3]))
    softplus = draw(st.booleans())
    return ssd_arguments(
        draw(st.sampled_from([0, 1, 2, 2])),
        draw(st.sampled_from([0, 1, 2, 5, 31, 63, 64, 65, 97, 129])),
        groups * draw(st.sampled_from([1, 2, 5])),
        draw(st.sampled_from([1, 2, 7, 8, 15, 16, 17, 33])),
        draw(st.sampled_from([1, 2, 3, 5, 6, 7, 8, 16, 17, 19])),
        groups=groups,
        wide_D=draw(st.booleans()),
        leave_out=tuple(draw(st.sets(st.sampled_from(OPTIONAL)))),
        softplus=softplus,
        limit=draw(st.sampled_from([(0.0, math.inf), (0.1, math.inf), (0.2, 0.8)])),
        dtype=draw(st.sampled_from(DTYPES)) if softplus else torch.float32,  # else 16 bits tie with the bounds
        layouts=tuple(draw(st.permutations(LAYOUTS))),
        seed=draw(st.integers(0, 99)),
    )


@given(any_arguments())
def test_any_arguments(arguments: dict[str, Any]) -> None:
    check(arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fallback(dtype: torch.dtype) -> None:
    """The reference, its written-out backward too, against the kernels' oracle."""
    arguments = ssd_arguments(2, 70, 4, 3, 5, groups=2, limit=(0.3, 0.9), dtype=dtype)
    out, final, states = reference.ssm.ssd_chunk_scan(*positions(arguments))
    grad_out, grad_final = torch.randn(out.shape).to(dtype), torch.randn(final.shape).to(final.dtype)
    grads = reference.ssm.ssd_chunk_scan_backward(grad_out, grad_final, *positions(arguments))
    values = plain(arguments)
    want_out, want_final = oracle.ssd_chunk_scan(**values)
    assert_close("out", out, want_out, TOLERANCE[dtype])
    assert_close("final_states", final, want_final, TOLERANCE[final.dtype])
    assert states.shape == (2, 2, 4, 5, 3)
    want = oracle.ssd_chunk_scan_gradients(array(grad_out), array(grad_final), **values)
    for name, grad in zip(POSITIONS[:9], grads, strict=True):
        assert grad is not None
        assert_close(f"gradient of {name}", grad, want[name], max(TOLERANCE[final.dtype], TOLERANCE[grad.dtype]))


def test_it_is_a_selective_scan_with_one_decay_a_head() -> None:
    arguments = ssd_arguments(2, 150, 3, 16, 8, leave_out=("seq_idx", "D", "z", "dt_bias", "initial_states"))
    x, dt, A, B, C = (arguments[name] for name in ("x", "dt", "A", "B", "C"))
    out, final = scan(arguments)
    want, last = selective_scan(
        x.flatten(2).mT,
        dt.repeat_interleave(16, 2).mT,
        A.repeat_interleave(16)[:, None].expand(48, 8),
        B[:, :, 0].mT,
        C[:, :, 0].mT,
        delta_softplus=True,
        return_last_state=True,
    )
    assert_close("out", out.flatten(2).mT, want, 1e-6)
    assert_close("final_states", final.flatten(1, 2), last, 1e-6)


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 4096])
def test_chunk_size_does_not_matter(chunk_size: int) -> None:
    arguments = ssd_arguments(1, 70, 2, 5, 4)
    assert torch.equal(ssd_chunk_scan(**arguments, chunk_size=chunk_size), scan(arguments)[0])


@pytest.mark.parametrize("cut", [64, 128, 3, 100])
def test_the_rest_goes_on_from_the_final_states(cut: int) -> None:
    arguments = ssd_arguments(2, 200, 2, 17, 9, leave_out=("seq_idx",))
    along = ("x", "dt", "B", "C", "z")
    whole, last = scan(arguments)
    first, state = scan({name: x[:, :cut] if name in along else x for name, x in arguments.items()})
    rest = {name: x[:, cut:] if name in along else x for name, x in arguments.items()}
    second, final = scan(rest | {"initial_states": state})
    assert_close("out", torch.cat([first, second], 1), whole, 1e-6)
    assert_close("final_states", final, last, 1e-6)


# ---- packed sequences ----


@pytest.mark.parametrize("ids", ["int32", "int64"])
def test_packed_sequences_equal_separate_ones(ids: str) -> None:
    arguments = ssd_arguments(1, 140, 3, 5, 4, leave_out=("initial_states",))
    marks = [-1] * 3 + [0] * 30 + [-1] * 2 + [4] * 1 + [5] * 30 + [-1] * 4 + [7] * 70
    arguments["seq_idx"] = torch.tensor([marks], dtype=getattr(torch, ids))
    out, final = scan(arguments)
    along = ("x", "dt", "B", "C", "z")
    for mark in (0, 4, 5, 7):
        where = arguments["seq_idx"][0] == mark
        alone = {name: x[:, where] if name in along else x for name, x in arguments.items() if name != "seq_idx"}
        separate, state = scan(alone)
        assert_close(f"sequence {mark}", out[:, where], separate, 1e-6)
        if mark == 7:
            assert_close("final_states", final, state, 1e-6)
    assert not out[:, arguments["seq_idx"][0] < 0].any()


@pytest.mark.parametrize("at", [0, 63, 64, 65, 128])
def test_a_sequence_that_begins_where_a_chunk_may(at: int) -> None:
    arguments = ssd_arguments(1, 150, 2, 5, 4)
    arguments["seq_idx"] = (torch.arange(150) >= at).long()[None]
    check(arguments)


def test_many_short_sequences() -> None:
    arguments = ssd_arguments(2, 150, 2, 5, 4)
    arguments["seq_idx"] = (torch.arange(150) // 3).expand(2, 150)
    check(arguments)


def test_what_stands_in_padding_does_not_matter() -> None:
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        arguments = ssd_arguments(2, 90, 3, 5, 4)
        padding = arguments["seq_idx"] < 0
        assert padding.any()
        for name in ("x", "dt", "z", "B", "C"):
            value = arguments[name]
            arguments[name] = value.masked_fill(padding.reshape(2, 90, *[1] * (value.dim() - 2)), garbage)
        inputs = leaves(arguments)
        out, final = scan(arguments)
        grad_out = torch.ones_like(out).masked_fill(padding[:, :, None, None], garbage)
        grads = torch.autograd.grad([out, final], list(inputs.values()), [grad_out, torch.ones_like(final)])
        results.append({"out": out, "final_states": final} | dict(zip(inputs, grads, strict=True)))
    for other in results[1:]:
        for name, x in results[0].items():
            assert_close(name, other[name], x, 1e-6)


# ---- gradients ----


def test_only_the_gradient_of_the_final_states() -> None:
    arguments = ssd_arguments(2, 70, 3, 5, 4)
    inputs = leaves(arguments)
    _, final = scan(arguments)
    grads = torch.autograd.grad(final, list(inputs.values()), torch.ones_like(final))
    want = oracle.ssd_chunk_scan_gradients(np.zeros((2, 70, 3, 5)), np.ones((2, 3, 5, 4)), **plain(arguments))
    for name, grad in zip(inputs, grads, strict=True):
        assert_close(f"gradient of {name}", grad, want[name], 3e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expanded_or_strided_grad_out(layout: str) -> None:
    arguments = ssd_arguments(2, 70, 3, 5, 4, layouts=(layout,))
    inputs = leaves(arguments)
    out = ssd_chunk_scan(**arguments, chunk_size=64)
    grad = lay_out(torch.full_like(out, 0.5), layout)
    want = torch.autograd.grad(out, list(inputs.values()), torch.full_like(out, 0.5), retain_graph=True)
    for other in (grad, torch.tensor(0.5).expand(out.shape)):
        got = torch.autograd.grad(out, list(inputs.values()), other, retain_graph=True)
        for name, one, two in zip(inputs, got, want, strict=True):
            assert_close(name, one, two, 1e-6)


def test_expanded_inputs() -> None:
    arguments = ssd_arguments(2, 70, 3, 5, 4, wide_D=True, leave_out=("seq_idx",))
    for name in ("x", "dt", "z", "B", "C", "initial_states", "A", "D", "dt_bias"):
        arguments[name] = arguments[name][:1].expand(arguments[name].shape)
    check(arguments)


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states"])
def test_one_gradient_alone_equals_that_of_all(name: str) -> None:
    arguments = ssd_arguments(2, 70, 3, 5, 4)
    one = arguments[name].clone().requires_grad_()
    (alone,) = torch.autograd.grad(scan(arguments | {name: one})[0].square().sum(), one)
    inputs = leaves(arguments)
    (among_all,) = torch.autograd.grad(scan(arguments)[0].square().sum(), inputs[name])
    assert torch.equal(alone, among_all)


def test_the_op_without_kept_states_has_the_same_gradients() -> None:
    arguments = ssd_arguments(2, 70, 3, 5, 4)
    inputs = leaves(arguments)
    outs = [torch.ops.layerzoo.ssd_chunk_scan(*positions(arguments), chunk)[0] for chunk in (0, CHUNK)]
    first, second = (torch.autograd.grad(out.square().sum(), list(inputs.values())) for out in outs)
    for name, one, two in zip(inputs, first, second, strict=True):
        assert torch.equal(one, two), name


@pytest.mark.parametrize("softplus", [False, True])
def test_gradcheck(softplus: bool) -> None:
    arguments = ssd_arguments(2, 5, 2, 2, 2, groups=2, softplus=softplus, limit=(0.01, 2.0), dtype=torch.float64)
    inputs = leaves(arguments)

    def call(*tensors: Tensor) -> Any:
        return scan(arguments | dict(zip(inputs, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_a_second_derivative_is_a_clear_error() -> None:
    x = torch.randn(1, 5, 2, 3, requires_grad=True)
    out, _ = scan(ssd_arguments(1, 5, 2, 3, 2) | {"x": x})
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


# ---- values at the edge ----


def test_bounds_of_dt() -> None:
    arguments = ssd_arguments(1, 40, 1, 1, 1, leave_out=OPTIONAL, softplus=False, limit=(0.2, 0.5))
    arguments["dt"] = torch.linspace(-1, 1, 40).reshape(1, 40, 1).requires_grad_()
    ones = torch.ones(1, 40, 1, 1)
    out, final = scan(arguments | {"A": torch.zeros(1), "x": ones, "B": ones, "C": ones})
    want = arguments["dt"].detach().clamp(0.2, 0.5)
    torch.testing.assert_close(out.flatten(), want.flatten().cumsum(0))
    (grad,) = torch.autograd.grad(final.sum(), arguments["dt"])
    assert torch.equal(grad, (want == arguments["dt"]).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_decays_down_to_e_to_the_minus_ten_thousand(dtype: torch.dtype, turned: bool) -> None:
    """Beside one that leaves nothing of the state, differences of small exponents must keep their digits."""
    arguments = ssd_arguments(1, 150, 3, 9, 4, leave_out=("seq_idx",), softplus=False, dtype=dtype)
    scale = torch.logspace(-3, 2.3, 150, dtype=dtype)[torch.randperm(150) if turned else slice(None)]
    arguments["dt"] = (arguments["dt"] + 0.1) * scale[:, None]
    arguments["A"] = torch.tensor([-1, -30, -100], dtype=dtype)
    assert (arguments["dt"].max() * arguments["A"].min()) < -1e4
    check(arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_growing_states(dtype: torch.dtype) -> None:
    arguments = ssd_arguments(1, 40, 2, 9, 4, softplus=False, dtype=dtype)
    check(arguments | {"A": -arguments["A"], "dt": arguments["dt"] * 4})


def test_minus_infinity_in_A_forgets_everything() -> None:
    arguments = ssd_arguments(1, 150, 2, 5, 4)
    want, _ = scan(arguments | {"A": torch.full((2,), -1e30)})
    got, _ = scan(arguments | {"A": torch.full((2,), -math.inf)})
    assert torch.equal(got, want)


def test_no_decay_is_exactly_no_decay() -> None:
    x = torch.randint(-9, 9, (1, 1000, 2, 17)).float()
    one = torch.ones(1, 1000, 1, 1)
    out = ssd_chunk_scan(x, torch.ones(1, 1000, 2), torch.zeros(2), one, one, 64)
    assert torch.equal(out, x.cumsum(1))


@pytest.mark.native
def test_a_long_memory() -> None:
    arguments = ssd_arguments(1, 20000, 1, 8, 2, leave_out=OPTIONAL, softplus=False)
    arguments["dt"] = torch.full((1, 20000, 1), 1e-3)
    out, final = scan(arguments)
    want_out, want_final = oracle.ssd_chunk_scan(**plain(arguments))
    assert_close("out", out, want_out, 1e-5)
    assert_close("final_states", final, want_final, 1e-5)


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
def test_nan_goes_where_it_must_and_nowhere_else(name: str) -> None:
    arguments = ssd_arguments(2, 140, 2, 19, 4, leave_out=("seq_idx",))
    want, _ = scan(arguments)
    arguments[name][1, 35, 0, ...] = torch.nan
    if name in ("x", "z"):
        arguments[name][1, 35, 0, 1:] = 0
        want, _ = scan(arguments | {name: arguments[name].nan_to_num(0)})
    got, _ = scan(arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1, :35], want[1, :35])
    if name in ("x", "dt", "z"):
        assert torch.equal(got[1, :, 1], want[1, :, 1])  # the other head
    if name in ("x", "z"):
        assert torch.equal(got[1, :, 0, 1:], want[1, :, 0, 1:])  # the other channels
    after = {"x": got[1, 35:, 0, 0], "dt": got[1, 35:, 0], "B": got[1, 35:], "C": got[1, 35], "z": got[1, 35, 0, 0]}
    assert after[name].isnan().all()
    if name in ("C", "z"):
        assert torch.equal(got[1, 36:], want[1, 36:])


def test_nan_stays_in_its_sequence() -> None:
    arguments = ssd_arguments(1, 60, 2, 19, 4)
    arguments["seq_idx"] = (torch.arange(60) >= 30).long()[None]
    want, final = scan(arguments)
    arguments["x"][0, 20] = arguments["B"][0, 21] = arguments["dt"][0, 22] = torch.nan
    got, last = scan(arguments)
    assert torch.equal(got[:, 30:], want[:, 30:])
    assert torch.equal(last, final)


# ---- the same bits ----


def run_all(arguments: dict[str, Any]) -> list[Tensor]:
    inputs = leaves(arguments)
    out, final = scan(arguments)
    grads = torch.autograd.grad(out.float().square().sum() + final.float().square().sum(), list(inputs.values()))
    return [out, final, *grads]


SHAPES = st.tuples(
    st.sampled_from([1, 2]),
    st.sampled_from([33, 300]),
    st.sampled_from([4, 12]),
    st.sampled_from([5, 16]),
    st.sampled_from([3, 16]),
)


@pytest.mark.native
@given(SHAPES, st.sampled_from([1, 2]), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS))
def test_any_number_of_threads_gives_the_same_bits(
    shape: tuple[int, int, int, int, int], groups: int, dtype: torch.dtype, layout: str
) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7, 7):
            torch.set_num_threads(count)
            results.append(run_all(ssd_arguments(*shape, groups=groups, dtype=dtype, layouts=(layout,))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_the_memory_between_them_are_not_written(layout: str) -> None:
    arguments = ssd_arguments(2, 70, 3, 5, 4, layouts=(layout,))
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]

    def memory() -> list[bytes]:
        return [bytes(x.untyped_storage()) for x in tensors]

    before = memory()
    run_all(arguments)
    assert memory() == before


def test_no_steps_give_the_initial_states() -> None:
    arguments = ssd_arguments(2, 0, 3, 5, 4)
    out, final = scan(arguments)
    assert out.shape == (2, 0, 3, 5)
    assert torch.equal(final, arguments["initial_states"])
    assert final.data_ptr() != arguments["initial_states"].data_ptr()


@pytest.mark.parametrize("call", [torch.no_grad, torch.inference_mode])
def test_without_gradients(call: Callable[[], Any]) -> None:
    arguments = ssd_arguments(2, 70, 3, 5, 4)
    want, _ = scan(arguments)
    leaves(arguments)
    with call():
        out, _ = scan(arguments)
    assert not out.requires_grad
    assert torch.equal(out, want)


# ---- contracts ----


def op_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    full = ssd_arguments(2, 70, 4, 3, 5, groups=2, wide_D=True, layouts=("channel-last", "chunk"))
    bare = ssd_arguments(2, 5, 4, 3, 5, leave_out=OPTIONAL, dtype=torch.bfloat16)
    empty = ssd_arguments(2, 0, 4, 3, 5, layouts=("channel-last",))
    trained = {name: dict(arguments) for name, arguments in (("full", full), ("bare", bare))}
    for arguments in trained.values():
        for name, x in arguments.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                arguments[name] = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    def backward(arguments: dict[str, Any], grad_final: Tensor | None) -> tuple[Any, ...]:
        inputs = positions(arguments)
        states = torch.ops.layerzoo.ssd_chunk_scan(*inputs, CHUNK)[2]
        return (torch.randn_like(arguments["x"]), grad_final, *inputs, states)

    return {
        "full": ("ssd_chunk_scan", (*positions(trained["full"]), CHUNK)),
        "bare": ("ssd_chunk_scan", (*positions(trained["bare"]), CHUNK)),
        "inference": ("ssd_chunk_scan", (*positions(full), 0)),
        "empty": ("ssd_chunk_scan", (*positions(empty), CHUNK)),
        "backward": ("ssd_chunk_scan_backward", backward(full, torch.randn(2, 4, 3, 5))),
        "backward_bare": ("ssd_chunk_scan_backward", backward(bare, None)),
        "backward_empty": ("ssd_chunk_scan_backward", backward(empty, torch.ones(2, 4, 3, 5))),
    }


@pytest.mark.parametrize("case", list(op_calls()))
def test_opcheck(case: str) -> None:
    name, arguments = op_calls()[case]
    torch.library.opcheck(getattr(torch.ops.layerzoo, name).default, arguments)


@pytest.mark.slow
def test_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for length in (65, 97, 200):
        wants = ssd_arguments(2, length, 2, 5, 4)
        gots = ssd_arguments(2, length, 2, 5, 4)
        for one, two in zip(
            *(
                [*call(x), *torch.autograd.grad([y.sum() for y in call(x)], list(leaves(x).values()))]
                for call, x in ((compiled, gots), (scan, wants))
                if leaves(x)
            ),
            strict=True,
        ):
            assert torch.equal(one, two)
            assert one.stride() == two.stride()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_sequences_and_leaves_step_sizes_parameters_and_states(dtype: torch.dtype) -> None:
    arguments = ssd_arguments(2, 37, 2, 5, 4)
    want = scan(arguments | {name: arguments[name].to(dtype) for name in ("x", "B", "C", "z")})
    inputs = leaves(arguments)
    with torch.autocast("cpu", dtype):
        got = scan(arguments)
    assert [x.dtype for x in got] == [dtype, torch.float32]
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)
    grads = torch.autograd.grad([x.float().sum() for x in got], list(inputs.values()))
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.native
def test_the_call_counters_rise() -> None:
    names = ("ssd_chunk_scan", "ssd_chunk_scan_backward", "selective_scan")
    before = [_native.calls(name) for name in names]
    run_all(ssd_arguments(2, 6, 2, 5, 4))
    assert [_native.calls(name) for name in names] == [before[0] + 1, before[1] + 1, before[2]]


meta = {"device": "meta"}
BAD: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"x": [1.0]}, TypeError, ("x must be a tensor", "got list")),
    ({"x": torch.ones(2, 6, 4)}, ValueError, ("x must have shape (batch, length, heads, width)", "(2, 6, 4)")),
    ({"x": torch.ones(2, 6, 4, 3).long()}, TypeError, ("x must have dtype float32", "got int64")),
    ({"x": torch.ones(2, 6, 0, 3)}, ValueError, ("x must have at least one head", "got 0")),
    ({"x": torch.ones(2, 6, 4, 0)}, ValueError, ("x must have at least one channel of a head", "got 0")),
    ({"dt": torch.ones(2, 6, 5)}, ValueError, ("dt", "(batch, length, heads) = (2, 6, 4)", "got (2, 6, 5)")),
    ({"dt": None}, TypeError, ("dt must be a tensor", "got NoneType")),
    ({"dt": torch.ones(2, 6, 4, **meta)}, ValueError, ("dt must be on cpu", "got meta")),
    ({"A": torch.ones(4, 3)}, ValueError, ("A", "(heads,) = (4,)", "got (4, 3)")),
    ({"A": torch.ones(4).cfloat()}, TypeError, ("A must have dtype float32", "got complex64")),
    ({"B": torch.ones(2, 6, 5)}, ValueError, ("B must have shape (batch, length, groups, state)", "got (2, 6, 5)")),
    ({"B": torch.ones(2, 6, 2, 0)}, ValueError, ("B must have at least one state", "got 0")),
    ({"B": torch.ones(2, 7, 2, 5)}, ValueError, ("B", "= (2, 6, 2, 5)", "got (2, 7, 2, 5)")),
    ({"B": torch.ones(2, 6, 3, 5), "C": torch.ones(2, 6, 3, 5)}, ValueError, ("B has 3 groups", "the 4 heads")),
    ({"B": torch.ones(2, 6, 0, 5), "C": torch.ones(2, 6, 0, 5)}, ValueError, ("B has 0 groups", "the 4 heads")),
    ({"C": torch.ones(2, 6, 1, 5)}, ValueError, ("C", "= (2, 6, 2, 5)", "got (2, 6, 1, 5)")),
    ({"C": torch.ones(2, 6, 2, 5).bool()}, TypeError, ("C must have dtype", "got bool")),
    ({"D": torch.ones(5)}, ValueError, ("D", "(heads,) = (4,)", "got (5,)")),
    ({"D": torch.ones(4, 2)}, ValueError, ("D", "(heads, width) = (4, 3)", "got (4, 2)")),
    ({"D": torch.ones(4, 3, 1)}, ValueError, ("D must have shape (heads) or (heads, width)", "got (4, 3, 1)")),
    ({"D": 1.0}, TypeError, ("D must be a tensor", "got float")),
    ({"z": torch.ones(2, 6, 4)}, ValueError, ("z", "(2, 6, 4, 3)", "got (2, 6, 4)")),
    ({"dt_bias": torch.ones(1, 4)}, ValueError, ("dt_bias", "(4,)", "got (1, 4)")),
    ({"initial_states": torch.ones(2, 4, 5, 3)}, ValueError, ("initial_states", "(2, 4, 3, 5)", "got (2, 4, 5, 3)")),
    ({"seq_idx": torch.zeros(6).int()}, ValueError, ("seq_idx", "(batch, length) = (2, 6)", "got (6,)")),
    ({"seq_idx": torch.zeros(2, 6)}, TypeError, ("seq_idx must have dtype int32, int64", "got float32")),
    ({"chunk_size": 0}, ValueError, ("chunk_size must be a positive integer", "got 0")),
    ({"chunk_size": 64.0}, ValueError, ("chunk_size must be a positive integer", "got 64.0")),
    ({"dt_limit": (1.0, 0.5)}, ValueError, ("dt_limit must be (low, high) with low <= high", "got (1.0, 0.5)")),
    ({"dt_limit": (math.nan, 1.0)}, ValueError, ("dt_limit must be (low, high)", "got (nan, 1.0)")),
]


@pytest.mark.parametrize("row", BAD, ids=lambda row: "-".join(row[0]))
def test_bad_input(row: tuple[dict[str, Any], type[Exception], tuple[str, ...]]) -> None:
    change, error, words = row
    with pytest.raises(error) as caught:
        ssd_chunk_scan(**ssd_arguments(2, 6, 4, 3, 5, groups=2) | {"chunk_size": 64} | change)
    message = str(caught.value)
    assert message.startswith("ssd_chunk_scan: ")
    assert all(word in message for word in words), message


def test_bad_values_are_seen_by_the_kernel_and_by_the_reference() -> None:
    arguments = ssd_arguments(2, 4, 2, 3, 5)
    nan = arguments | {"A": torch.tensor([-1.0, torch.nan])}
    back = arguments | {"seq_idx": torch.tensor([[0, 0, 0, 0], [2, -1, 1, 3]])}
    for values, words in ((nan, "A must not contain NaN"), (back, r"seq_idx\[1, 2\] = 1 follows 2")):
        for call in (scan, lambda x: reference.ssm.ssd_chunk_scan(*positions(x))):
            with pytest.raises(RuntimeError, match=f"ssd_chunk_scan: .*{words}"):
                call(values)
