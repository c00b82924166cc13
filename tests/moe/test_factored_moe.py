"""nn.FactoredMoE: the kit, both mixtures as loops, the constraint, and what the gates come to know."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from layerzoo.nn import FactoredMoE
from layerzoo.testing import conformance

from .digits import TRAIN, digits, train

pytestmark = pytest.mark.usefixtures("one_thread")

test_factored_moe = conformance("moe/factored_moe")


def mixture_by_loops(mixture: Any, x: Tensor) -> Tensor:
    rows = []
    for row in x:
        inner = (mixture.gate[0].weight @ row + mixture.gate[0].bias).clamp(min=0)
        powers = [math.exp(v) for v in (mixture.gate[2].weight @ inner + mixture.gate[2].bias).tolist()]
        size = len(mixture.experts.bias) // len(powers)
        parts = []
        for e, power in enumerate(powers):
            mine = slice(e * size, (e + 1) * size)
            out = (mixture.experts.weight[mine] @ row + mixture.experts.bias[mine]).clamp(min=0)
            parts.append(power / sum(powers) * out)
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def layer_and_input(**config: Any) -> tuple[FactoredMoE, Tensor]:
    torch.manual_seed(0)
    layer = FactoredMoE(6, 5, 4, **{"num_experts": 3, "gate_size": 7} | config).double()
    for mixture in (layer.first, layer.second):
        nn.init.normal_(mixture.gate[2].weight)
    return layer, torch.randn(8, 6).double()


def test_the_formula() -> None:
    layer, x = layer_and_input()
    layer.eval()
    with torch.no_grad():
        expected = mixture_by_loops(layer.second, mixture_by_loops(layer.first, x))
        assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
        y, weights = layer(x.view(2, 4, 6), return_routing=True)
    assert_close(y.flatten(0, 1), expected, rtol=1e-9, atol=1e-9)
    assert [w.shape for w in weights] == [(2, 4, 3)] * 2
    assert all(torch.allclose(w.sum(-1), torch.ones(2, 4).double()) for w in weights)


def test_who_is_ahead_waits() -> None:
    """The running totals by hand, batch by batch."""
    layer, x = layer_and_input(margin=2.0)
    totals = [0.0] * 3
    blocked = 0
    for _ in range(12):
        free = layer.first.gate(x).softmax(1).tolist()
        ahead = [t - sum(totals) / 3 > 2.0 for t in totals]
        blocked += sum(ahead)
        _, (weights, _) = layer(x, return_routing=True)
        for row, got in zip(free, weights.tolist(), strict=True):
            kept = [0.0 if out else w for out, w in zip(ahead, row, strict=True)]
            assert got == pytest.approx([w / sum(kept) for w in kept], rel=1e-5)
            totals = [t + w for t, w in zip(totals, got, strict=True)]
    assert 0 < blocked < 36
    assert layer.first.totals.tolist() == pytest.approx([t - sum(totals) / 3 for t in totals], abs=1e-3)


def test_no_constraint_in_eval_mode_or_without_balance() -> None:
    layer, x = layer_and_input(margin=1e-3)
    free = layer.eval()(x)
    layer.train()(x)
    before = layer.first.totals.clone()
    assert before.abs().max() > 1e-3
    assert torch.equal(layer.eval()(x), free)
    assert not torch.equal(layer.train()(x), free)
    before = layer.first.totals.clone()
    layer.balance = False
    assert torch.equal(layer(x), free)
    assert torch.equal(layer.first.totals, before)
    layer.reset_parameters()
    assert (layer.first.totals == 0).all()


def test_gradients_under_the_constraint() -> None:
    layer, x = layer_and_input(margin=1e-3)
    layer(x)
    held = [mixture.totals.clone() for mixture in (layer.first, layer.second)]

    def forward(*_: Tensor) -> Tensor:
        for mixture, totals in zip((layer.first, layer.second), held, strict=True):
            mixture.totals.copy_(totals)
        y: Tensor = layer(x)
        return y

    torch.autograd.gradcheck(forward, (x.requires_grad_(), *layer.parameters()), fast_mode=True)


def test_state_dict() -> None:
    layer, x = layer_and_input()
    layer(x)
    other = FactoredMoE(6, 5, 4, 3, 7).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.first.totals, layer.first.totals)
    assert torch.equal(other.eval()(x), layer.eval()(x))


HEAD_START = 3.0


def jittered(rows: Tensor, place: Tensor) -> Tensor:
    """Digits on a field of 12 x 12, in one of its four corners."""
    images, _ = digits()
    field = torch.full((len(rows), 12, 12), -1.0)
    for i, (row, where) in enumerate(zip(rows.tolist(), place.tolist(), strict=True)):
        top, left = 4 * (where // 2), 4 * (where % 2)
        field[i, top : top + 8, left : left + 8] = images[row, 0]
    return field.flatten(1)


def information(weights: Tensor, label: Tensor) -> float:
    """How much the gate's choice says of a label, in nats: the mutual information of the two."""
    joint = torch.stack([weights[label == value].sum(0) for value in label.unique()]) / len(label)
    independent = joint.sum(0, keepdim=True) * joint.sum(1, keepdim=True)
    return float(torch.special.xlogy(joint, joint / independent).sum())


