"""nn.BiGS: the kit, the paper's formula with recurrences for the passes, and the catalogue's check."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn import BiGS
from layerzoo.testing import conformance

from .oracle import assert_close

test_bigs = conformance("ssm/bigs")


def by_recurrence(block: BiGS, x: Tensor) -> Tensor:
    """The paper's equations, each pass as a recurrence; the reverse one on the sequence turned round."""
    p = dict(block.named_parameters())

    def project(name: str, value: Tensor) -> Tensor:
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    X = F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"])
    turned = X[:, torch.arange(x.shape[1] - 1, -1, -1)]
    u1 = project("forward_mix", block.forward_ssm.step(F.gelu(project("forward_proj", X)))[0])
    u2 = project("backward_mix", block.backward_ssm.step(F.gelu(project("backward_proj", turned)))[0])
    u = F.gelu(project("up_proj", u1 * u2[:, torch.arange(x.shape[1] - 1, -1, -1)]))
    return x + project("out_proj", u * F.gelu(project("value_proj", X)))


def test_the_formula() -> None:
    torch.manual_seed(0)
    block, x = BiGS(12), torch.randn(2, 200, 12)
    assert_close("y", block(x), by_recurrence(block, x), 1e-4)
    block.double()
    assert_close("y", block(x.double()), by_recurrence(block, x.double()), 1e-9)


def test_each_step_sees_both_sides() -> None:
    torch.manual_seed(0)
    block, x = BiGS(8), torch.randn(1, 9, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x)[0, 4].sum(), x)
    assert (grad.abs().sum(2) > 0).all()


def seconds(length: int) -> float:
    block, x = BiGS(32, d_state=16), torch.randn(2, length, 32)
    with torch.no_grad():
        block(x)
        times = []
        for _ in range(5):
            start = time.process_time()
            block(x)
            times.append(time.process_time() - start)
    return min(times)


class Bag(nn.Module):
    """What knows the other tokens, but not where they stand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x.sum(1, keepdim=True)).expand_as(x)
        return y


def masked_token_error(layer: nn.Module, width: int = 32, ids: int = 16, length: int = 16) -> float:
    """Each token at an odd place repeats the one before it, and one of all is masked. The share of wrong guesses."""
    torch.manual_seed(1)
    embed, head = nn.Embedding(ids + 1, width), nn.Linear(width, ids)
    optimizer = torch.optim.AdamW([p for m in (layer, embed, head) for p in m.parameters()], lr=3e-3)

    def run() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(ids, (128, length // 2)).repeat_interleave(2, dim=1)
        rows, place = torch.arange(128), torch.randint(length, (128,))
        answer = tokens[rows, place]
        tokens[rows, place] = ids
        x = embed(tokens) + F.one_hot(torch.arange(length) % 2, width)
        return head(layer(x)[rows, place]), answer

    for _ in range(250):
        logits, answer = run()
        optimizer.zero_grad()
        F.cross_entropy(logits, answer).backward()
        optimizer.step()
    with torch.no_grad():
        tries = [run() for _ in range(4)]
    return float(torch.cat([logits.argmax(1) != answer for logits, answer in tries]).float().mean())


@pytest.mark.slow
def test_recurrence_linear_time_and_masked_tokens() -> None:
    """The catalogue's check. Four times the length may take eight times as long; a quadratic cost takes sixteen."""
    test_the_formula()
    assert seconds(4096) < 8 * seconds(1024)
    torch.manual_seed(0)
    block, bag = masked_token_error(BiGS(32, d_state=16, dt_max=1.0)), masked_token_error(Bag(32))
    assert block < 0.3, f"BiGS: {block:.0%} wrong"
    assert block < bag - 0.2, f"BiGS: {block:.0%} wrong, bag of words: {bag:.0%}"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BiGS(0), "BiGS: d_model and expand must be at least 1, got 0 and 3"),
        (lambda: BiGS(8, d_state=3), "d_state must be even and at least 2, got 3"),
        (lambda: BiGS(8)(torch.ones(2, 8)), "BiGS: hidden_states must have shape (batch, length, d_model = 8), got (2"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
