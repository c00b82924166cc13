"""nn.ConvMoE: the kit, images one by one, its two ways to compute, and the catalogue's check."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from layerzoo.nn import ConvMoE
from layerzoo.testing import conformance

from .digits import TRAIN, digits, train

pytestmark = pytest.mark.usefixtures("one_thread")

test_conv_moe = conformance("moe/conv_moe")


def by_images(layer: ConvMoE, images: Tensor) -> Tensor:
    """Each image alone: the gate by hand, then the weighted sum of the experts it chose."""
    outputs = []
    for image in images:
        mean = image.flatten(1).sum(1) / image[0].numel()
        logits = (layer.router.weight @ mean).tolist()
        chosen = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[: layer.router.top_k]
        weights = torch.tensor([logits[e] for e in chosen], dtype=torch.float64).exp()
        parts = [w / weights.sum() * layer.experts[e](image[None])[0] for e, w in zip(chosen, weights, strict=True)]
        outputs.append(torch.stack(parts).sum(0))
    return torch.stack(outputs)


def layer_and_images(**config: Any) -> tuple[ConvMoE, Tensor]:
    torch.manual_seed(0)
    layer = ConvMoE(**{"in_channels": 4, "num_experts": 5} | config).double().eval()
    nn.init.normal_(layer.router.weight, std=3.0)
    return layer, torch.randn(6, 4, 5, 7).double()


@pytest.mark.parametrize("config", [{}, {"top_k": 1}, {"top_k": 5}, {"out_channels": 3, "stride": 2, "kernel_size": 1}])
def test_the_formula(config: dict[str, int]) -> None:
    layer, images = layer_and_images(**config)
    expected = by_images(layer, images)
    assert_close(layer(images), expected, rtol=1e-9, atol=1e-9)
    assert_close(layer._all(images, layer.router(images.mean((2, 3)))), expected, rtol=1e-9, atol=1e-9)


def test_only_the_chosen_experts_run() -> None:
    layer, images = layer_and_images(top_k=1)
    seen = torch.zeros(5, dtype=torch.int64)
    for index, expert in enumerate(layer.experts):
        expert.register_forward_hook(lambda _m, inputs, _o, e=index: seen[e].add_(len(inputs[0])))
    _, routing = layer(images, return_routing=True)
    assert torch.equal(seen, routing.counts)
    assert seen.sum() == 6
    assert (seen == 0).any()


def test_gradients_of_both_ways_agree() -> None:
    layer, images = layer_and_images()
    images.requires_grad_()
    inputs = [images, *layer.parameters()]
    [chosen, every] = [
        torch.autograd.grad(way(images, layer.router(images.mean((2, 3)))).square().sum(), inputs, allow_unused=True)
        for way in (layer._chosen, layer._all)
    ]
    for one, other in zip(chosen, every, strict=True):
        if other is not None:
            assert_close(torch.zeros_like(other) if one is None else one, other, rtol=1e-9, atol=1e-9)
    assert chosen[0] is not None
    assert layer.router.weight.grad is None


def test_around_any_modules() -> None:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)) for _ in range(3)]
    layer, images = ConvMoE.around(experts, 3, top_k=3, noisy=False).train(), torch.randn(4, 3, 6, 6)
    assert list(layer.experts) == experts
    y, routing = layer(images, return_routing=True)
    expected = sum(w[:, None, None, None] * e(images) for w, e in zip(routing.dense().mT, experts, strict=True))
    assert_close(y, expected)
    before = [p.clone() for p in layer.parameters()]
    layer.reset_parameters()
    assert not torch.equal(before[0], next(layer.parameters()))


def test_state_dict() -> None:
    layer, images = layer_and_images()
    other = ConvMoE(4, 5).double().eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(images), layer(images))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixture = nn.Conv2d(1, 8, 3, 2, 1), ConvMoE(8, 4, top_k=1)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Any]:
        y, routing = self.mixture(self.stem(images).relu(), return_routing=True)
        return self.head(y.mean((2, 3))), routing


def trained(coefficient: float, steps: int = 400) -> Net:
    images, answers = digits()
    torch.manual_seed(0)
    net = Net()
    nn.init.normal_(net.mixture.router.weight, std=2.0)  # uneven at first

    def loss() -> Tensor:
        rows = torch.randint(TRAIN, (64,))
        logits, routing = net(images[rows])
        extra = routing.losses["importance"] + routing.losses["load"]
        return nn.functional.cross_entropy(logits, answers[rows]) + coefficient * extra

    train(loss, list(net.parameters()), steps, 5e-3)
    return net.eval()


def entropy(joint: Tensor) -> float:
    """Of the expert, given the class: joint counts (class, expert)."""
    p = joint / joint.sum(1, keepdim=True)
    return float((-torch.special.xlogy(p, p).sum(1) * joint.sum(1)).sum() / joint.sum())


@pytest.mark.slow
def test_weighted_sum_balance_and_experts_by_class() -> None:
    """The catalogue's check."""
    layer, images = layer_and_images(num_experts=3, top_k=3)
    weights = (images.mean((2, 3)) @ layer.router.weight.mT).softmax(1)
    expected = sum(weights[:, e, None, None, None] * layer.experts[e](images) for e in range(3))
    assert_close(layer(images), expected)

    images, answers = digits()
    images, answers = images[TRAIN:], answers[TRAIN:]
    spread = []
    for coefficient in (0.0, 0.5):
        net = trained(coefficient)
        logits, routing = net(images)
        spread.append(float(routing.counts.double().std() / routing.counts.double().mean()))
    assert spread[1] < 0.6 * spread[0], spread
    assert (logits.argmax(1) == answers).float().mean() > 0.8
    joint, shuffled = torch.zeros(10, 4), torch.zeros(10, 4)
    for rows, table in ((answers, joint), (answers[torch.randperm(len(answers))], shuffled)):
        table.index_put_((rows, routing.ids[:, 0]), torch.ones(len(rows)), accumulate=True)
    assert entropy(joint) < 0.9 * entropy(shuffled), (entropy(joint), entropy(shuffled))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: ConvMoE(0),
            "ConvMoE: in_channels, out_channels and stride must be positive and kernel_size odd, go",
        ),
        (lambda: ConvMoE(4, kernel_size=2), "kernel_size odd, got 4, 4, 1 and 2"),
        (lambda: ConvMoE(4, 2, 3), "num_experts, got 4, 2, 3 and 1"),
        (
            lambda: ConvMoE(4)(torch.ones(2, 3, 5, 5)),
            "images must have shape (batch, in_channels = 4, height, width)",
        ),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
