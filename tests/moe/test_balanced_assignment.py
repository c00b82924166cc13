"""balanced_assignment against scipy's assignment on a matrix with one column for each place."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from layerzoo import _native
from layerzoo.ops import balanced_assignment, moe_experts
from layerzoo.reference.moe import ASSIGNMENT_BIDS, ASSIGNMENT_EPSILON

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def best_total(scores: Tensor) -> float:
    """Each expert has ceil(T / E) places; rows of no worth take one place each of those that stay below that."""
    tokens, experts = scores.shape
    places = -(-tokens // experts)
    matrix = np.repeat(scores.double().numpy(), places, axis=1)
    if rest := tokens % experts:
        none = np.full((experts - rest, experts * places), -1e9)
        none[:, places - 1 :: places] = 0
        matrix = np.vstack([matrix, none])
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    return float(matrix[rows, columns].sum())


def check(scores: Tensor) -> None:
    tokens, experts = scores.shape
    ids = balanced_assignment(scores)
    assert (ids.shape, ids.dtype) == ((tokens, 1), torch.int64)
    check_balance(ids, experts)
    if tokens:
        total = float(scores.double().gather(1, ids).sum())
        allowed = tokens * ASSIGNMENT_EPSILON * float(scores.max().double() - scores.min().double())
        assert best_total(scores) - total <= allowed + 1e-9 * tokens


def check_balance(ids: Tensor, experts: int) -> None:
    least, rest = divmod(len(ids), experts)
    counts = torch.bincount(ids[:, 0], minlength=experts)
    assert sorted(counts.tolist()) == [least] * (experts - rest) + [least + 1] * rest


@st.composite
def any_scores(draw: st.DrawFn) -> Tensor:
    torch.manual_seed(draw(st.integers(0, 99)))
    tokens, experts = draw(st.sampled_from([0, 1, 2, 3, 7, 12, 31])), draw(st.sampled_from([1, 2, 3, 5, 8]))
    kind = draw(st.sampled_from(["independent", "rank one", "few kinds of tokens", "integers", "equal"]))
    scores = {
        "independent": torch.randn(tokens, experts),
        "rank one": torch.randn(tokens, 1) * torch.randn(experts),
        "few kinds of tokens": torch.randn(2, experts)[torch.randint(0, 2, (tokens,))],
        "integers": torch.randint(-2, 3, (tokens, experts)).float(),
        "equal": torch.ones(tokens, experts),
    }[kind].to(draw(st.sampled_from(DTYPES)))
    return scores.mT.contiguous().mT if draw(st.booleans()) else scores


@given(any_scores())
def test_any_scores(scores: Tensor) -> None:
    check(scores)


@pytest.mark.native
@pytest.mark.parametrize(("tokens", "experts"), [(512, 16), (509, 16), (400, 97)])
def test_many_tokens(tokens: int, experts: int) -> None:
    torch.manual_seed(0)
    check(torch.randn(tokens, experts))
    check(torch.randn(tokens, 2) @ torch.randn(2, experts))


def test_numbers_that_are_not_finite() -> None:
    torch.manual_seed(0)
    scores = torch.randn(9, 4)
    bad, plain = scores.clone(), scores.clone()
    bad[0, 0], bad[1, 1], bad[2], bad[3, 2] = torch.nan, -torch.inf, torch.nan, torch.inf
    plain[0, 0], plain[1, 1], plain[2], plain[3, 2] = torch.nan, torch.nan, torch.nan, -torch.nan
    finite = plain[plain.isfinite()]
    plain = plain.nan_to_num(nan=float(finite.min()))
    plain[3, 2] = finite.max()
    assert torch.equal(balanced_assignment(bad), balanced_assignment(plain))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_nothing_to_tell_apart(value: float) -> None:
    check_balance(balanced_assignment(torch.full((7, 3), value)), 3)


def test_same_again() -> None:
    scores = torch.randn(40, 8)
    assert torch.equal(balanced_assignment(scores), balanced_assignment(scores))


@pytest.mark.parametrize("tokens", [3, 24, 29])
@pytest.mark.parametrize("bids", [0, 1, 2])
def test_an_auction_that_is_broken_off_still_balances(bids: int, tokens: int) -> None:
    scores = torch.randn(tokens, 1) * torch.randn(8)
    ids = torch.ops.layerzoo.moe_balanced_assignment(scores, ASSIGNMENT_EPSILON, bids)
    check_balance(ids, 8)
    assert scores.gather(1, ids).sum() > scores.mean() * tokens


def test_scores_that_need_a_gradient_stay_as_they_are() -> None:
    scores = torch.randn(6, 3, requires_grad=True)
    before = scores.detach().clone()
    ids = balanced_assignment(scores)
    assert not ids.requires_grad
    assert torch.equal(scores, before)
    out = moe_experts(torch.randn(6, 4), ids, scores.gather(1, ids), torch.randn(3, 10, 4), torch.randn(3, 4, 5))
    out.sum().backward()
    assert scores.grad is not None
    assert (scores.grad != 0).sum() == 6


def test_opcheck() -> None:
    given = (torch.randn(7, 3), ASSIGNMENT_EPSILON, ASSIGNMENT_BIDS)
    torch.library.opcheck(torch.ops.layerzoo.moe_balanced_assignment.default, given)


@pytest.mark.slow
def test_compile_without_graph_breaks() -> None:
    torch._dynamo.reset()
    scores = torch.randn(13, 4)
    compiled = torch.compile(balanced_assignment, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(scores), balanced_assignment(scores))


@pytest.mark.native
def test_the_kernel_runs() -> None:
    before = _native.calls("moe_balanced_assignment")
    balanced_assignment(torch.randn(4, 2))
    assert _native.calls("moe_balanced_assignment") == before + 1


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ([1.0], TypeError, "scores must be a tensor, got list"),
        (torch.zeros(4), ValueError, r"scores must have shape \(T, E\), got \(4,\)"),
        (torch.zeros(4, 2).long(), TypeError, "scores must have dtype float32, .*got int64"),
        (torch.zeros(4, 0), ValueError, "scores must have at least one expert, got 0"),
    ],
)
def test_bad_input(scores: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"balanced_assignment: {message}"):
        balanced_assignment(scores)
