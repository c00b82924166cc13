"""SparseMoE, SwitchFFN, BASELayer, their routers and RouterStats: the kit, loops in float64, the papers' claims."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerzoo.nn import BASELayer, SparseMoE, SwitchFFN
from layerzoo.nn.moe import (
    Router,
    RouterStats,
    balance_loss,
    cv_squared,
    mutual_information_loss,
    sequence_balance_loss,
)
from layerzoo.testing import conformance

test_sparse_moe_conforms = conformance("moe/sparse_moe")
test_switch_ffn_conforms = conformance("moe/switch_ffn")
test_base_layer_conforms = conformance("moe/base_layer")


def layer(kind: str = "softmax", top_k: int = 2, experts: int = 4, **config: Any) -> SparseMoE:
    torch.manual_seed(0)
    moe = SparseMoE(6, 10, experts, top_k, router=kind, **config).double()  # type: ignore[arg-type]
    with torch.no_grad():
        moe.router.weight.normal_()
    return moe


def tokens(count: int = 33) -> Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expert(moe: SparseMoE, e: int, x: Tensor) -> Tensor:
    own = moe.experts
    h = own.w13[e] @ x + (0 if own.b13 is None else own.b13[e])
    if own.gated:
        g, u = h.chunk(2)
        a = F.silu(g) * u
    else:
        a = F.relu(h)
    return own.w2[e] @ a + (0 if own.b2 is None else own.b2[e])


def probabilities(moe: SparseMoE, x: Tensor) -> Tensor:
    return (x @ moe.router.weight.T).softmax(dim=1)


class TestAgainstLoops:
    @pytest.mark.parametrize("kind", ["softmax", "topk_softmax", "noisy", "sinkhorn"])
    @pytest.mark.parametrize("bias", [False, True])
    def test_the_k_most_probable(self, kind, bias):
        moe, x = layer(kind, bias=bias).eval(), tokens()
        p, want = probabilities(moe, x), []
        for t, row in enumerate(x):
            best = sorted(range(4), key=lambda e: -float(p[t, e]))[:2]
            total = sum(p[t, e] for e in best)
            want.append(sum(p[t, e] / total * expert(moe, e, row) for e in best))
        torch.testing.assert_close(moe(x), torch.stack(want))

    def test_sigmoid_with_a_bias_for_the_choice_only(self):
        moe, x = layer("sigmoid", top_k=1, normalize=False, scale=2.5).eval(), tokens()
        moe.router.correction_bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0]))
        s = torch.sigmoid(x @ moe.router.weight.T)
        want = [2.5 * s[t, 2] * expert(moe, 2, row) for t, row in enumerate(x)]
        torch.testing.assert_close(moe(x), torch.stack(want))

    def test_experts_choose(self):
        moe, x = layer("expert_choice", normalize=False), tokens(16)
        p, want = probabilities(moe, x), torch.zeros_like(x)
        for e in range(4):
            for t in p[:, e].topk(8).indices.tolist():
                want[t] += p[t, e] * expert(moe, e, x[t])
        torch.testing.assert_close(moe(x), want)

    def test_shared_expert(self):
        moe, x = layer(shared_size=5, shared_gate=True), tokens()
        shared = moe.shared
        g, u = (x @ shared.w13.weight.T).chunk(2, dim=1)
        alone = (F.silu(g) * u) @ shared.w2.weight.T * torch.sigmoid(x @ shared.gate.weight.T)
        y = moe(x)
        moe.shared = None
        torch.testing.assert_close(y, moe(x) + alone)

    def test_all_experts_are_the_dense_mixture(self):
        moe, x = layer(top_k=4), tokens()
        p = probabilities(moe, x)
        want = [sum(p[t, e] * expert(moe, e, row) for e in range(4)) for t, row in enumerate(x)]
        torch.testing.assert_close(moe(x), torch.stack(want))


class TestSwitch:
    def test_a_full_expert_passes_nothing_on(self):
        torch.manual_seed(0)
        moe, x = SwitchFFN(6, 10, 4, capacity_factor=1.0, jitter=0.0).double(), tokens(20)
        nn.init.normal_(moe.router.weight)
        p = probabilities(moe, x)
        seen, want = [0] * 4, []
        for t, row in enumerate(x):
            e = int(p[t].argmax())
            seen[e] += 1
            want.append(p[t, e] * expert(moe, e, row) if seen[e] <= 5 else torch.zeros(6, dtype=torch.float64))
        assert max(seen) > 5
        torch.testing.assert_close(moe(x), torch.stack(want))

    def test_eval_has_another_capacity_and_no_jitter(self):
        torch.manual_seed(0)
        moe, x = SwitchFFN(6, 10, 4, capacity_factor=0.5, eval_capacity_factor=None, jitter=0.5).double(), tokens(20)
        _, training = moe(x, return_routing=True)
        _, evaluation = moe.eval()(x, return_routing=True)
        assert training.dropped > 0 == evaluation.dropped
        assert torch.equal(evaluation.ids[:, 0], probabilities(moe, x).argmax(1))


class TestBase:
    def test_even_while_training_best_afterwards(self):
        torch.manual_seed(0)
        moe, x = BASELayer(6, 10, 4).double(), tokens(32)
        nn.init.normal_(moe.router.weight)
        y, routing = moe(x, return_routing=True)
        assert torch.bincount(routing.ids[:, 0]).tolist() == [8] * 4
        score = torch.sigmoid(x @ moe.router.weight.T)
        want = [x[t] + score[t, e] * expert(moe, e, x[t]) for t, e in enumerate(routing.ids[:, 0].tolist())]
        torch.testing.assert_close(y, torch.stack(want))
        ids = moe.eval()(x, return_routing=True)[1].ids[:, 0]
        assert torch.equal(ids, score.argmax(1))


class TestLosses:
    def test_balance(self):
        even, p = torch.full((4,), 6), torch.rand(4, dtype=torch.float64)
        assert balance_loss(even, p / p.sum() * 12, 2) == pytest.approx(1)
        assert balance_loss(torch.tensor([0, 12, 0, 0]), torch.tensor([0.0, 12, 0, 0]), 1) == pytest.approx(4)

    def test_balance_of_transformers_is_k_times_ours(self):
        modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
        moe, x = layer(), tokens()
        routing = moe(x, return_routing=True)[1]
        theirs = modeling.load_balancing_loss_func((x @ moe.router.weight.T,), 4, 2)
        torch.testing.assert_close(2 * routing.losses["balance"].float(), theirs)

    def test_cv_squared_has_a_gradient_where_all_are_equal(self):
        x = torch.full((5,), 3.0, requires_grad=True)
        (grad,) = torch.autograd.grad(cv_squared(x), x)
        assert cv_squared(x) == 0 and torch.equal(grad, torch.zeros(5))
        assert cv_squared(torch.zeros(3)) == 0
        assert cv_squared(torch.tensor([1.0, 3.0])) == pytest.approx(0.25)

    def test_sequences_and_mutual_information(self):
        p = torch.rand(2, 5, 4, dtype=torch.float64)
        p /= p.sum(-1, keepdim=True)
        chosen = p.topk(2, dim=-1).indices
        counts = [torch.bincount(c.flatten(), minlength=4) for c in chosen]
        alone = [balance_loss(count, q.sum(0), 2) for q, count in zip(p, counts, strict=True)]
        torch.testing.assert_close(sequence_balance_loss(p, chosen), torch.stack(alone).mean())
        assert mutual_information_loss(torch.eye(4)) == pytest.approx(-math.log(4))
        assert mutual_information_loss(torch.full((7, 4), 0.25)) == pytest.approx(0)

    @pytest.mark.parametrize("kind", ["softmax", "sigmoid", "noisy", "base", "expert_choice", "sinkhorn"])
    def test_gradients_reach_the_router(self, kind):
        moe, x = layer(kind, top_k=1 if kind == "base" else 2), tokens()
        for name, loss in moe(x, return_routing=True)[1].losses.items():
            (grad,) = torch.autograd.grad(loss, moe.router.weight, retain_graph=True)
            assert grad.abs().max() > 0, name

    def test_the_smooth_load_is_the_chance_to_be_chosen(self):
        moe, x = layer("noisy", top_k=2, experts=3), tokens(4)
        router = moe.router
        with torch.no_grad():
            router.noise_weight.normal_()
            clean = x @ router.weight.T
            spread = F.softplus(x @ router.noise_weight.T) + 1e-2
            chances = torch.zeros(4, 3, dtype=torch.float64)
        torch.manual_seed(3)
        noise = torch.randn_like(clean)
        torch.manual_seed(3)
        loss = router(x).losses["load"]
        noisy = clean + noise * spread
        for t in range(4):
            for e in range(3):
                others = sorted((float(noisy[t, o]) for o in range(3) if o != e), reverse=True)
                chances[t, e] = 0.5 * math.erfc(-(float(clean[t, e]) - others[1]) / float(spread[t, e]) / math.sqrt(2))
        torch.testing.assert_close(loss, cv_squared(chances.sum(0)))

    def test_a_balance_loss_drives_the_load_together(self):
        # catalogue 373: importance and load losses even the load of a router that starts skewed
        moe, x = layer("noisy", top_k=2), tokens(256)
        x[:, 0] = 1
        with torch.no_grad():
            moe.router.weight[0, 0] += 4
        optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
        with RouterStats(moe) as stats:
            for _ in range(60):
                optimizer.zero_grad()
                moe(x)
                stats.loss(importance=1.0, load=1.0).backward()
                optimizer.step()
        load = stats.load("router")
        before, after = (float(cv_squared(part.mean(0))) for part in (load[:5], load[-5:]))
        assert after < 0.2 * before

    def test_the_bias_evens_the_load(self):
        moe, x = layer("sigmoid", top_k=1), tokens(256)
        with RouterStats(moe) as stats:
            for _ in range(200):
                moe(x)
                stats.update_biases(0.02)
        load = stats.load("router") * 4
        assert load[-1].max() < 1.2 < load[0].max()


class TestRouter:
    def test_each_token_by_its_own_gate(self):
        torch.manual_seed(0)
        router, x = Router(6, 4, 2, num_gates=3).double(), tokens(50)
        which = torch.randint(3, (50,))
        ids = router(x, which).ids
        for t in range(50):
            logits = router.weight.view(3, 4, 6)[which[t]] @ x[t]
            assert ids[t].tolist() == logits.topk(2).indices.tolist()
        assert torch.equal(router(x).ids, router(x, torch.zeros(50, dtype=torch.int64)).ids)

    def test_noise_only_while_training(self):
        router, x = layer("noisy").router, tokens()
        assert not torch.equal(router(x).weights, router(x).weights)
        assert torch.equal(router.eval()(x).weights, router(x).weights)

    def test_dense_weights(self):
        said = layer(capacity_factor=0.5).router(tokens())
        assert said.dropped > 0
        torch.testing.assert_close(said.dense().sum(1), said.weights.sum(1))
        kept = said.ids < 4
        torch.testing.assert_close(said.dense().gather(1, said.ids * kept) * kept, said.weights)


class TestStats:
    def test_what_it_counts(self):
        model = nn.Sequential(layer(capacity_factor=0.5), layer("sigmoid", experts=5)).train()
        x = tokens()
        with RouterStats(model) as stats:
            model(x)
            model(x[:7])
        model(x)
        assert stats.layers == ("0.router", "1.router")
        routing = model[0](x, return_routing=True)[1]
        torch.testing.assert_close(stats.load("0.router")[0], routing.counts.double() / 66)
        assert stats.load("1.router").shape == (2, 5)
        assert float(stats.dropped("0.router")[0]) == pytest.approx(float(routing.dropped) / 66)
        assert stats.dropped("1.router").tolist() == [0, 0]
        p = probabilities(model[0], x).mean(0)
        assert float(stats.entropy("0.router")[0]) == pytest.approx(float(-(p * p.log()).sum()))

    def test_loss_and_figure(self):
        pytest.importorskip("matplotlib", reason="the extra [bench] is not installed")
        moe = layer()
        with RouterStats(moe) as stats:
            routing = moe(tokens(), return_routing=True)[1]
            loss = stats.loss(balance=0.5, z=2.0)
        torch.testing.assert_close(loss, 0.5 * routing.losses["balance"] + 2 * routing.losses["z"])
        assert len(stats.figure().axes) >= 3

    def test_a_recomputed_forward_is_not_counted_twice(self):
        moe = layer()
        with RouterStats(moe) as stats:
            y = torch.utils.checkpoint.checkpoint(moe, tokens().requires_grad_(), use_reentrant=False)
            y.sum().backward()
        assert stats.load("router").shape[0] == 1

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda: RouterStats(nn.Linear(2, 2)), "must contain a layerzoo Router"),
            (lambda: RouterStats(layer()).loss(balance=1.0), "no router was called"),
            (lambda: RouterStats(layer()).load("gate"), "layer must be one of 'router', got 'gate'"),
            (lambda: RouterStats(layer()).load("router"), "'router' was not called"),
            (lambda: RouterStats(layer()).figure(), "nothing to draw"),
        ],
    )
    def test_bad_input(self, call, words):
        with pytest.raises(ValueError, match="RouterStats") as caught:
            call()
        assert words in str(caught.value)

    def test_an_unknown_loss(self):
        moe = layer()
        with RouterStats(moe) as stats, pytest.raises(ValueError, match="one of balance, z in router, got 'load'"):
            moe(tokens())
            stats.loss(load=1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SparseMoE(0, 4, 2), "hidden_size, num_experts, top_k and num_gates must be positive"),
        (lambda: SparseMoE(4, 0, 2), "intermediate_size and num_experts must be positive, got 4, 0 and 2"),
        (lambda: SparseMoE(4, 4, 2, 3), "num_experts, got 4, 2, 3 and 1"),
        (lambda: SparseMoE(4, 4, 2, router="hard"), "router must be one of softmax, "),
        (lambda: SparseMoE(4, 4, 2, router="base"), "top_k must be 1 with 'base', got 2"),
        (lambda: SparseMoE(4, 4, 2, capacity_factor=0.0), "capacity_factor must be positive"),
        (lambda: SparseMoE(4, 4, 2, router="expert_choice", capacity_factor=1.0), "None with 'expert_choice'"),
        (lambda: SparseMoE(4, 4, 2, jitter=1.0), "jitter must be in [0, 1), got 1.0"),
        (lambda: SparseMoE(4, 4, 2, router="noisy", groups=(2, 1, "max")), "groups must be None with 'noisy'"),
        (lambda: SparseMoE(4, 4, 2, shared_size=-1), "shared_size must not be negative, got -1"),
        (lambda: SparseMoE(4, 4, 2)(torch.ones(3, 5)), "x must have shape (..., hidden_size = 4), got (3, 5)"),
        (lambda: SwitchFFN(4, 4, 2)(torch.ones(3, 5)), "SwitchFFN: x must have shape"),
        (lambda: Router(4, 2)(torch.ones(2, 3, 4)), "Router: x must have shape (T, hidden_size = 4), got (2, 3, 4)"),
        (lambda: Router(4, 2).update_bias(torch.ones(2)), "update_bias is for 'sigmoid', this router is 'softmax'"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "topk_softmax", "noisy", "sinkhorn", "expert_choice"])
def test_no_tokens_and_one(kind):
    moe = layer(kind)
    for count in (0, 1):
        x = tokens(count).requires_grad_()
        y, routing = moe(x, return_routing=True)
        assert y.shape == x.shape
        (y.sum() + sum(routing.losses.values())).backward()
        assert x.grad is not None and x.grad.isfinite().all()


def test_weights_come_back_through_pickle_and_copies():
    moe, x = layer("sigmoid").eval(), tokens()
    twin = copy.deepcopy(moe)
    twin.load_state_dict(moe.state_dict())
    assert torch.equal(twin(x), moe(x))
    assert set(moe.state_dict()) == {"router.weight", "router.correction_bias", "experts.w13", "experts.w2"}