def trained(balance: bool, steps: int = 600) -> tuple[FactoredMoE, nn.Linear]:
    torch.manual_seed(0)
    layer, head = FactoredMoE(144, 20, 20, gate_size=32, balance=balance, margin=50.0), nn.Linear(20, 10)
    with torch.no_grad():  # a head start, as chance may give it
        for mixture in (layer.first, layer.second):
            mixture.gate[2].bias[0] += HEAD_START
    _, answers = digits()
    rows, place = torch.arange(TRAIN).repeat(4), torch.arange(4).repeat_interleave(TRAIN)
    x = jittered(rows, place)
    done = 0

    def loss() -> Tensor:
        nonlocal done
        done += 1
        layer.balance = balance and done < steps // 2
        chosen = torch.randint(len(x), (64,))
        return F.cross_entropy(head(layer(x[chosen])), answers[rows[chosen]])

    train(loss, [*layer.parameters(), *head.parameters()], steps, 3e-3)
    return layer.eval(), head


@pytest.mark.slow
def test_collapse_without_the_constraint_and_what_the_gates_know() -> None:
    """The catalogue's check. One expert of each mixture begins ahead: left alone, one gets nearly everything."""
    rows = torch.arange(TRAIN, 1797)
    place, answers = torch.randint(4, rows.shape, generator=torch.Generator().manual_seed(1)), digits()[1][rows]
    x = jittered(rows, place)
    unbalanced, (layer, head) = trained(False)[0], trained(True)
    with torch.no_grad():
        _, alone = unbalanced(x, return_routing=True)
        y, weights = layer(x, return_routing=True)
    assert (head(y).argmax(1) == answers).float().mean() > 0.8
    assert max(float(w.mean(0).max()) for w in alone) > 0.8
    assert min(float(w.mean(0).min()) for w in weights) > 0.05, [w.mean(0) for w in weights]
    where, what = ([information(w, label) for w in weights] for label in (place, answers))
    assert where[0] > where[1], (where, what)
    assert what[1] > what[0], (where, what)
    assert where[0] > what[0], (where, what)
    assert what[1] > where[1], (where, what)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: FactoredMoE(0, 4, 4), "sizes, num_experts and margin must be positive, got 0, 4, 4, 4, gate_size 32"),
        (lambda: FactoredMoE(4, 4, 4, margin=0.0), "gate_size 32 and 0.0"),
        (lambda: FactoredMoE(4, 4, 4)(torch.ones(2, 3)), "x must have shape (..., input_size = 4), got (2, 3)"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
