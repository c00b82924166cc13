"""nn.SoftMoE: the kit, the paper's formula as loops, what a mask and the order of tokens do, and learning."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from layerzoo.nn import SoftMoE
from layerzoo.testing import conformance

from .digits import TRAIN, digits, train

pytestmark = pytest.mark.usefixtures("one_thread")

test_soft_moe = conformance("moe/soft_moe")


def by_loops(layer: SoftMoE, x: Tensor) -> Tensor:
    """One sequence (length, hidden_size), token by token and slot by slot, in Python's floats where it sums."""
    p = {name: value.detach().double() for name, value in layer.named_parameters()}
    x, slots, per = x.double(), len(p["phi"]), layer.slots_per_expert
    logits = [[float(p["scale"] * (t @ s) / (t.norm() * s.norm())) for s in p["phi"]] for t in x]
    outputs = []
    for s in range(slots):
        total = sum(math.exp(row[s]) for row in logits)
        inside = sum(math.exp(row[s]) / total * token for row, token in zip(logits, x, strict=True))
        e = s // per
        inner = p["experts.w13"][e] @ inside + p["experts.b13"][e]
        inner = inner * torch.tensor([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in inner.tolist()], dtype=x.dtype)
        outputs.append(p["experts.w2"][e] @ inner + p["experts.b2"][e])
    rows = []
    for row in logits:
        total = sum(map(math.exp, row))
        rows.append(sum(math.exp(v) / total * out for v, out in zip(row, outputs, strict=True)))
    return torch.stack(rows)


def layer_and_input(**config: Any) -> tuple[SoftMoE, Tensor]:
    torch.manual_seed(0)
    layer = SoftMoE(**{"hidden_size": 6, "num_experts": 3, "slots_per_expert": 2} | config).double()
    with torch.no_grad():
        layer.scale.fill_(2.5)
    return layer, torch.randn(2, 5, 6).double()


def test_the_formula() -> None:
    layer, x = layer_and_input()
    expected = torch.stack([by_loops(layer, sequence) for sequence in x])
    assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    assert_close(layer.float()(x.float()), expected.float(), rtol=1e-4, atol=1e-5)


def test_both_sides_are_averages() -> None:
    layer, x = layer_and_input()
    dispatch, combine = layer.route(x)
    assert dispatch.shape == combine.shape == (2, 5, 6)
    assert_close(dispatch.sum(1), torch.ones(2, 6).double())
    assert_close(combine.sum(2), torch.ones(2, 5).double())
    longer = layer.route(x * torch.rand(2, 5, 1).double().add(0.1))[0]
    assert_close(longer, dispatch)  # the length of a token does not count


def test_order_and_neighbours() -> None:
    layer, x = layer_and_input()
    order = torch.tensor([3, 0, 4, 2, 1])
    assert_close(layer(x[:, order]), layer(x)[:, order])
    assert_close(layer(x[1:]), layer(x)[1:])


@pytest.mark.parametrize("padding", [0.0, 1e6, float("nan"), float("inf")])
def test_padding_has_no_effect(padding: float) -> None:
    layer, x = layer_and_input()
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    filled = x.masked_fill(~mask.unsqueeze(2), padding).requires_grad_()
    y = layer(filled, mask)
    assert_close(y[:1], layer(x[:1]))
    assert_close(y[1:, :3], layer(x[1:, :3]))
    assert (y[1, 3:] == 0).all()
    (grad,) = torch.autograd.grad(y.square().sum(), filled)
    assert grad.isfinite().all()
    assert (grad[1, 3:] == 0).all()


def test_a_row_of_nothing_but_padding_is_zero() -> None:
    layer, x = layer_and_input()
    mask = torch.tensor([[True] * 5, [False] * 5])
    y = layer(x, mask)
    y.sum().backward()
    assert (y[1] == 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_gradients_with_a_mask() -> None:
    layer, x = layer_and_input(intermediate_size=4)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    leaves = (x.requires_grad_(), *layer.parameters())
    torch.autograd.gradcheck(lambda x, *_: layer(x, mask), leaves, fast_mode=True)


def test_state_dict() -> None:
    layer, x = layer_and_input()
    other = SoftMoE(6, 3, 2).double()
    assert set(layer.state_dict()) == {"phi", "scale", *(f"experts.{n}" for n in ("w13", "b13", "w2", "b2"))}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    other.reset_parameters()
    assert not torch.equal(other(x), layer(x))


@pytest.mark.slow
def test_it_learns_digits() -> None:
    images, answers = digits()
    patches = images.squeeze(1).unfold(1, 2, 2).unfold(2, 2, 2)
    x = patches.flatten(1, 2).flatten(2)  # 16 tokens of 4 pixels
    torch.manual_seed(0)
    embed, head = nn.Linear(4, 24), nn.Linear(24, 10)
    place = nn.Parameter(0.5 * torch.randn(16, 24))
    mixtures = nn.ModuleList(SoftMoE(24, 8, 2, 48) for _ in range(2))
    norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(2))
    modules = nn.ModuleList([embed, head, mixtures, norms])

    def logits(x: Tensor) -> Tensor:
        tokens = embed(x) + place
        for mixture, norm in zip(mixtures, norms, strict=True):
            tokens = tokens + mixture(norm(tokens))
        y: Tensor = head(tokens.mean(1))
        return y

    def loss() -> Tensor:
        rows = torch.randint(TRAIN, (64,))
        return nn.functional.cross_entropy(logits(x[rows]), answers[rows])

    train(loss, [place, *modules.parameters()], 500, 3e-3)
    with torch.no_grad():
        accuracy = float((logits(x[TRAIN:]).argmax(1) == answers[TRAIN:]).float().mean())
    assert accuracy > 0.9, accuracy


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: SoftMoE(0, 2), ValueError, "Experts: hidden_size, intermediate_size and num_experts must be positive"),
        (lambda: SoftMoE(8, 2, 0), ValueError, "SoftMoE: slots_per_expert must be at least 1, got 0"),
        (lambda: SoftMoE(8, 2)(torch.ones(2, 8)), ValueError, "hidden_states must have shape (batch, length, hidden_s"),
        (lambda: SoftMoE(8, 2)(torch.ones(2, 3, 8), torch.ones(2, 3)), TypeError, "mask must be bool, got torch.float"),
        (
            lambda: SoftMoE(8, 2)(torch.ones(2, 3, 8), torch.ones(3, 2).bool()),
            ValueError,
            "mask must have shape (batch, length) = (2, 3), got (3, 2)",
        ),
    ],
)
def test_bad_input(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
