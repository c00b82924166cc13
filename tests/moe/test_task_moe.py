"""nn.TaskMoE: the kit, tokens one by one through the gate of their task, and the catalogue's check."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from layerzoo.nn import TaskMoE
from layerzoo.testing import conformance

from .digits import TRAIN, digits, train

pytestmark = pytest.mark.usefixtures("one_thread")

test_task_moe = conformance(
    "moe/task_moe",
    inputs={"hidden_states": torch.linspace(-2, 2, 112).sin().view(2, 7, 8), "task": torch.tensor([1, 0])},
)


def by_loops(layer: TaskMoE, x: Tensor, tasks: list[int]) -> Tensor:
    p, experts = layer.experts, layer.router.num_experts
    rows = []
    for sequence, task in zip(x, tasks, strict=True):
        for token in sequence:
            logits = layer.router.weight[task * experts : (task + 1) * experts] @ token
            best, chosen = logits.topk(layer.router.top_k)
            y = torch.zeros_like(token)
            for w, e in zip(best.softmax(0), chosen.tolist(), strict=True):
                y = y + w * (p.w2[e] @ F.gelu(p.w13[e] @ token + p.b13[e]) + p.b2[e])
            rows.append(y)
    return torch.stack(rows).view(x.shape)


def layer_and_input() -> tuple[TaskMoE, Tensor]:
    torch.manual_seed(0)
    layer = TaskMoE(6, 3, 5, 2, 10).double().eval()
    nn.init.normal_(layer.router.weight)
    return layer, torch.randn(4, 5, 6).double()


def test_the_formula() -> None:
    layer, x = layer_and_input()
    tasks = [2, 0, 0, 1]
    assert_close(layer(x, torch.tensor(tasks)), by_loops(layer, x, tasks), rtol=1e-9, atol=1e-9)
    assert_close(layer(x, 1), by_loops(layer, x, [1] * 4), rtol=1e-9, atol=1e-9)


def test_the_task_matters_and_only_its_gate_learns() -> None:
    layer, x = layer_and_input()
    assert not torch.allclose(layer(x, 0), layer(x, 1))
    y, routing = layer(x, 1, return_routing=True)
    (y.square().sum() + routing.losses["importance"]).backward()
    assert layer.router.weight.grad is not None
    assert [bool(g.abs().sum() > 0) for g in layer.router.weight.grad.view(3, 5, 6)] == [False, True, False]


def test_state_dict() -> None:
    layer, x = layer_and_input()
    other = TaskMoE(6, 3, 5, 2, 10).double().eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, 2), layer(x, 2))


class Dense(nn.Module):
    """Knows the task by a vector that is added."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.tasks = nn.Embedding(2, 64)
        self.mlp = nn.Sequential(nn.Linear(64, inner), nn.GELU(), nn.Linear(inner, 64))

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        y: Tensor = self.mlp(x + self.tasks(task).unsqueeze(1))
        return y


def accuracy(layer: nn.Module) -> float:
    """Of two tasks on digits: to name the digit, and to give it another one's name by a fixed code."""
    images, answers = digits()
    x = images.flatten(1)
    answers = torch.stack([answers, (answers * 7 + 3) % 10])
    torch.manual_seed(0)
    head = nn.Linear(64, 10)

    def logits(rows: Tensor, task: Tensor) -> Tensor:
        y: Tensor = head(layer(x[rows].unsqueeze(1), task).squeeze(1))
        return y

    def loss() -> Tensor:
        rows, task = torch.randint(TRAIN, (64,)), torch.randint(2, (64,))
        return F.cross_entropy(logits(rows, task), answers[task, rows])

    train(loss, [*layer.parameters(), *head.parameters()], 400, 3e-3)
    layer.eval()
    rows = torch.arange(TRAIN, len(x))
    with torch.no_grad():
        right = [logits(rows, torch.full_like(rows, k)).argmax(1) == answers[k, rows] for k in range(2)]
    return float(torch.cat(right).float().mean())


@pytest.mark.slow
def test_loops_experts_of_one_task_and_two_tasks_on_digits() -> None:
    """The catalogue's check. The dense twin has as many inner neurons as a token meets."""
    test_the_formula()
    layer, x = layer_and_input()
    y, routing = layer(x[:1, :1], 1, return_routing=True)
    chosen = set(routing.ids.flatten().tolist())
    assert len(chosen) == layer.router.top_k
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter[[e for e in range(5) if e not in chosen]] = torch.nan
    assert torch.equal(layer(x[:1, :1], 1), y)
    torch.manual_seed(0)
    sparse, dense = accuracy(TaskMoE(64, 2, 8, 2, 32)), accuracy(Dense(64))
    assert sparse > 0.85, (sparse, dense)
    assert sparse >= dense, (sparse, dense)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: TaskMoE(6, 0), ValueError, "num_gates must be positive"),
        (lambda: TaskMoE(6, 2, 3, 4), ValueError, "got 6, 3, 4 and 2"),
        (
            lambda: TaskMoE(6, 2)(torch.ones(2, 6), 0),
            ValueError,
            "must have shape (batch, length, hidden_size = 6), got",
        ),
        (lambda: TaskMoE(6, 2)(torch.ones(2, 4, 6), 2), ValueError, "TaskMoE: task must be in [0, 2), got 2"),
        (
            lambda: TaskMoE(6, 2)(torch.ones(2, 4, 6), torch.zeros(3).long()),
            ValueError,
            "task must have shape (batch,)",
        ),
        (
            lambda: TaskMoE(6, 2)(torch.ones(1, 4, 6), torch.ones(1)),
            TypeError,
            "task must be int32 or int64, got torch.f",
        ),
        (lambda: TaskMoE(6, 2)(torch.ones(1, 4, 6), torch.tensor([2])), RuntimeError, "out of bounds"),
    ],
)
def test_bad_input(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
