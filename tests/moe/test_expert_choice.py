"""expert_choice and sinkhorn against loops in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ssm.inputs import LAYOUTS, lay_out
from ssm.oracle import TOLERANCE, array, assert_close
from torch import Tensor

from layerzoo.ops import expert_choice, moe_experts_ragged, sinkhorn

SIZES = st.sampled_from([1, 2, 3, 7, 13])


def softmax(logits: Any) -> Any:
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def any_logits(draw: st.DrawFn, tokens: int) -> Tensor:
    torch.manual_seed(draw(st.integers(0, 99)))
    logits = (2 * torch.randn(tokens, draw(SIZES))).to(draw(st.sampled_from(list(TOLERANCE))))
    return lay_out(logits, draw(st.sampled_from(LAYOUTS)))


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    return any_logits(draw, draw(st.sampled_from([0, 1, 2, 3, 7, 13]))), draw(SIZES)


@given(choices())
def test_experts_take_the_tokens_that_weigh_them_most(given: tuple[Tensor, int]) -> None:
    logits, capacity = given
    tokens, weights, offsets = expert_choice(logits, capacity)
    taken = min(capacity, logits.shape[0])
    p = softmax(array(logits)) if len(logits) else np.zeros(logits.shape)
    assert (tokens.dtype, weights.dtype, offsets.dtype) == (torch.int64, logits.dtype, torch.int64)
    assert offsets.tolist() == [taken * e for e in range(logits.shape[1] + 1)]
    for e in range(logits.shape[1]):
        rows = tokens[offsets[e] : offsets[e + 1]].numpy()
        assert len(set(rows)) == taken
        # Of tokens that weigh the same but for rounding any may be taken.
        assert np.allclose(p[rows, e], np.sort(p[:, e])[::-1][:taken], rtol=1e-6)
        assert_close("weights", weights[offsets[e] : offsets[e + 1]], p[rows, e], TOLERANCE[logits.dtype])


def test_ties_go_to_the_lowest_token() -> None:
    tokens, weights, _ = expert_choice(torch.zeros(40, 2), 17)
    assert tokens.tolist() == [*range(17), *range(17)]
    assert (weights == 0.5).all()


def test_nan_comes_last() -> None:
    logits = torch.zeros(4, 2)
    logits[0, 1] = torch.nan
    tokens, weights, _ = expert_choice(logits, 3)
    assert tokens.tolist() == [1, 2, 3, 1, 2, 3]
    assert weights.isfinite().all()
    tokens, weights, _ = expert_choice(logits, 4)
    assert tokens.tolist() == [1, 2, 3, 0, 1, 2, 3, 0]
    assert weights.isnan().tolist() == [False, False, False, True] * 2


def test_gradcheck_through_the_experts() -> None:
    torch.manual_seed(0)
    x, w13, w2 = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 4), (3, 6, 4), (3, 4, 3)))

    def run(logits: Tensor) -> Tensor:
        tokens, weights, offsets = expert_choice(logits, 2)
        return moe_experts_ragged(x, tokens, weights, offsets, w13, w2)

    assert torch.autograd.gradcheck(run, (torch.randn(5, 3, dtype=torch.float64, requires_grad=True),))


@pytest.mark.slow
@pytest.mark.parametrize("function", [lambda z: expert_choice(z, 3), lambda z: (sinkhorn(z, 5),)])
def test_compile_without_graph_breaks(function: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens in (7, 9):
        logits = torch.randn(tokens, 4)
        for one, two in zip(compiled(logits), function(logits), strict=True):
            assert torch.equal(one, two)


# ---- sinkhorn ----


@st.composite
def sinkhorn_logits(draw: st.DrawFn) -> Tensor:
    return any_logits(draw, draw(SIZES))


@given(sinkhorn_logits())
def test_plan(logits: Tensor) -> None:
    """Against the same scaling without logarithms."""
    kernel = np.exp(array(logits))
    tokens, experts = kernel.shape
    b = np.ones(experts)
    for _ in range(20):
        a = 1 / (tokens * (kernel * b).sum(axis=1, keepdims=True))
        b = 1 / (experts * (kernel * a).sum(axis=0))
    plan = sinkhorn(logits, 20)
    assert plan.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert_close("plan", plan, kernel * a * b, TOLERANCE[plan.dtype])


@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_rows_and_columns_sum_alike(tolerance: float | None) -> None:
    torch.manual_seed(0)
    plan = sinkhorn(torch.randn(12, 4, dtype=torch.float64), 1000, tolerance)
    assert torch.allclose(plan.sum(0), torch.full((4,), 1 / 4, dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(plan.sum(1), torch.full((12,), 1 / 12, dtype=torch.float64), rtol=1e-5)


def test_tolerance_stops_early() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 4, dtype=torch.float64)
    plans = [sinkhorn(logits, n) for n in range(1, 200)]
    stopped = sinkhorn(logits, 200, 1e-4)
    at = next(n for n, plan in enumerate(plans) if torch.equal(plan, stopped))
    assert 1 < at < 100


def test_no_overflow() -> None:
    plan = sinkhorn(500 * torch.eye(4))
    assert_close("plan", plan, np.eye(4) / 4, 1e-6)


def test_a_forbidden_pair() -> None:
    logits = torch.zeros(4, 2)
    logits[0, 1] = -torch.inf
    plan = sinkhorn(logits, 200)
    assert plan[0, 1] == 0
    assert torch.allclose(plan.sum(1), torch.full((4,), 0.25))


def test_without_tokens() -> None:
    assert sinkhorn(torch.zeros(0, 3)).shape == (0, 3)


def test_sinkhorn_gradcheck() -> None:
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sinkhorn(z, 4), (logits,))


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("function", "given", "error", "message"),
    [
        (expert_choice, ([1.0], 2), TypeError, "logits must be a tensor, got list"),
        (expert_choice, (torch.zeros(4), 2), ValueError, r"logits must have shape \(T, E\), got \(4,\)"),
        (expert_choice, (Z.int(), 2), TypeError, "logits must have dtype float32, .*got int32"),
        (expert_choice, (torch.zeros(4, 0), 2), ValueError, "logits must have at least one expert, got 0"),
        (expert_choice, (Z, 0), ValueError, "capacity must be at least 1, got 0"),
        (sinkhorn, (None,), TypeError, "logits must be a tensor, got NoneType"),
        (sinkhorn, (torch.zeros(4),), ValueError, r"logits must have shape \(T, E\), got \(4,\)"),
        (sinkhorn, (Z.bool(),), TypeError, "logits must have dtype float32, .*got bool"),
        (sinkhorn, (torch.zeros(4, 0),), ValueError, "logits must have at least one expert, got 0"),
        (sinkhorn, (Z, 0), ValueError, "n_iterations must be at least 1, got 0"),
        (sinkhorn, (Z, 9, 0.0), ValueError, "tolerance must be positive or None, got 0.0"),
    ],
)
def test_bad_input(function: Any, given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{function.__name__}: {message}"):
        function(*given)
