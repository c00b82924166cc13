"""moefy and nn.MoEfiedFFN: the kit, the dense layer back, experts as loops, and the catalogue's check."""

import inspect
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from layerzoo import restore, swap
from layerzoo.nn import MoEfiedFFN, moefy
from layerzoo.nn.moe.moefy import _balanced
from layerzoo.testing import conformance

from .digits import train

pytestmark = pytest.mark.usefixtures("one_thread")

test_moefied_ffn = conformance("moe/moefied_ffn")


def mlp(hidden: int = 6, inner: int = 24, act: nn.Module | None = None, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    act = nn.ReLU() if act is None else act
    return nn.Sequential(nn.Linear(hidden, inner, bias), act, nn.Linear(inner, hidden, bias)).double()


def by_loops(dense: nn.Sequential, layer: MoEfiedFFN, x: Tensor) -> Tensor:
    """The dense layer, with all neurons silenced but those of the experts whose centres x likes best."""
    up, act, down = dense
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    experts = layer.neurons.view(layer.num_experts, -1).tolist()
    rows = []
    for row in x:
        before = up(row)
        likes = [sum(before[n].item() for n in neurons) / len(neurons) for neurons in experts]
        chosen = sorted(range(len(experts)), key=lambda e: -likes[e])[: layer.top_k]
        kept = torch.zeros_like(before)
        kept[[n for e in chosen for n in experts[e]]] = 1
        rows.append(down(act(before) * kept))
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 5, 6])
def test_the_formula(top_k: int, bias: bool) -> None:
    dense, x = mlp(bias=bias), torch.randn(9, 6).double()
    layer = moefy(dense, 6, top_k)
    assert_close(layer(x), by_loops(dense, layer, x), rtol=1e-9, atol=1e-9)
    assert_close(layer(x.view(3, 3, 6)), layer(x).view(3, 3, 6))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=repr)
def test_all_experts_are_the_dense_layer(act: nn.Module) -> None:
    dense, x = mlp(act=act), torch.randn(9, 6).double()
    layer = moefy(dense, 4, 4)
    assert_close(layer(x), dense(x), rtol=1e-9, atol=1e-9)
    assert layer.activations_kept(x) == pytest.approx(1)


def test_the_way_back_is_exact_and_nothing_is_changed() -> None:
    dense = mlp()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    layer = moefy(dense.eval(), 6, 2)
    assert not layer.training
    assert sorted(layer.neurons.tolist()) == list(range(24))
    assert layer.neurons.tolist() != list(range(24))
    up, down = layer.dense()
    for name, value in (("0.weight", up.weight), ("0.bias", up.bias), ("2.weight", down.weight), ("2.bias", down.bias)):
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        layer.w13.zero_()
        up.weight.zero_()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_activations_kept_by_loops() -> None:
    dense, x = mlp(), torch.randn(9, 6).double()
    layer = moefy(dense, 6, 2)
    kept, total = 0.0, 0.0
    for row in x:
        inner = dense[1](dense[0](row)).abs()
        likes = [dense[0](row)[n].mean().item() for n in layer.neurons.view(6, -1)]
        chosen = sorted(range(6), key=lambda e: -likes[e])[:2]
        total += inner.sum().item()
        kept += sum(inner[layer.neurons.view(6, -1)[e]].sum().item() for e in chosen)
    assert layer.activations_kept(x) == pytest.approx(kept / total)
    assert layer.activations_kept(x[:0]) == 1


def test_planted_groups_are_found() -> None:
    """Neurons of four directions, shuffled, become four experts."""
    torch.manual_seed(0)
    group = torch.arange(4).repeat_interleave(8)[torch.randperm(32)]
    dense = mlp(6, 32, bias=False)
    with torch.no_grad():
        dense[0].weight.copy_(3 * torch.eye(6)[group] + 0.1 * torch.randn(32, 6))
    found = group[moefy(dense, 4, 1).neurons.view(4, 8)]
    assert (found == found[:, :1]).all()


def test_clusters_are_of_one_size() -> None:
    distance = torch.rand(30, 5)
    distance[:, 2] -= 1  # whom all like best
    owner = _balanced(distance)
    assert torch.bincount(owner).tolist() == [6] * 5
    [inside] = (owner == 2).nonzero().T
    assert set(inside.tolist()) == set(distance[:, 2].topk(6, largest=False).indices.tolist())


