"""What the papers behind SparseMoE and BASELayer claim, in small: a test for each row of the catalogue."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerzoo.nn import BASELayer, SparseMoE
from layerzoo.ops import balanced_assignment

from . import test_sparse_moe

pytestmark = pytest.mark.usefixtures("one_thread")


def dense(moe: SparseMoE, x: Tensor) -> Tensor:
    """Every expert for every token."""
    g, u = torch.einsum("th,ewh->etw", x, moe.experts.w13).chunk(2, dim=2)
    y = torch.einsum("eti,ehi->teh", F.silu(g) * u, moe.experts.w2)
    p = (x @ moe.router.weight.mT).softmax(dim=1)
    return torch.einsum("te,teh->th", p, y)


def test_sparsely_gated_moe() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 6, dtype=torch.float64)
    x[:, 0] = 1
    every = SparseMoE(6, 10, 4, 4, router="noisy").double().eval()
    nn.init.normal_(every.router.weight)
    torch.testing.assert_close(every(x), dense(every, x))

    test_sparse_moe.TestLosses().test_a_balance_loss_drives_the_load_together()

    # as many pairs, and so as many products, however many experts there are
    for experts in (4, 64):
        routing: Any = SparseMoE(6, 10, experts, 2).double()(x, return_routing=True)[1]
        assert int(routing.counts.sum()) == 2 * 256


def test_base_layers() -> None:
    scipy = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    torch.manual_seed(0)
    scores = torch.randn(64, 8, dtype=torch.float64)
    ids = balanced_assignment(scores)
    assert torch.bincount(ids[:, 0]).tolist() == [8] * 8
    places = scores.repeat_interleave(8, dim=1)
    best = places[scipy.linear_sum_assignment(-places.numpy())].sum()
    assert float(best - scores.gather(1, ids).sum()) <= 64 * 1e-5 * float(scores.max() - scores.min())

    # a toy language model: the next token is one of two, by the last one
    table = torch.randint(32, (32, 2))
    tokens = [torch.randint(32, (64,))]
    for _ in range(16):
        tokens.append(table[tokens[-1], torch.randint(2, (64,))])
    text = torch.stack(tokens, dim=1)
    layer = BASELayer(16, 32, 4)
    model = nn.Sequential(nn.Embedding(32, 16), layer, nn.Linear(16, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 1.2 < losses[0]  # log 2 is the least there is
    routing: Any = layer.eval()(model[0](text[:, :-1]), return_routing=True)[1]
    load = routing.counts.double() / routing.counts.sum() * 4
    assert load.max() < 1.8, load.tolist()


def granular(g: int, seed: int) -> SparseMoE:
    torch.manual_seed(seed)
    return SparseMoE(8, 32 // g, 4 * g, g, router="topk_softmax", scale=float(g))


def test_fine_grained_experts() -> None:
    # each expert split into eight that are chosen together is the same layer
    coarse, fine = granular(1, 0).double(), granular(8, 1).double()
    with torch.no_grad():
        gates, ups = (part.reshape(32, 4, 8) for part in coarse.experts.w13.view(4, 2, 32, 8).unbind(1))
        fine.experts.w13.copy_(torch.cat([gates, ups], dim=1))
        fine.experts.w2.copy_(coarse.experts.w2.view(4, 8, 8, 4).transpose(1, 2).reshape(32, 8, 4))
        fine.router.weight.copy_(coarse.router.weight.repeat_interleave(8, dim=0))
    x = torch.randn(50, 8, dtype=torch.float64)
    torch.testing.assert_close(fine(x), coarse(x))

    # at as many active parameters, fine experts fit a target of many random pieces better
    generator = torch.Generator().manual_seed(0)
    centres, values = (torch.randn(64, 8, generator=generator) for _ in range(2))
    x = torch.randn(2048, 8, generator=generator)
    y = values[torch.cdist(x, centres).argmin(dim=1)]
    reached = {}
    for g in (1, 8):
        model = granular(g, 0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(300):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
        reached[g] = float(loss.detach())
    assert reached[8] < 0.9 * reached[1], reached
