"""nn.MoELoRA: the kit, the formula as loops, the experts of a whole transformers model put on and taken off."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from layerzoo.hosts.lora_experts import attach_lora_experts, detach_lora_experts
from layerzoo.nn import MoELoRA
from layerzoo.testing import conformance

pytestmark = pytest.mark.usefixtures("one_thread")

test_moe_lora = conformance("moe/moe_lora")


def by_loops(layer: MoELoRA, x: Tensor) -> Tensor:
    """Rows (T, in_features), each through its experts one after the other."""
    rows, r, scale = [], layer.rank, layer.alpha / layer.rank
    for row in x:
        y = layer.base(row)
        logits = (layer.router.weight @ row).tolist()
        chosen = sorted(range(layer.num_experts), key=lambda e: -logits[e])[: layer.router.top_k]
        weights = torch.tensor([logits[e] for e in chosen], dtype=torch.float64).softmax(0)
        for w, e in zip(weights, chosen, strict=True):
            a, b = layer.lora_A[e * r : (e + 1) * r], layer.lora_B[:, e * r : (e + 1) * r]
            y = y + w * scale * (b @ (a @ row))
        rows.append(y)
    return torch.stack(rows)


def layer_and_rows(**config: Any) -> tuple[MoELoRA, Tensor]:
    torch.manual_seed(0)
    layer = MoELoRA(6, 5, **{"num_experts": 4, "rank": 3} | config).double()
    nn.init.normal_(layer.router.weight)
    nn.init.normal_(layer.lora_B)
    return layer, torch.randn(11, 6).double()


@pytest.mark.parametrize("config", [{}, {"top_k": 1}, {"top_k": 4, "alpha": 3.0}, {"num_experts": 1, "top_k": 1}])
def test_the_formula(config: dict[str, Any]) -> None:
    layer, x = layer_and_rows(**config)
    assert_close(layer(x), by_loops(layer, x), rtol=1e-9, atol=1e-9)
    y, routing = layer(x.view(11, 1, 6), return_routing=True)
    assert_close(y.flatten(0, 1), layer(x))
    assert int(routing.counts.sum()) == 11 * layer.router.top_k


def test_a_new_layer_is_its_base_and_only_the_experts_learn() -> None:
    torch.manual_seed(0)
    layer, x = MoELoRA(6, 5), torch.randn(11, 6)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).square().sum().backward()
    assert layer.lora_B.grad is not None
    assert all(p.grad is None for p in layer.base.parameters())


def test_gradients_by_loops() -> None:
    layer, x = layer_and_rows()
    leaves = [layer.lora_A, layer.lora_B, layer.router.weight]
    ours = torch.autograd.grad(layer(x).square().sum(), leaves)
    steps = []
    for leaf in leaves:  # by differences, of the loops
        direction = torch.randn_like(leaf)
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                leaf += sign * 1e-6 * direction
                ends.append(float(by_loops(layer, x).square().sum()))
                leaf -= sign * 1e-6 * direction
        steps.append(((ends[0] - ends[1]) / 2e-6, direction))
    for grad, (step, direction) in zip(ours, steps, strict=True):
        assert float((grad * direction).sum()) == pytest.approx(step, rel=1e-5)


def test_state_dict() -> None:
    layer, x = layer_and_rows()
    other = MoELoRA(6, 5, rank=3).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


# ---- on a whole model ----

TARGET = ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj", "model.layers.*.mlp.down_proj"]


def llama(layers: int = 4) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def experts_of(model: nn.Module) -> list[int]:
    return [layer.self_attn.q_proj.num_experts for layer in model.model.layers]  # type: ignore[union-attr]


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}


def test_on_and_off_a_transformers_model() -> None:
    model, ids = llama(), torch.randint(31, (3, 9))
    model.lm_head.weight.requires_grad_(False)  # type: ignore[union-attr]
    before, modules, expected = snapshot(model), dict(model.named_modules()), model(ids).logits
    report = attach_lora_experts(model, TARGET, rank=2)
    assert len(report.entries) == 12
    assert experts_of(model) == [2, 4, 6, 8]
    assert torch.equal(model(ids).logits, expected)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 3 * 12
    assert all(name.endswith((".router.weight", ".lora_A", ".lora_B")) for name in trainable)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    assert not torch.equal(model(ids).logits, expected)

    assert len(detach_lora_experts(model).entries) == 12
    assert dict(model.named_modules()) == modules
    after = snapshot(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[n][0], p) and after[n][1] == grad for n, (p, grad) in before.items())
    assert torch.equal(model(ids).logits, expected)


def test_other_changes_stay_when_experts_go() -> None:
    from layerzoo import restore, swap

    model = llama(2)
    swap(model, "model.layers.0.mlp.act_fn", nn.ReLU)
    attach_lora_experts(model, "model.layers.*.self_attn.q_proj", 3)
    assert experts_of(model) == [3, 3]
    twin = copy.deepcopy(model)
    detach_lora_experts(model)
    assert isinstance(model.model.layers[0].mlp.act_fn, nn.ReLU)  # type: ignore[union-attr,index]
    assert restore(model)
    detach_lora_experts(twin)
    assert isinstance(twin.model.layers[1].self_attn.q_proj, nn.Linear)  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("layers", "schedule", "expected"),
    [(6, (2, 5), [2, 2, 2, 5, 5, 5]), (3, (2, 4, 6, 8), [2, 4, 6]), (5, (2, 3), [2, 2, 2, 3, 3]), (2, 4, [4, 4])],
)
def test_schedules_over_depth(layers: int, schedule: Any, expected: list[int]) -> None:
    model = llama(layers)
    attach_lora_experts(model, "**.q_proj", schedule)
    assert experts_of(model) == expected


def fitted(schedule: tuple[int, ...]) -> tuple[int, float]:
    """Trained numbers, and the loss after learning sequences in which one token always follows another."""
    model = llama(4)
    attach_lora_experts(model, "**.mlp.*_proj", schedule, rank=2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    order = torch.randperm(31)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(120):
        ids = [torch.randint(31, (16, 1))]
        for _ in range(7):
            ids.append(order[ids[-1]])
        batch = torch.cat(ids, 1)
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.2
    return trained, sum(losses[-20:]) / 20


@pytest.mark.slow
def test_unchanged_at_first_loops_and_two_schedules() -> None:
    """The catalogue's check. Both schedules train as many numbers and learn. Which one is ahead on a frozen model with
    random weights, as here, changes with the start of the routers."""
    test_a_new_layer_is_its_base_and_only_the_experts_learn()
    layer, x = layer_and_rows()
    assert_close(layer(x), by_loops(layer, x), rtol=1e-9, atol=1e-9)
    (numbers, rising), (same, flat) = fitted((2, 4, 6, 8)), fitted((5, 5, 5, 5))
    assert numbers == same
    assert max(flat, rising) < 2.6, (rising, flat)


def attached() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3))
    attach_lora_experts(model, "0", 2)
    return model


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: MoELoRA(3, 3, rank=0), ValueError, "MoELoRA: rank must be at least 1, got 0"),
        (lambda: MoELoRA(3, 3, 2, 3), ValueError, "num_experts, got 3, 2, 3 and 1"),
        (lambda: MoELoRA.around(nn.ReLU()), TypeError, "base must be an nn.Linear, got ReLU"),  # type: ignore[arg-type]
        (
            lambda: MoELoRA(3, 3)(torch.ones(2, 4)),
            ValueError,
            "input must have shape (..., in_features = 3), got (2, 4)",
        ),
        (
            lambda: attach_lora_experts(nn.Sequential(nn.ReLU()), "0", 2),
            TypeError,
            "attach_lora_experts: target must name nn.Linear layers, but 0 is a ReLU",
        ),
        (
            lambda: attach_lora_experts(nn.Sequential(nn.Linear(3, 3)), "0", ()),
            ValueError,
            "num_experts must be at least one number, got ()",
        ),
        (
            lambda: attach_lora_experts(nn.TransformerEncoderLayer(4, 2), "linear1", (2, 3)),
            ValueError,
            "num_experts must be one number, since the name 'linear1' has no block's, got (2, 3)",
        ),
        (lambda: attach_lora_experts(attached(), "0", 2), ValueError, "model has LoRA experts already"),
        (lambda: detach_lora_experts(nn.Linear(3, 3)), ValueError, "detach_lora_experts: model has no LoRA experts"),
    ],
)
def test_bad_input(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
