"""moe_experts and moe_experts_ragged against the numpy oracle: values, gradients, layouts, types, the same bits."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ssm.inputs import leaves, plain
from ssm.oracle import array, assert_close
from torch import Tensor
from torch.nn import functional as F

from layerzoo.ops import moe_experts, moe_experts_ragged

from . import oracle
from .inputs import GATES, LAYOUTS, ROUTINGS, expert_arguments
from .oracle import TOLERANCE

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NARROW = DTYPES[1:]


def run(arguments: dict[str, Any]) -> Tensor:
    return (moe_experts_ragged if "offsets" in arguments else moe_experts)(**arguments)


def check(arguments: dict[str, Any]) -> None:
    """Holds the output and every gradient to the oracle."""
    x = arguments["x"]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    inputs = leaves(arguments)
    out = run(arguments)
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    grad_out = torch.randn(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, list(inputs.values()), grad_out)
    parts = oracle.taken_apart(plain(arguments))
    assert_close("out", out, oracle.forward(*parts), TOLERANCE[x.dtype])
    want = oracle.gradients(array(grad_out), *parts)
    for (name, leaf), grad in zip(inputs.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype, f"gradient of {name}: {grad.dtype}"
        assert_close(f"gradient of {name}", grad, want[name], max(TOLERANCE[wide], TOLERANCE[leaf.dtype]))


# ---- the oracle ----


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gate", list(GATES))
def test_oracle_gradients_are_complex_step_derivatives(gate: str, interleaved: bool) -> None:
    arguments = plain(
        expert_arguments(6, 5, 7, 4, 2, gate=gate, interleaved=interleaved, transposed=interleaved, dtype=torch.float64)
    )
    rng = np.random.default_rng(0)
    grad_out = rng.normal(size=(6, 5))
    for name, grad in oracle.gradients(grad_out, *oracle.taken_apart(arguments)).items():
        direction = rng.normal(size=grad.shape)
        moved = arguments | {name: arguments[name] + 1e-30j * direction}
        want = (grad_out * oracle.forward(*oracle.taken_apart(moved))).sum().imag / 1e-30
        assert (grad * direction).sum() == pytest.approx(want, rel=1e-11), name


# ---- values and gradients ----


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", list(GATES))
def test_gates_and_orders_of_the_matrices(gate: str, transposed: bool) -> None:
    for interleaved in (False, True) if GATES[gate].get("gated", True) else (False,):
        for dtype in (torch.float64, torch.float32):
            order = {"transposed": transposed, "interleaved": interleaved}
            check(expert_arguments(23, 19, 13, 3, 2, gate=gate, dtype=dtype, **order))


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routing(dtype: torch.dtype, routing: str, ragged: bool) -> None:
    check(expert_arguments(32, 24, 17, 7, 3, routing=routing, dtype=dtype, ragged=ragged))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, layout: str, transposed: bool) -> None:
    check(expert_arguments(9, 21, 18, 4, 2, dtype=dtype, layouts=(layout,), transposed=transposed))


@pytest.mark.parametrize("transposed", [False, True])
def test_one_matrix_for_all_experts(transposed: bool) -> None:
    arguments = expert_arguments(9, 16, 8, 4, 2, transposed=transposed)
    for name in ("w13", "w2", "b13", "b2"):
        arguments[name] = arguments[name][:1].expand_as(arguments[name])
    check(arguments)


@pytest.mark.parametrize("experts", NARROW, ids=str)
@pytest.mark.parametrize("tokens", NARROW, ids=str)
def test_mixed_dtypes(tokens: torch.dtype, experts: torch.dtype) -> None:
    for scores in (torch.float32, torch.float64, experts):
        check(expert_arguments(13, 20, 11, 4, 2, dtype=tokens, parameters=experts, scores=scores, ids=torch.int32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_of_several_blocks_and_tasks(dtype: torch.dtype, transposed: bool) -> None:
    check(expert_arguments(131, 100, 200, 2, 1, dtype=dtype, transposed=transposed, routing="one"))
    check(expert_arguments(5, 401, 100, 2, 2, dtype=dtype, transposed=transposed, interleaved=True))


@st.composite
def any_arguments(draw: st.DrawFn) -> dict[str, Any]:
    experts = draw(st.sampled_from([1, 2, 7, 64]))
    k = min(experts, draw(st.sampled_from([0, 1, 2, 2, experts])))
    outer, inner = draw(st.sampled_from([1, 7, 8, 64, 100])), draw(st.sampled_from([1, 5, 8, 48, 200]))
    tokens = draw(st.sampled_from([0, 1, 2, 3, 5, 32, 67]))
    if tokens * k * outer * inner > 1 << 20:  # more would cost the loops of the oracle too much
        outer, inner = 8, 48
    dtype = draw(st.sampled_from(DTYPES))
    wide = dtype == torch.float64
    return expert_arguments(
        tokens,
        outer,
        inner,
        experts,
        k,
        gate=draw(st.sampled_from(list(GATES))),
        routing=draw(st.sampled_from(ROUTINGS)),
        transposed=draw(st.booleans()),
        interleaved=draw(st.booleans()),
        biases=draw(st.booleans()),
        dtype=dtype,
        parameters=dtype if wide else draw(st.sampled_from(NARROW)),
        scores=draw(st.sampled_from(DTYPES)),
        ids=draw(st.sampled_from([torch.int32, torch.int64])),
        layouts=tuple(draw(st.permutations(LAYOUTS))),
        ragged=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@given(any_arguments())
def test_any_arguments(arguments: dict[str, Any]) -> None:
    check(arguments)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_parts_of_several_machines_add_up(transposed: bool) -> None:
    arguments = expert_arguments(17, 12, 9, 7, 3, dtype=torch.float64, transposed=transposed)
    arguments["ids"][3, 1] = 7  # dropped on all of them
    want = moe_experts(**arguments)
    total = torch.zeros_like(want)
    for begin, end in ((0, 3), (3, 3 + 1), (4, 7)):
        own = arguments | {name: arguments[name][begin:end] for name in ("w13", "w2", "b13", "b2")}
        own["expert_range"] = (begin, end)
        total += moe_experts(**own).detach()
        check(own)
    assert_close("sum of the parts", total, want, 1e-14)


def test_nobody_chooses_anything() -> None:
    arguments = expert_arguments(5, 8, 4, 3, 2)
    arguments["ids"] = torch.full_like(arguments["ids"], 3)
    inputs = leaves(arguments)
    out = moe_experts(**arguments)
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), list(inputs.values())))


# ---- what it must equal ----


def test_one_expert_is_an_mlp() -> None:
    arguments = expert_arguments(11, 16, 24, 1, 1, gate="gelu alone")
    x, w13, w2, b13, b2 = (arguments[name] for name in ("x", "w13", "w2", "b13", "b2"))
    arguments["weights"] = torch.ones(11, 1)
    assert_close("out", moe_experts(**arguments), F.linear(F.gelu(F.linear(x, w13[0], b13[0])), w2[0], b2[0]), 1e-6)


def test_all_experts_are_the_dense_mixture() -> None:
    arguments = expert_arguments(11, 16, 24, 5, 5, biases=False)
    x, w13, w2 = (arguments[name] for name in ("x", "w13", "w2"))
    share = torch.randn(11, 5).softmax(1)
    arguments |= {"weights": share.gather(1, arguments["ids"])}
    g, u = torch.einsum("th,eih->tei", x, w13).chunk(2, dim=2)
    want = torch.einsum("te,tei,ehi->th", share, F.silu(g) * u, w2)
    assert_close("out", moe_experts(**arguments), want, 1e-6)


def test_experts_that_choose_what_tokens_chose() -> None:
    arguments = expert_arguments(13, 16, 8, 4, 2)
    order = arguments["ids"].flatten().argsort(stable=True)
    counts = torch.bincount(arguments["ids"].flatten(), minlength=4)
    ragged = {name: x for name, x in arguments.items() if name not in ("ids", "weights")}
    ragged |= {"tokens": order // 2, "weights": arguments["weights"].flatten()[order]}
    ragged["offsets"] = F.pad(counts.cumsum(0), (1, 0))
    assert_close("out", moe_experts_ragged(**ragged), moe_experts(**arguments), 1e-6)


# ---- special values ----


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", list(GATES))
def test_a_nan_stays_with_its_token(gate: str, transposed: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        arguments = expert_arguments(19, 11, 9, 2, 1, gate=gate, transposed=transposed, dtype=dtype)
        want = moe_experts(**arguments)
        arguments["x"][7, 3] = torch.nan
        out = moe_experts(**arguments)
        others = torch.arange(19) != 7
        assert torch.equal(out[others], want[others])
        assert out[7].isnan().all()


def test_a_weight_of_zero_does_not_skip_and_the_drop_id_does() -> None:
    arguments = expert_arguments(4, 8, 8, 2, 1, biases=False) | {"weights": torch.zeros(4, 1)}
    assert not moe_experts(**arguments).any()
    arguments["w2"][:] = torch.inf
    assert moe_experts(**arguments).isnan().all()
    arguments["ids"] = torch.full_like(arguments["ids"], 2)
    assert not moe_experts(**arguments).any()


@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gates_far_out(gate: str, dtype: torch.dtype) -> None:
    arguments = expert_arguments(41, 1, 3, 1, 1, gate=gate, dtype=dtype, biases=False)
    arguments["x"] = torch.linspace(-90, 90, 41, dtype=dtype)[:, None]
    arguments["w13"] = torch.ones_like(arguments["w13"])
    check(arguments)


# ---- the same bits ----


def results(arguments: dict[str, Any]) -> list[Tensor]:
    inputs = leaves({name: x.detach() if isinstance(x, Tensor) else x for name, x in arguments.items()})
    out = run(arguments | inputs)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), list(inputs.values()))]


@pytest.mark.native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("routing", ["distinct", "one", "repeated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    dtype: torch.dtype, routing: str, transposed: bool, threads: Callable[[int], None]
) -> None:
    arguments = expert_arguments(67, 200, 104, 5, 2, dtype=dtype, routing=routing, transposed=transposed)
    threads(1)
    want = results(arguments)
    for count in (2, 3, 7, 7):
        threads(count)
        for one, two in zip(results(arguments), want, strict=True):
            assert torch.equal(one, two)


@pytest.mark.native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("outer", "inner"), [(100, 48), (64, 200), (7, 5)])
def test_a_token_has_the_same_bits_in_any_batch(outer: int, inner: int, dtype: torch.dtype, transposed: bool) -> None:
    arguments = expert_arguments(140, outer, inner, 3, 2, dtype=dtype, transposed=transposed)
    arguments["ids"][:110, 0] = 1  # so many that they come in two blocks
    want = moe_experts(**arguments)
    for rows in (*([t] for t in (0, 1, 77, 139)), *(range(n) for n in (2, 3, 4, 5, 6, 7, 9, 12, 33))):
        some = list(rows)
        part = arguments | {name: arguments[name][some] for name in ("x", "ids", "weights")}
        assert torch.equal(moe_experts(**part), want[some])
    order = torch.randperm(140)
    mixed = arguments | {name: arguments[name][order] for name in ("x", "ids", "weights")}
    assert torch.equal(moe_experts(**mixed), want[order])


@pytest.mark.native
def test_the_order_of_the_experts_does_not_matter() -> None:
    arguments = expert_arguments(40, 24, 20, 7, 3)
    order = torch.randperm(7)
    moved = arguments | {name: arguments[name][order] for name in ("w13", "w2", "b13", "b2")}
    moved["ids"] = order.argsort()[arguments["ids"]]
    names = [name for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
    for name, one, two in zip(["out", *names], results(moved), results(arguments), strict=True):
        assert torch.equal(one, two[order] if name in ("w13", "w2", "b13", "b2") else two), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_the_memory_between_them_are_not_written(layout: str) -> None:
    arguments = expert_arguments(9, 12, 8, 3, 2, layouts=(layout,))
    tensors = [x for x in arguments.values() if isinstance(x, Tensor)]

    def memory() -> list[bytes]:
        return [bytes(x.untyped_storage()) for x in tensors]

    before = memory()
    results(arguments)
    assert memory() == before


# ---- which gradients ----

FLOATS = ("x", "w13", "w2", "weights", "b13", "b2")


@pytest.mark.parametrize(
    "wanted",
    [("x",), ("x", "weights"), ("x", "w13", "w2", "b13", "b2"), ("weights",), *((name,) for name in FLOATS[1:])],
    ids="+".join,
)
def test_only_the_gradients_that_are_needed(wanted: tuple[str, ...]) -> None:
    """Frozen experts, a frozen router, and each argument alone."""
    arguments = expert_arguments(13, 20, 11, 4, 2)
    inputs = leaves(arguments)
    want = dict(zip(inputs, torch.autograd.grad(run(arguments).sum(), list(inputs.values())), strict=True))
    for name, x in inputs.items():
        x.requires_grad_(name in wanted)
    run(arguments).sum().backward()
    for name, x in inputs.items():
        if name not in wanted:
            assert x.grad is None
        else:
            assert torch.equal(x.grad, want[name]), name


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh alone", "gpt-oss"])
def test_gradcheck(gate: str, transposed: bool, ragged: bool) -> None:
    arguments = expert_arguments(
        4, 3, 2, 3, 2, gate=gate, transposed=transposed, interleaved=True, ragged=ragged, dtype=torch.float64
    )
    inputs = leaves(arguments)

    def call(*tensors: Tensor) -> Tensor:
        return run(arguments | dict(zip(inputs, tensors, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_a_second_derivative_is_a_clear_error() -> None:
    arguments = expert_arguments(4, 3, 2, 3, 2)
    x = arguments["x"].requires_grad_()
    (grad,) = torch.autograd.grad(run(arguments).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


def test_the_op_without_what_it_keeps_for_the_gradient() -> None:
    """Whoever calls torch.ops.layerzoo and asks for no hidden layer gets it computed in the backward pass."""
    arguments = expert_arguments(5, 8, 4, 3, 2, biases=False)
    x, ids, weights, w13, w2 = (arguments[name] for name in ("x", "ids", "weights", "w13", "w2"))
    grads = []
    for save in (True, False):
        leaf = w13.detach().requires_grad_()
        rest = (None, None, 0, True, False, False, 1.0, 0.0, math.inf, -1, save)
        out, hidden = torch.ops.layerzoo.moe_experts(x, ids, weights, None, leaf, w2, *rest)
        assert hidden.shape == (10 if save else 0, 8)
        grads += torch.autograd.grad(out.sum(), leaf)
    assert torch.equal(*grads)


@pytest.mark.parametrize("call", [torch.no_grad, torch.inference_mode])
def test_without_gradients(call: Callable[[], Any]) -> None:
    arguments = expert_arguments(13, 20, 11, 4, 2)
    want = run(arguments)
    leaves(arguments)
    with call():
        out = run(arguments)
    assert not out.requires_grad
    assert torch.equal(out, want)
