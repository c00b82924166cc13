"""The gate of several layers: its choice, its noise, its losses, several gates in one."""

import math

import pytest
import torch
from torch.testing import assert_close

from layerzoo.nn.moe.gate import Gate, cv_squared

pytestmark = pytest.mark.usefixtures("one_thread")


def gate_and_rows(**config: bool | int) -> tuple[Gate, torch.Tensor]:
    torch.manual_seed(0)
    gate = Gate(5, 4, 2, **config).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(gate.weight)
    return gate, torch.randn(50, 5).double()


def test_choice_by_loops() -> None:
    gate, x = gate_and_rows()
    said = gate(x)
    counts, importance = [0] * 4, [0.0] * 4
    for t, row in enumerate(x):
        logits = [float(row @ w) for w in gate.weight.detach()]
        chosen = sorted(range(4), key=lambda e: -logits[e])[:2]
        total = sum(math.exp(logits[e]) for e in chosen)
        assert said.ids[t].tolist() == chosen
        for k, e in enumerate(chosen):
            assert said.weights[t, k].item() == pytest.approx(math.exp(logits[e]) / total)
            counts[e] += 1
            importance[e] += math.exp(logits[e]) / total
    assert said.counts.tolist() == counts
    assert said.importance.tolist() == pytest.approx(importance)
    for name, values in (("importance", importance), ("load", counts)):
        mean = sum(values) / 4
        assert said.losses[name].item() == pytest.approx(sum((v - mean) ** 2 for v in values) / 4 / mean**2)
    p = (x @ gate.weight.detach().mT).softmax(1).mean(0)
    assert said.losses["balance"].item() == pytest.approx(float(4 * (p * said.counts / 100).sum()))
    assert_close(said.dense().sum(1), torch.ones(50).double())
    assert_close(said.dense().gather(1, said.ids), said.weights)


def test_of_equal_logits_the_lowest_ids() -> None:
    gate = Gate(5, 40, 3)
    torch.nn.init.zeros_(gate.weight)
    assert gate(torch.randn(9, 5)).ids.tolist() == [[0, 1, 2]] * 9


def test_noise_only_while_training() -> None:
    gate, x = gate_and_rows(noisy=True)
    assert not torch.equal(gate(x).weights, gate(x).weights)
    assert torch.equal(gate.eval()(x).weights, gate(x).weights)
    plain, _ = gate_and_rows()
    assert torch.equal(gate(x).weights, plain(x).weights)


def test_smooth_load_is_the_mean_count() -> None:
    """How likely each expert is to be chosen, given the noise of the others: on average, how often it is."""
    gate, x = gate_and_rows(noisy=True)
    clean, spread = x @ gate.weight.mT, math.log(2) + 1e-2

    def load() -> torch.Tensor:
        noisy = clean + spread * torch.randn_like(clean)
        second = [noisy[:, [i for i in range(4) if i != e]].topk(2, dim=1).values[:, 1] for e in range(4)]
        return (0.5 * (1 + torch.erf((clean - torch.stack(second, 1)) / spread / math.sqrt(2)))).sum(0)

    state = torch.get_rng_state()
    said = gate(x)
    torch.set_rng_state(state)
    assert_close(said.losses["load"], cv_squared(load()))
    drawn = torch.stack([gate(x).counts.double() for _ in range(200)]).mean(0)
    assert_close(torch.stack([load() for _ in range(200)]).mean(0), drawn, rtol=0.05, atol=0.4)


def test_losses_reach_the_parameters() -> None:
    gate, x = gate_and_rows(noisy=True)
    for name, loss in gate(x).losses.items():
        grads = torch.autograd.grad(loss, list(gate.parameters()), retain_graph=True, allow_unused=True)
        assert grads[0] is not None, name
        assert grads[0].isfinite().all()
        assert grads[0].abs().sum() > 0
    assert cv_squared(torch.full((3,), 7.0)) == cv_squared(torch.zeros(3)) == 0


def test_each_row_by_its_own_gate() -> None:
    gate, x = gate_and_rows(num_gates=3)
    which = torch.randint(3, (50,))
    said = gate(x, which)
    for t in range(50):
        logits = gate.weight.view(3, 4, 5)[which[t]] @ x[t]
        assert said.ids[t].tolist() == logits.topk(2).indices.tolist()
    assert torch.equal(gate(x).ids, gate(x, torch.zeros(50, dtype=torch.int64)).ids)


def test_no_rows() -> None:
    gate, x = gate_and_rows(noisy=True)
    said = gate(x[:0])
    assert said.ids.shape == said.weights.shape == (0, 2)
    assert all(loss == 0 for loss in said.losses.values())


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"Gate: hidden_size, top_k and num_gates must be positive and top_k at most"):
        Gate(5, 2, 3)
    with pytest.raises(ValueError, match=r"Gate: x must have shape \(T, hidden_size = 5\), got \(2, 4\)"):
        Gate(5, 4, 2)(torch.ones(2, 4))