def test_in_a_model_by_swap_and_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), mlp().float(), nn.Linear(6, 2))
    x = torch.randn(3, 5)
    expected = model(x)
    [entry] = swap(model, "1", lambda old: moefy(old, 6, 6))
    assert entry.action == "swapped"
    assert isinstance(model[1], MoEfiedFFN)
    assert_close(model(x), expected)
    restore(model)
    assert torch.equal(model(x), expected)


def test_modules_of_hosts() -> None:
    timm = pytest.importorskip("timm", reason="the extra [vision] is not installed")
    dense = timm.layers.Mlp(6, 12, drop=0.1).eval()
    x = torch.randn(4, 6)
    assert_close(moefy(dense, 3, 3)(x), dense(x))


def test_state_dict() -> None:
    layer, x = moefy(mlp(), 6, 2), torch.randn(9, 6).double()
    other = MoEfiedFFN(6, 24, 6, 2).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(other.neurons, layer.neurons)


class LanguageModel(nn.Module):
    """The next character from the eight before it."""

    def __init__(self, ids: int, width: int = 48) -> None:
        super().__init__()
        self.embed, self.join, self.norm = nn.Embedding(ids, 12), nn.Linear(96, width), nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, width))
        self.head = nn.Linear(width, ids)

    def before(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.join(self.embed(tokens).flatten(1))
        return x

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.before(tokens)
        y: Tensor = self.head(x + self.ffn(self.norm(x)))
        return y


@pytest.mark.slow
def test_dense_layer_and_chosen_experts_beat_random_ones() -> None:
    """The catalogue's check, on Python source text."""
    text = inspect.getsource(textwrap) + inspect.getsource(inspect)[:40000]
    letters = sorted(set(text))
    data = torch.tensor([letters.index(c) for c in text]).unfold(0, 9, 1)
    torch.manual_seed(0)
    model = LanguageModel(len(letters))

    def loss() -> Tensor:
        rows = data[torch.randint(len(data), (256,))]
        return F.cross_entropy(model(rows[:, :8]), rows[:, 8])

    losses = train(loss, list(model.parameters()), 600, 3e-3)
    assert losses[-1] < 0.6 * losses[0]
    test_batch = data[torch.randint(len(data), (3000,))]

    @torch.no_grad()
    def evaluated() -> float:
        return float(F.cross_entropy(model(test_batch[:, :8]), test_batch[:, 8]))

    dense = evaluated()
    x = model.norm(model.before(test_batch[:, :8])).detach()
    swap(model, "ffn", lambda old: moefy(old, 16, 16))
    assert evaluated() == pytest.approx(dense, abs=1e-5)
    restore(model)
    swap(model, "ffn", lambda old: moefy(old, 16, 4))
    quarter, layer = evaluated(), model.ffn
    assert isinstance(layer, MoEfiedFFN)
    kept, random, kept_at_random = layer.activations_kept(x), [], []
    for _ in range(5):
        nn.init.normal_(layer.router.weight)
        random.append(evaluated())
        kept_at_random.append(layer.activations_kept(x))
    assert quarter - dense < 0.7 * (min(random) - dense), (dense, quarter, random)
    assert kept > 1.2 * max(kept_at_random), (kept, kept_at_random)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: MoEfiedFFN(6, 24, 5, 1), ValueError, "num_experts divide intermediate_size, got 6, 24 and 5"),
        (lambda: MoEfiedFFN(6, 24, 4, 5), ValueError, "top_k must be in [1, num_experts = 4], got 5"),
        (
            lambda: MoEfiedFFN(6, 24, 4, 1, "tanh"),
            ValueError,
            "activation must be one of silu, gelu, gelu_tanh, relu, ",
        ),  # type: ignore[arg-type]
        (
            lambda: MoEfiedFFN(6, 24, 4, 1)(torch.ones(2, 5)),
            ValueError,
            "must have shape (..., hidden_size = 6), got (2,",
        ),
        (lambda: moefy(3, 4, 1), TypeError, "moefy: mlp must be an nn.Module, got int"),  # type: ignore[arg-type]
        (
            lambda: moefy(nn.Linear(6, 6), 4, 1),
            ValueError,
            "moefy: mlp must hold two nn.Linear, (H, I) and (I, H), both",
        ),
        (
            lambda: moefy(mlp(act=nn.Tanh()), 4, 1),
            ValueError,
            "moefy: activation must be one of silu, gelu, gelu_tanh, ",
        ),
        (
            lambda: moefy(nn.Sequential(*mlp(), nn.LayerNorm(6)), 4, 1),
            ValueError,
            "mlp must hold nothing but linear layers, dropout and one activation, got ReLU, LayerNorm",
        ),
    ],
)
def test_bad_input(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
