"""nn.MultiGateMoE and nn.TaskUncertainty: the kit, tasks and experts as loops, and the catalogue's check."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from layerzoo.nn import MultiGateMoE, TaskUncertainty
from layerzoo.testing import conformance

from .digits import train

pytestmark = pytest.mark.usefixtures("one_thread")

test_multi_gate_moe = conformance("moe/multi_gate_moe")


def by_loops(layer: MultiGateMoE, x: Tensor) -> Tensor:
    """One row, or with temporal one sequence, at a time."""
    tasks = []
    for task in range(layer.num_tasks):
        rows = []
        for row in x:
            seen = row
            if layer.summary is not None:
                seen = torch.zeros_like(row[0])
                for token in row:
                    forget, value = layer.summary(token).split(len(token))
                    forget = 1 / (1 + torch.exp(-forget))
                    seen = forget * seen + (1 - forget) * value
            scores = [layer.gates.weight[task * len(layer.experts) + e] @ seen for e in range(len(layer.experts))]
            powers = [math.exp(score) for score in scores]
            mixed = [p / sum(powers) * expert(row) for p, expert in zip(powers, layer.experts, strict=True)]
            rows.append(torch.stack(mixed).sum(0))
        tasks.append(torch.stack(rows))
    return torch.stack(tasks)


@pytest.mark.parametrize("temporal", [False, True])
def test_the_formula(temporal: bool) -> None:
    torch.manual_seed(0)
    layer = MultiGateMoE(5, 3, 4, 2, 7, temporal).double()
    nn.init.normal_(layer.gates.weight)
    x = torch.randn(*((6, 9, 5) if temporal else (6, 5))).double()
    with torch.no_grad():
        assert_close(layer(x), by_loops(layer, x), rtol=1e-9, atol=1e-9)


def test_leading_dimensions() -> None:
    torch.manual_seed(0)
    layer, x = MultiGateMoE(5, 3, 4, 2), torch.randn(2, 3, 4, 5)
    assert layer(x).shape == (3, 2, 3, 4, 2)
    assert_close(layer(x).flatten(1, 3), layer(x.flatten(0, 2)))
    assert_close(layer.route(x).sum(-1), torch.ones(3, 2, 3, 4))


def test_around_any_modules() -> None:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(20, 3)), nn.Sequential(nn.Flatten(), nn.Linear(20, 3))]
    layer, x = MultiGateMoE.around(experts, 5, temporal=True).double(), torch.randn(6, 4, 5).double()
    weights, outputs = layer.route(x), torch.stack([expert(x) for expert in experts])
    assert_close(layer(x), torch.einsum("tbe,ebo->tbo", weights, outputs))
    before = layer(x)
    layer.reset_parameters()
    assert not torch.equal(layer(x), before)


def test_the_summary_is_causal_and_reads_all() -> None:
    torch.manual_seed(0)
    layer, x = MultiGateMoE(5, temporal=True).double(), torch.randn(1, 6, 5).double().requires_grad_()
    (grad,) = torch.autograd.grad(layer.route(x)[0, 0, 0], x)
    assert (grad.abs().sum(2) > 0).all()


def test_each_gate_is_of_its_task() -> None:
    torch.manual_seed(0)
    layer, x = MultiGateMoE(5, 3, 4), torch.randn(6, 5)
    (grad,) = torch.autograd.grad(layer(x)[1].square().sum(), layer.gates.weight)
    assert [bool(g.abs().sum() > 0) for g in grad.view(3, 4, 5)] == [False, True, False]


@pytest.mark.parametrize("temporal", [False, True])
def test_gradients_and_state_dict(temporal: bool) -> None:
    torch.manual_seed(0)
    layer, x = MultiGateMoE(4, 2, 3, 2, 5, temporal).double(), torch.randn(2, 3, 4).double().requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()), fast_mode=True)
    other = MultiGateMoE(4, 2, 3, 2, 5, temporal).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


class Shared(nn.Module):
    """As many weights below the towers, for all tasks alike."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, inner), nn.ReLU(), nn.Linear(inner, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x).expand(2, -1, -1)
        return y


def error(layer: nn.Module) -> float:
    """Of two tasks that want other things of the same input: the one what the other must ignore."""
    torch.manual_seed(0)
    towers = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    directions = torch.randn(2, 3, 8)

    def loss() -> Tensor:
        x = torch.randn(128, 8)
        wanted = [torch.sin(2 * x @ d[0]) + torch.relu(x @ d[1]) * torch.sign(x @ d[2]) for d in directions]
        got = [tower(y).squeeze(1) for tower, y in zip(towers, layer(x), strict=True)]
        return torch.stack([(a - b).square().mean() for a, b in zip(got, wanted, strict=True)]).sum()

    losses = train(loss, [*layer.parameters(), *towers.parameters()], 800, 5e-3)
    return sum(losses[-100:]) / 100


@pytest.mark.slow
def test_einsum_conflicting_tasks_and_learned_uncertainty() -> None:
    """The catalogue's check."""
    torch.manual_seed(0)
    layer, x = MultiGateMoE(8, 2, 6, 4, 16), torch.randn(5, 8)
    outputs = torch.stack([expert(x) for expert in layer.experts])
    assert_close(layer(x), torch.einsum("tbe,ebo->tbo", layer.route(x), outputs))
    shared = Shared(105)
    sizes = [sum(p.numel() for p in module.parameters()) for module in (layer, shared)]
    assert sizes[1] >= sizes[0], sizes
    ours, theirs = error(layer), error(shared)
    assert ours < theirs, (ours, theirs)

    combine = TaskUncertainty(3)
    spread = torch.tensor([0.5, 1.0, 3.0])
    train(lambda: combine((spread * torch.randn(256, 3)).square().mean(0)), list(combine.parameters()), 600, 2e-2)
    assert_close(combine.log_variance.detach(), spread.square().log(), rtol=0, atol=0.15)


def test_uncertainty_by_hand() -> None:
    combine = TaskUncertainty(2)
    assert combine(torch.tensor([2.0, 3.0])).item() == 5
    with torch.no_grad():
        combine.log_variance.copy_(torch.tensor([1.0, -1.0]))
    assert combine(torch.tensor([2.0, 3.0])).item() == pytest.approx(2 / math.e + 3 * math.e)
    combine.reset_parameters()
    assert combine(torch.tensor([2.0, 3.0])).item() == 5


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MultiGateMoE(0), "hidden_size, output_size and intermediate_size must be positive, got 0, 0 and 0"),
        (lambda: MultiGateMoE(4, 0), "num_experts and num_tasks must be positive, got 4 and 0"),
        (lambda: MultiGateMoE.around([], 4), "num_experts and num_tasks must be positive, got 0 and 2"),
        (lambda: MultiGateMoE(4)(torch.ones(2, 3)), "x must have shape (batch, ..., hidden_size = 4), got (2, 3)"),
        (
            lambda: MultiGateMoE(4, temporal=True)(torch.ones(2, 4)),
            "shape (batch, length >= 1, hidden_size = 4), got (2,",
        ),
        (lambda: MultiGateMoE(4, temporal=True)(torch.ones(2, 0, 4)), "length >= 1, hidden_size = 4), got (2, 0, 4)"),
        (lambda: TaskUncertainty(0), "num_tasks must be at least 1, got 0"),
        (lambda: TaskUncertainty(2)(torch.ones(3)), "losses must have shape (2,), got (3,)"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
