"""nn.TimeSpaceMoE: the kit, pixels one by one, and the catalogue's check."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from layerzoo.nn import TimeSpaceMoE
from layerzoo.testing import conformance

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(batch: int = 2, length: int = 7, text: int = 4, size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(batch, length, size, generator=generator),
        "text": torch.randn(batch, text, 6, generator=generator),
        "attention": torch.randn(batch, length, text, generator=generator).mul(2).softmax(2),
        "timestep": torch.tensor([3.0, 711.0, 250.0, 0.0, 999.0])[:batch],
    }


test_time_space_moe = conformance("moe/time_space_moe", inputs=inputs())


def expert(experts: Any, e: int, x: Tensor) -> Tensor:
    y: Tensor = experts.w2[e] @ F.gelu(experts.w13[e] @ x + experts.b13[e]) + experts.b2[e]
    return y


def by_loops(layer: TimeSpaceMoE, x: Tensor, text: Tensor, attention: Tensor, time: Tensor) -> Tensor:
    images = []
    for b in range(len(x)):
        gates = [layer.space_gate(token).softmax(0) for token in text[b]]
        waves = [float(time[b]) * 1e4 ** (-i / 32) for i in range(32)]
        seen = torch.tensor([*map(math.cos, waves), *map(math.sin, waves)], dtype=torch.float64)
        when = layer.time_gate(seen).softmax(0)
        pixels = []
        for p, pixel in enumerate(x[b]):
            y = torch.zeros_like(pixel)
            for i, gate in enumerate(gates):
                if attention[b, p, i] > layer.threshold * attention[b, :, i].sum() / len(x[b]):
                    e = int(gate.argmax())
                    y = y + gate[e] / len(gates) * expert(layer.space_experts, e, pixel)
            e = int(when.argmax())
            pixels.append(y + when[e] * expert(layer.time_experts, e, pixel + y))
        images.append(torch.stack(pixels))
    return torch.stack(images)


def layer_and_inputs(**config: Any) -> tuple[TimeSpaceMoE, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    layer = TimeSpaceMoE(8, 6, **{"space_experts": 3, "time_experts": 4} | config).double().eval()
    nn.init.normal_(layer.time_gate[2].weight)
    return layer, tuple(value.double() for value in inputs(5).values())


@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0, 100.0])
def test_the_formula(threshold: float) -> None:
    layer, given = layer_and_inputs(threshold=threshold)
    with torch.no_grad():
        assert_close(layer(*given), by_loops(layer, *given), rtol=1e-9, atol=1e-9)


def test_padding_of_the_text_has_no_effect() -> None:
    layer, (x, text, attention, time) = layer_and_inputs()
    mask = torch.tensor([[True, True, True, False]] * 5)
    with torch.no_grad():
        expected = by_loops(layer, x, text[:, :3], attention[:, :, :3], time)
        assert_close(layer(x, text, attention, time, mask), expected, rtol=1e-9, atol=1e-9)
        nothing = layer(x, text, attention, time, torch.zeros_like(mask))
        assert_close(nothing, by_loops(layer, x, text[:, :0], attention[:, :, :0], time), rtol=1e-9, atol=1e-9)


def test_gates_and_chosen_experts_learn() -> None:
    layer, given = layer_and_inputs()
    y, paths = layer(*given, return_paths=True)
    y.square().sum().backward()
    for gate in (layer.space_gate, layer.time_gate[0], layer.time_gate[2]):
        assert gate.weight.grad is not None
        assert gate.weight.grad.abs().sum() > 0
    for experts, ids in ((layer.space_experts, paths.space_ids), (layer.time_experts, paths.time_ids)):
        assert experts.w13.grad is not None
        used = [bool(g.abs().sum() > 0) for g in experts.w13.grad]
        assert used == [e in ids for e in range(len(used))]


def test_noise_only_while_training() -> None:
    layer, given = layer_and_inputs(noise=5.0)
    assert torch.equal(layer(*given), layer(*given))
    layer.train()
    assert not torch.equal(layer(*given), layer(*given))


def test_state_dict() -> None:
    layer, given = layer_and_inputs()
    other = TimeSpaceMoE(8, 6, 3, 4).double().eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(*given), layer(*given))
    other.reset_parameters()
    assert not torch.equal(other(*given), layer(*given))


def test_regions_steps_and_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue's check: which experts a pixel meets is read off what the experts are sent."""
    from layerzoo.nn.moe.experts import Experts

    sent: list[Tensor] = []

    def forward(self: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        sent.append(ids)
        return torch.zeros_like(x)

    monkeypatch.setattr(Experts, "forward", forward)
    numbers = []
    for experts in (3, 30):
        layer, given = layer_and_inputs(space_experts=experts, time_experts=experts)
        sent.clear()
        _, paths = layer(*given, return_paths=True)
        space, time = sent[0].view(5, 7, experts), sent[1].view(5, 7)
        for b in range(5):
            for p in range(7):
                covering = {int(paths.space_ids[b, i]) for i in range(4) if paths.regions[b, p, i]}
                assert set(space[b, p].tolist()) - {experts} == covering
            assert (time[b] == paths.time_ids[b]).all()
        pairs = int((space < experts).sum())
        assert pairs <= int(paths.regions.sum())
        numbers.append(int(paths.regions.sum()) + time.numel())
        again = layer(*given, return_paths=True)[1]
        assert torch.equal(again.time_ids, paths.time_ids)
        whole = layer(*(value[:2] for value in given), return_paths=True)[1]
        assert torch.equal(whole.time_ids, paths.time_ids[:2])
    assert numbers[0] == numbers[1]  # the most that an image can cost, with three experts and with thirty


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TimeSpaceMoE(8, 0), "text_size must be positive, threshold and noise at least 0, got 0, 1.0 and 0.1"),
        (lambda: TimeSpaceMoE(8, 6, 0), "num_experts must be positive, got 8, 32 and 0"),
        (
            lambda: called(hidden_states=torch.ones(2, 7, 9)),
            "hidden_states must have shape (batch, length, hidden_size",
        ),
        (
            lambda: called(text=torch.ones(2, 4, 5)),
            "text must have shape (batch = 2, text, text_size = 6), got (2, 4, 5)",
        ),
        (
            lambda: called(attention=torch.ones(2, 4, 7)),
            "attention must have shape (batch, length, text) = (2, 7, 4), got",
        ),
        (lambda: called(timestep=torch.ones(1)), "timestep must have shape (batch,) = (2,), got (1,)"),
        (
            lambda: called(text_mask=torch.ones(2, 7).bool()),
            "text_mask must have shape (batch, text) = (2, 4), got (2, 7)",
        ),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


def called(**other: Tensor) -> Any:
    return TimeSpaceMoE(8, 6)(**inputs() | other)
