"""moe_route against loops over tokens in numpy: values, gradients, ties, odd numbers, types, threads, errors."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from ssm.inputs import LAYOUTS, lay_out
from ssm.oracle import TOLERANCE, array, assert_close
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from layerzoo import _native
from layerzoo.ops import moe_experts, moe_route
from layerzoo.ops.moe import RouteStats

Array = NDArray[Any]
SCORES = ("softmax", "sigmoid", "topk_softmax")
SMOOTH = ("weights", "importance", "z_loss", "entropy")


# ---- the oracle: takes complex numbers, for derivatives by a complex step ----


def softmax(x: Array) -> Array:
    e = np.exp(x - x.real.max())
    return e / e.sum()


def choose(values: Array, scores: Array, top_k: int, groups: tuple[int, int, str] | None) -> list[int]:
    allowed = range(len(values))
    if groups is not None:
        n_group, topk_group, best = groups
        members = np.split(np.arange(len(values)), n_group)
        worth = [np.sort(scores[m])[-2:].sum() if best == "top2" else values[m].max() for m in members]
        kept = sorted(range(n_group), key=lambda g: (-worth[g], g))[:topk_group]
        allowed = [e for g in kept for e in members[g]]
    return sorted(allowed, key=lambda e: (-values[e], e))[:top_k]


def oracle(
    logits: Array,
    top_k: int,
    *,
    score: str = "softmax",
    bias: Array | None = None,
    groups: tuple[int, int, str] | None = None,
    normalize: bool = False,
    scale: float = 1.0,
    noise: Array | None = None,
    capacity: int | None = None,
    drop: str = "position",
) -> dict[str, Array]:
    tokens, experts = logits.shape
    h = logits if noise is None else logits + noise
    ids = np.zeros((tokens, top_k), dtype=np.int64)
    weights, importance = np.zeros((tokens, top_k), h.dtype), np.zeros(experts, h.dtype)
    squares = 0.0
    for t, row in enumerate(h):
        s = {"softmax": softmax, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "topk_softmax": lambda x: x}[score](row)
        scores = s.real + (0 if bias is None else bias)
        ids[t] = choose(row.real if bias is None else scores, scores, top_k, groups)
        weights[t] = softmax(row[ids[t]]) if score == "topk_softmax" else s[ids[t]]
        if score == "topk_softmax":
            importance[ids[t]] += weights[t]
        else:
            importance += s / s.sum()
        if normalize:
            weights[t] /= weights[t].sum()
        top = logits[t].real.max()
        squares += (top + np.log(np.exp(logits[t] - top).sum())) ** 2
    weights *= scale
    counts, dropped = np.bincount(ids.ravel(), minlength=experts), 0
    pairs = [(t, j) for j in range(top_k) for t in range(tokens)]
    if drop == "weight":
        pairs.sort(key=lambda pair: -weights[pair].real)
    taken = np.zeros(experts, dtype=int)
    for pair in pairs:
        expert = ids[pair]
        taken[expert] += 1
        if capacity is not None and taken[expert] > capacity:
            ids[pair], weights[pair] = experts, 0
            dropped += 1
    rows = max(tokens, 1)
    mean = importance[importance.real > 1e-300] / rows
    return {
        "weights": weights,
        "ids": ids,
        "counts": counts,
        "importance": importance,
        "load": counts / rows,
        "z_loss": np.asarray(squares / rows),
        "entropy": np.asarray(-(mean * np.log(mean)).sum()),
        "dropped": np.asarray(dropped),
    }


def gradient(name: str, cotangents: dict[str, Array], values: dict[str, Array], options: dict[str, Any]) -> Array:
    """Of the sum of all cotangents times their outputs, element by element."""
    out = np.zeros(values[name].shape)
    for place in np.ndindex(out.shape):
        step = np.zeros(out.shape, dtype=complex)
        step[place] = 1e-30j
        result = oracle(**options, **values | {name: values[name] + step})
        out[place] = sum((cotangents[key] * result[key]).sum().imag for key in cotangents) / 1e-30
    return out


# ---- values and gradients ----


def arguments(
    tokens: int, experts: int, *, dtype: torch.dtype = torch.float32, bias: bool = False, noise: bool = False
) -> dict[str, Any]:
    torch.manual_seed(tokens + experts)
    given: dict[str, Any] = {"logits": (2 * torch.randn(tokens, experts)).to(dtype)}
    if bias:
        given["bias"] = torch.randn(experts).to(dtype)
    if noise:
        given["noise"] = torch.randn(tokens, experts).to(dtype)
    return given


def as_dict(weights: Tensor, ids: Tensor, stats: RouteStats) -> dict[str, Tensor]:
    return {"weights": weights, "ids": ids, **stats._asdict()}


def assert_near(name: str, got: Tensor, want: Array, tolerance: float) -> None:
    """`assert_close` for what may be 0 but for rounding."""
    assert got.shape == want.shape, name
    one = torch.ones(1, dtype=torch.float64)
    assert_close(name, torch.cat([got.double().flatten(), one]), np.append(want, 1), tolerance)


def check(given: dict[str, Any], top_k: int, **options: Any) -> None:
    logits, wide = given["logits"], torch.float64 if given["logits"].dtype == torch.float64 else torch.float32
    inputs = {name: given[name].detach().requires_grad_() for name in ("logits", "noise") if name in given}
    got = as_dict(*moe_route(**given | inputs, top_k=top_k, **options))
    values = {name: array(x) for name, x in given.items()}
    want = oracle(**values, top_k=top_k, **options)
    for name, expected in want.items():
        if got[name].dtype == torch.int64:
            assert np.array_equal(got[name].numpy(), expected), name
        else:
            assert got[name].dtype == (logits.dtype if name == "weights" else wide), name
            assert_near(name, got[name], expected, TOLERANCE[got[name].dtype])
    cotangents = {name: torch.randn(got[name].shape).to(got[name].dtype) for name in SMOOTH}
    grads = torch.autograd.grad([got[name] for name in SMOOTH], list(inputs.values()), list(cotangents.values()))
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        assert grad.dtype == x.dtype
        expected = gradient(name, {k: array(v) for k, v in cotangents.items()}, values, options | {"top_k": top_k})
        assert_near(f"gradient of {name}", grad, expected, TOLERANCE[x.dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("score", SCORES)
def test_scores(score: str, noise: bool, normalize: bool, dtype: torch.dtype) -> None:
    check(arguments(5, 12, dtype=dtype, noise=noise), 3, score=score, normalize=normalize, scale=2.5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [(4, 2, "top2"), (4, 3, "max"), (12, 5, "top2"), (1, 1, "top2"), (2, 2, "max")])
@pytest.mark.parametrize("score", SCORES)
def test_groups(score: str, groups: tuple[int, int, str], bias: bool) -> None:
    check(arguments(6, 12, bias=bias), 3, score=score, groups=groups)


@pytest.mark.parametrize("drop", ["position", "weight"])
@pytest.mark.parametrize("capacity", [1, 3, 100])
@pytest.mark.parametrize("score", SCORES)
def test_capacity(score: str, capacity: int, drop: str) -> None:
    check(arguments(9, 5), 2, score=score, capacity=capacity, drop=drop, normalize=True, scale=0.5)


@st.composite
def any_arguments(draw: st.DrawFn) -> tuple[dict[str, Any], int, dict[str, Any]]:
    experts = draw(st.sampled_from([1, 2, 3, 7, 8, 16, 17]))
    top_k = draw(st.integers(1, experts))
    given = arguments(
        draw(st.sampled_from([0, 1, 2, 3, 5])),
        experts,
        dtype=draw(st.sampled_from(list(TOLERANCE))),
        bias=draw(st.booleans()),
        noise=draw(st.booleans()),
    )
    for name in given.keys() - {"bias"}:
        given[name] = lay_out(given[name], draw(st.sampled_from(LAYOUTS)))
    n_group = draw(st.sampled_from([g for g in range(1, experts + 1) if experts % g == 0]))
    least = -(-top_k // (experts // n_group))
    options = {
        "score": draw(st.sampled_from(SCORES)),
        "groups": (n_group, draw(st.integers(least, n_group)), draw(st.sampled_from(["top2", "max"]))),
        "normalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "capacity": draw(st.sampled_from([None, 1, 2])),
        "drop": draw(st.sampled_from(["position", "weight"])),
    }
    return given, top_k, options


@given(any_arguments())
def test_any_sizes_types_layouts_and_options(given: tuple[dict[str, Any], int, dict[str, Any]]) -> None:
    check(given[0], given[1], **given[2])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("top_k", [64, 65, 130])  # kept sorted while they are found, or sorted at once
def test_many_experts_for_a_token(top_k: int, score: str) -> None:
    given = arguments(40, 131, dtype=torch.float64)
    got = as_dict(*moe_route(**given, top_k=top_k, score=score, normalize=True))
    want = oracle(array(given["logits"]), top_k, score=score, normalize=True)
    assert np.array_equal(got["ids"].numpy(), want["ids"])
    for name in SMOOTH:
        assert_close(name, got[name], want[name], 1e-9)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("options", [{}, {"normalize": True, "capacity": 2, "drop": "weight"}])
def test_gradcheck(score: str, options: dict[str, Any]) -> None:
    given = arguments(4, 6, dtype=torch.float64, noise=True)

    def smooth(logits: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        got = as_dict(*moe_route(logits, 2, noise=noise, score=score, **options))
        return tuple(got[name] for name in SMOOTH)

    assert torch.autograd.gradcheck(smooth, (given["logits"].requires_grad_(), given["noise"].requires_grad_()))


@pytest.mark.parametrize("name", SMOOTH)
def test_each_gradient_alone(name: str) -> None:
    given = arguments(5, 7, dtype=torch.float64)
    logits = given["logits"].requires_grad_()
    got = as_dict(*moe_route(logits, 2))[name]
    cotangent = torch.randn_like(got)
    (grad,) = torch.autograd.grad(got, logits, cotangent)
    want = gradient(
        name="logits", cotangents={name: array(cotangent)}, values={"logits": array(logits)}, options={"top_k": 2}
    )
    assert_close(name, grad, want, 1e-9)


def test_the_gradient_of_noise_alone() -> None:
    given = arguments(3, 5, dtype=torch.float64, noise=True)
    grads = []
    for name in ("logits", "noise"):
        x = given[name].clone().requires_grad_()
        grads.append(torch.autograd.grad(moe_route(**given | {name: x}, top_k=2)[0].square().sum(), x)[0])
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)


def test_no_second_derivative() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(moe_route(logits, 2)[0].square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


def test_bias_takes_no_part_in_weights_and_gets_no_gradient() -> None:
    logits, bias = torch.randn(6, 8), torch.randn(8, requires_grad=True)
    weights, ids, _ = moe_route(logits, 3, score="sigmoid", bias=bias)
    assert not weights.requires_grad
    assert torch.allclose(weights, logits.sigmoid().gather(1, ids))
    assert not torch.equal(ids, moe_route(logits, 3, score="sigmoid")[1])


def test_topk_softmax_is_softmax_with_normalize() -> None:
    logits = torch.randn(6, 8, dtype=torch.float64)
    one, two = moe_route(logits, 3, score="topk_softmax"), moe_route(logits, 3, normalize=True)
    assert torch.equal(one[1], two[1])
    assert_close("weights", one[0], two[0], 1e-12)


def test_inputs_stay_as_they_are() -> None:
    given = arguments(6, 8, bias=True, noise=True)
    before = {name: x.clone() for name, x in given.items()}
    moe_route(**given, top_k=2, capacity=1)
    assert all(torch.equal(x, before[name]) for name, x in given.items())


def test_dropped_pairs_drop_in_moe_experts() -> None:
    weights, ids, stats = moe_route(torch.zeros(5, 3), 1, capacity=2)
    assert ids.tolist() == [[0], [0], [3], [3], [3]]
    assert (stats.counts.tolist(), int(stats.dropped)) == ([5, 0, 0], 3)
    out = moe_experts(torch.randn(5, 4), ids, weights, torch.randn(3, 6, 4), torch.randn(3, 4, 3))
    assert out.abs().sum(1).gt(0).tolist() == [True, True, False, False, False]


# ---- ties, NaN and infinity ----


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("top_k", [1, 8, 64, 70, 97])
@pytest.mark.parametrize("score", SCORES)
def test_ties_go_to_the_lowest_id(score: str, top_k: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 97, dtype=dtype)
    logits[1, ::2] = -0.0
    logits[2, 50:] = 1
    ids = moe_route(logits, top_k, score=score)[1]
    assert torch.equal(ids[:2], torch.arange(top_k).expand(2, -1))
    assert torch.equal(ids[2], torch.cat([torch.arange(50, 97), torch.arange(50)])[:top_k])


def test_equal_groups_go_to_the_lowest() -> None:
    ids = moe_route(torch.zeros(1, 12), 4, groups=(4, 2, "top2"), score="sigmoid")[1]
    assert ids.tolist() == [[0, 1, 2, 3]]


def test_a_masked_group_is_never_chosen() -> None:
    logits = torch.full((1, 6), -torch.inf)
    logits[0, 4] = 1.0
    assert moe_route(logits, 3, score="sigmoid", groups=(2, 1, "max"))[1].tolist() == [[4, 3, 5]]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "options", [{}, {"groups": (3, 2, "top2")}, {"normalize": True}, {"bias": torch.ones(12)}], ids=str
)
def test_nan_stays_in_its_row(score: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    logits = torch.randn(6, 12).to(dtype)
    want = moe_route(logits, 4, score=score, **options)
    bad = logits.clone()
    bad[2, 3], bad[4] = torch.nan, torch.nan
    weights, ids, stats = moe_route(bad, 4, score=score, **options)
    assert all(len(set(row)) == 4 and set(row) <= set(range(12)) for row in ids.tolist())
    assert torch.equal(weights.isnan(), torch.tensor([0, 0, 1, 0, 1, 0]).bool()[:, None].expand(6, 4))
    others = [0, 1, 3, 5]
    assert torch.equal(weights[others], want[0][others])
    assert torch.equal(ids[others], want[1][others])
    assert int(stats.counts.sum()) == 24
    assert stats.z_loss.isnan()
    assert stats.entropy.isnan()


def test_nan_comes_last() -> None:
    logits = torch.tensor([[torch.nan, 1.0, -torch.inf, 2.0]])
    assert moe_route(logits, 4)[1].tolist() == [[3, 1, 0, 2]]


def test_gradients_of_other_rows_survive_nan() -> None:
    logits = torch.randn(3, 5)
    logits[1, 1] = torch.nan
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(moe_route(logits, 2)[0].sum(), logits)
    assert torch.equal(grad.isnan().any(1), torch.tensor([False, True, False]))


@pytest.mark.parametrize("score", SCORES)
def test_minus_infinity_masks_an_expert(score: str) -> None:
    logits = torch.randn(4, 6, dtype=torch.float64)
    masked = torch.cat([logits, torch.full((4, 2), -torch.inf, dtype=torch.float64)], dim=1).requires_grad_()
    got = as_dict(*moe_route(masked, 2, score=score))
    want = as_dict(*moe_route(logits, 2, score=score))
    for name in ("weights", "z_loss", "entropy"):
        assert_close(name, got[name], want[name], 1e-12)
    (grad,) = torch.autograd.grad(sum(got[name].sum() for name in SMOOTH), masked)
    assert grad.isfinite().all()
    assert (grad[:, 6:] == 0).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_a_row_without_a_softmax(value: float) -> None:
    logits = torch.randn(3, 4)
    logits[1] = value
    weights, ids, _ = moe_route(logits, 2)
    assert torch.equal(weights.isnan().any(1), torch.tensor([False, True, False]))
    assert ids[1].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_logits(dtype: torch.dtype) -> None:
    check({"logits": (1000 * torch.randn(4, 9)).to(dtype)}, 2)


# ---- the op ----


def op_arguments(score: int, capacity: int, dtype: torch.dtype) -> tuple[Any, ...]:
    logits, noise = (torch.randn(6, 5).to(dtype).mT.requires_grad_() for _ in range(2))
    return logits, torch.randn(6), noise, 2, score, 2, 1, True, True, 1.5, capacity, False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capacity", [0, 1])
@pytest.mark.parametrize("score", range(3))
def test_opcheck(score: int, capacity: int, dtype: torch.dtype) -> None:
    given = op_arguments(score, capacity, dtype)
    torch.library.opcheck(torch.ops.layerzoo.moe_route.default, given)
    with torch.no_grad():
        weights, ids, _, importance, _, z_loss, entropy, _, chosen = torch.ops.layerzoo.moe_route(*given)
        saved = (given[0].detach(), given[2].detach(), ids, chosen, importance, score, True, 1.5)
        for grads, needed in (((weights, importance, z_loss, entropy), 3), ((None, None, z_loss, None), 1)):
            torch.library.opcheck(torch.ops.layerzoo.moe_route_backward.default, (*grads, *saved, needed))


def both(logits: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
    tokens = logits.shape[0]
    weights, ids, stats = moe_route(logits, 2, noise=noise, capacity=max(1, tokens // 4), score="topk_softmax")
    return weights, ids, *stats


@pytest.mark.slow
def test_compile_without_graph_breaks_and_with_two_graphs_for_all_sizes_and_capacities() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, backend=counter)
    for tokens in (9, 17, 5, 40):
        inputs = [torch.randn(tokens, 6, requires_grad=True) for _ in range(2)]
        want, got = both(*inputs), compiled(*inputs)
        for one, two in zip(got, want, strict=True):
            assert torch.equal(one, two)
        grads = [
            torch.autograd.grad(out[0].square().sum() + out[3].square().sum() + out[5] + out[6], inputs)
            for out in (got, want)
        ]
        for one, two in zip(*grads, strict=True):
            assert torch.equal(one, two)
    assert counter.frame_count <= 2


@pytest.mark.native
@pytest.mark.parametrize("drop", ["position", "weight"])
def test_same_bits_for_any_number_of_threads(threads: Callable[[int], None], drop: str) -> None:
    logits = torch.randn(700, 67, requires_grad=True)
    results = []
    for count in (1, 2, 3):
        threads(count)
        got = as_dict(*moe_route(logits, 5, capacity=40, drop=drop))
        (grad,) = torch.autograd.grad(sum(got[name].square().sum() for name in SMOOTH), logits)
        results.append([*got.values(), grad])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.native
def test_kernels_run() -> None:
    before = [_native.calls(op) for op in ("moe_route", "moe_route_backward")]
    logits = torch.randn(5, 6, requires_grad=True)
    moe_route(logits, 2)[0].sum().backward()
    assert [_native.calls(op) for op in ("moe_route", "moe_route_backward")] == [count + 1 for count in before]


# ---- bad input ----

LOGITS = torch.zeros(4, 6)
meta = {"device": "meta"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [[1.0]]}, TypeError, "logits must be a tensor, got list"),
        ({"logits": torch.zeros(6)}, ValueError, r"logits must have shape \(T, E\), got \(6,\)"),
        ({"logits": LOGITS.long()}, TypeError, "logits must have dtype float32, .*got int64"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "logits must have at least one expert, got 0"),
        ({"top_k": 0}, ValueError, "top_k must be from 1 to E = 6, got 0"),
        ({"top_k": 7}, ValueError, "top_k must be from 1 to E = 6, got 7"),
        ({"score": "tanh"}, ValueError, "score must be one of softmax, sigmoid, topk_softmax, got 'tanh'"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \(E,\) = \(6,\), got \(5,\)"),
        ({"bias": torch.zeros(6).int()}, TypeError, "bias must have dtype float32, .*got int32"),
        ({"bias": torch.zeros(6, **meta)}, ValueError, "bias must be on cpu.*got meta"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor, got float"),
        ({"noise": torch.zeros(6)}, ValueError, r"noise must have shape .*= \(4, 6\), got \(6,\)"),
        ({"noise": torch.zeros(4, 6, **meta)}, ValueError, "noise must be on cpu.*got meta"),
        ({"groups": (4, 2, "max")}, ValueError, "groups must begin with a number that divides E = 6"),
        ({"groups": (0, 1, "max")}, ValueError, "groups must begin with a number that divides E = 6"),
        ({"groups": (3, 0, "max")}, ValueError, "groups must keep from 1 to 3 groups"),
        ({"groups": (3, 4, "max")}, ValueError, "groups must keep from 1 to 3 groups"),
        ({"groups": (6, 1, "max")}, ValueError, "groups must keep .* at least top_k = 2 experts"),
        ({"groups": (3, 2, "mean")}, ValueError, "groups must end in 'top2' or 'max'"),
        ({"scale": math.nan}, ValueError, "scale must be positive and finite, got nan"),
        ({"scale": -1.0}, ValueError, "scale must be positive and finite, got -1.0"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1 or None, got 0"),
        ({"drop": "random"}, ValueError, "drop must be 'position' or 'weight', got 'random'"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"moe_route: {message}"):
        moe_route(**{"logits": LOGITS, "top_k": 2} | change)
