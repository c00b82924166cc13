"""nn.DEMix and nn.DomainPosterior: the kit, sequences one by one, experts added and removed, Bayes by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from layerzoo.nn import DEMix, DomainPosterior
from layerzoo.testing import conformance

from .digits import train

pytestmark = pytest.mark.usefixtures("one_thread")

test_demix = conformance(
    "moe/demix", inputs={"hidden_states": torch.linspace(-2, 2, 112).view(2, 7, 8), "domain": torch.tensor([2, 0])}
)


def by_loops(layer: DEMix, x: Tensor, domains: list[int]) -> Tensor:
    p = layer.experts
    rows = []
    for sequence, d in zip(x, domains, strict=True):
        inner = F.gelu(torch.stack([p.w13[d] @ token for token in sequence]) + p.b13[d])
        rows.append(torch.stack([p.w2[d] @ token for token in inner]) + p.b2[d])
    return torch.stack(rows)


def layer_and_input() -> tuple[DEMix, Tensor]:
    torch.manual_seed(0)
    return DEMix(6, 3, 10).double(), torch.randn(4, 5, 6).double()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_sequence_by_its_domain(dtype: torch.dtype) -> None:
    layer, x = layer_and_input()
    domains = [2, 0, 0, 1]
    assert_close(layer(x, torch.tensor(domains, dtype=dtype)), by_loops(layer, x, domains), rtol=1e-9, atol=1e-9)
    assert_close(layer(x, 1), by_loops(layer, x, [1] * 4), rtol=1e-9, atol=1e-9)
    assert layer(x[:0], torch.zeros(0, dtype=dtype)).shape == (0, 5, 6)


def test_other_domains_get_no_gradient() -> None:
    layer, x = layer_and_input()
    layer(x, 1).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert [bool(grad.abs().sum() > 0) for grad in parameter.grad] == [False, True, False]


def test_experts_come_and_go() -> None:
    layer, x = layer_and_input()
    domain = torch.tensor([2, 0, 0, 1])
    before = layer(x, domain)
    assert layer.add_expert(copy_from=2) == 3
    assert layer.num_domains == 4
    assert torch.equal(layer(x, domain), before)
    assert torch.equal(layer(x, 3), layer(x, 2))
    assert layer.add_expert() == 4
    assert not torch.equal(layer(x, 4), layer(x, 2))
    assert all(p.requires_grad and p.shape[0] == 5 for p in layer.parameters())
    layer.remove_expert(3)
    layer.remove_expert(3)
    assert torch.equal(layer(x, domain), before)
    kept = layer(x, 2)
    layer.remove_expert(0)
    assert torch.equal(layer(x, 1), kept)


def test_state_dict() -> None:
    layer, x = layer_and_input()
    other = DEMix(6, 3, 10).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, 2), layer(x, 2))


def test_posterior_by_hand() -> None:
    posterior = DomainPosterior(torch.tensor([1.0, 3.0]))
    assert posterior.probabilities[0].tolist() == pytest.approx([0.25, 0.75])
    seen = [(0.5, 0.1), (0.9, 0.2)]
    for p, q in seen:
        got = posterior.update(torch.tensor([[math.log(p), math.log(q)]]))
    joint = [0.25 * 0.5 * 0.9, 0.75 * 0.1 * 0.2]
    assert got[0].tolist() == pytest.approx([j / sum(joint) for j in joint])
    nexts = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]])
    mixed = [sum(j / sum(joint) * nexts[0, d, c].item() for d, j in enumerate(joint)) for c in range(2)]
    assert posterior.mix(nexts.log()).exp()[0].tolist() == pytest.approx(mixed)
    assert_close(posterior.mix(nexts.log(), top_k=1), nexts[:, 0].log())
    assert_close(posterior.mix(nexts.log(), top_k=2), posterior.mix(nexts.log()))


def test_certainty_is_one_domain() -> None:
    torch.manual_seed(0)
    posterior, log_probs = DomainPosterior(torch.tensor([0.0, 1, 0])), torch.randn(2, 3, 5).log_softmax(2)
    assert_close(posterior.mix(log_probs), log_probs[:, 1], rtol=0, atol=0)
    assert posterior.update(torch.randn(2, 3)).tolist() == [[0, 1, 0]] * 2


def test_thousands_of_tokens_stay_finite() -> None:
    posterior = DomainPosterior(3)
    for _ in range(3000):
        posterior.update(torch.tensor([[-9.0, -9.01, -30.0]]))
    assert posterior.probabilities[0].tolist() == pytest.approx([1, 0, 0], abs=1e-6)


class Bigrams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mixture, self.head = nn.Embedding(12, 16), DEMix(16, 2, 32), nn.Linear(16, 12)

    def forward(self, ids: Tensor, domain: Tensor | int) -> Tensor:
        x = self.embed(ids)
        y: Tensor = self.head(x + self.mixture(x, domain)).log_softmax(2)
        return y


@pytest.mark.slow
def test_experts_removed_bitwise_and_posterior_beats_the_wrong_expert() -> None:
    """The catalogue's check: in each domain one token follows another by a rule of its own, nine times of ten."""
    torch.manual_seed(0)
    rules, model = torch.stack([torch.randperm(12), torch.randperm(12)]), Bigrams()

    def texts(domain: Tensor, length: int = 12) -> Tensor:
        ids = [torch.randint(12, (len(domain),))]
        for _ in range(length):
            noise, follow = torch.randint(12, (len(domain),)), rules[domain, ids[-1]]
            ids.append(torch.where(torch.rand(len(domain)) < 0.9, follow, noise))
        return torch.stack(ids, 1)

    def loss() -> Tensor:
        domain = torch.randint(2, (64,))
        ids = texts(domain)
        return F.nll_loss(model(ids[:, :-1], domain).flatten(0, 1), ids[:, 1:].flatten())

    losses = train(loss, list(model.parameters()), 300, 1e-2)
    assert losses[-1] < 0.5 * losses[0]

    domain = torch.randint(2, (100,))
    ids = texts(domain)
    with torch.no_grad():
        before = model(ids[:, :-1], domain)
        model.mixture.add_expert(copy_from=0)
        model.mixture.remove_expert(2)
        assert torch.equal(model(ids[:, :-1], domain), before)

        runs = torch.stack([model(ids[:, :-1], d) for d in range(2)], 1)  # (text, domain, step, token)
        posterior, mixed = DomainPosterior(2), []
        for step in range(runs.shape[2]):
            mixed.append(posterior.mix(runs[:, :, step]).gather(1, ids[:, step + 1, None]))
            posterior.update(runs[:, :, step].gather(2, ids[:, None, step + 1, None].expand(-1, 2, 1)).squeeze(2))
        rows = torch.arange(100)

        def nll(chosen: Tensor) -> float:
            return float(F.nll_loss(runs[rows, chosen].flatten(0, 1), ids[:, 1:].flatten()))

        right, wrong, unknown = nll(domain), nll(1 - domain), -float(torch.stack(mixed).mean())
    assert (posterior.probabilities.argmax(1) == domain).float().mean() > 0.95
    assert right < unknown < 0.5 * (right + wrong), (right, unknown, wrong)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: DEMix(6, 0),
            ValueError,
            "hidden_size, intermediate_size and num_experts must be positive, got 6, 24 ",
        ),
        (lambda: DEMix(6, 3)(torch.ones(2, 6), 0), ValueError, "must have shape (batch, length, hidden_size = 6), got"),
        (lambda: DEMix(6, 3)(torch.ones(2, 4, 6), 3), ValueError, "DEMix: domain must be in [0, 3), got 3"),
        (
            lambda: DEMix(6, 3)(torch.ones(2, 4, 6), torch.zeros(3).long()),
            ValueError,
            "domain must have shape (batch,)",
        ),
        (lambda: DEMix(6, 3)(torch.ones(1, 4, 6), torch.tensor([3])), RuntimeError, "ids must be in [0, 3]"),
        (lambda: DEMix(6, 3).add_expert(3), ValueError, "domain must be in [0, 3), got 3"),
        (lambda: DEMix(6, 3).remove_expert(-1), ValueError, "domain must be in [0, 3), got -1"),
        (lambda: DEMix(6, 1).remove_expert(0), ValueError, "remove_expert needs two domains or more, got 1"),
        (
            lambda: DomainPosterior(torch.zeros(2)),
            ValueError,
            "prior must be (domains,), not negative and not all zero",
        ),
        (
            lambda: DomainPosterior(2).update(torch.ones(1, 3)),
            ValueError,
            "log_likelihood must have shape (batch, domai",
        ),
        (lambda: DomainPosterior(2).mix(torch.ones(1, 2, 4), 3), ValueError, "top_k must be in [1, 2], got 3"),
    ],
)
def test_bad_input(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
