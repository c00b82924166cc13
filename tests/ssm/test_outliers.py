"""nn.ssm.outlier_channels: what is planted is found, in our layers, a host's and accelerated ones; nothing stays."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerzoo
from layerzoo.nn import Mamba, Mamba2
from layerzoo.nn.ssm import OutlierReport, outlier_channels


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mamba(16), Mamba2(16, d_state=8, headdim=8)
        self.drop, self.unused = nn.Dropout(0.5), nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y: Tensor = self.second(self.drop(self.first(x * scale)))
        return y


@pytest.fixture
def model() -> Stack:
    torch.manual_seed(0)
    return Stack().train()


def batches(count: int = 3, planted: float = 1.0) -> list[Tensor]:
    torch.manual_seed(1)
    scale = torch.ones(16)
    scale[5] = planted
    return [torch.randn(2, 20, 16) * scale for _ in range(count)]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def by_name(report: OutlierReport, name: str) -> Any:
    [layer] = [layer for layer in report if layer.name == name]
    return layer


def test_absmax_is_that_of_the_inputs_over_all_batches(model: Stack) -> None:
    data = batches()
    layer = by_name(outlier_channels(model, data), "first.in_proj")
    assert torch.equal(layer.absmax, torch.cat(data).abs().flatten(0, 1).amax(0))
    assert layer.median == layer.absmax.median()
    seen: list[Tensor] = []
    model.eval().second.in_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for x in data:
        model(x)
    later = by_name(outlier_channels(model, data), "second.in_proj")
    assert torch.equal(later.absmax, torch.cat(seen[:3]).abs().flatten(0, 1).amax(0))


def test_every_linear_layer_of_both_mambas_is_watched(model: Stack) -> None:
    report = outlier_channels(model, batches())
    names = [layer.name for layer in report]
    assert names == ["first.in_proj", "first.x_proj", "first.out_proj", "second.in_proj", "second.out_proj"]
    assert report.silent == ("first.dt_proj", "unused")


def test_a_planted_outlier_is_found_and_nothing_else(model: Stack) -> None:
    assert not outlier_channels(model, batches())
    report = outlier_channels(model, batches(planted=50.0))
    assert report
    found = by_name(report, "first.in_proj")
    assert found.outliers == (5,)
    assert 30 < found.ratio < 90
    assert by_name(outlier_channels(model, batches(planted=50.0), threshold=100.0), "first.in_proj").outliers == ()
    with torch.no_grad():
        model.first.D[7] = 1000.0  # in front of out_proj
    assert by_name(outlier_channels(model, batches()), "first.out_proj").outliers == (7,)


@pytest.mark.parametrize("accelerated", [False, True])
def test_transformers_models(accelerated: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=61, hidden_size=16, state_size=4, num_hidden_layers=2)
    host = transformers.MambaForCausalLM(config).eval()
    ids = [{"input_ids": torch.randint(61, (2, 9))} for _ in range(2)]
    with torch.no_grad():
        host.backbone.layers[1].norm.weight[3] = 200.0
    if accelerated:
        assert layerzoo.accelerate(host)
    report = outlier_channels(host, ids)
    mixer = "backbone.layers.1.mixer"
    assert by_name(report, f"{mixer}.in_proj").outliers == (3,)
    assert {f"{mixer}.{name}" for name in ("in_proj", "x_proj", "out_proj")} <= {layer.name for layer in report}
    assert f"{mixer}.dt_proj" in report.silent  # its weight is used, the bias goes into the scan


def test_ways_to_pass_a_batch(model: Stack) -> None:
    x = batches(1)[0]
    for batch, scale in ((x, 1), ((x, 3.0), 3), ([x, 3.0], 3), ({"x": x, "scale": 2.0}, 2)):
        layer = by_name(outlier_channels(model, [batch]), "first.in_proj")
        assert torch.equal(layer.absmax, (x * scale).abs().flatten(0, 1).amax(0))


def test_the_model_is_left_as_it_was(model: Stack) -> None:
    model.drop.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    outlier_channels(model, batches())
    with pytest.raises(ValueError, match="hidden_states must have shape"):
        outlier_channels(model, [batches()[0], torch.ones(2, 3)])
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    kept = model.first.in_proj.register_forward_pre_hook(lambda module, args: None)
    outlier_channels(model, batches())
    assert hooks(model) == 1
    kept.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_channel_that_is_not_finite_stands_out(value: float) -> None:
    linear, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4)
    x[1, 2] = value
    [layer] = outlier_channels(linear, [x])
    assert layer.outliers == (2,)
    assert layer.median == 1


def test_dead_channels_and_empty_batches() -> None:
    linear = nn.Sequential(nn.Linear(4, 4))
    [layer] = outlier_channels(linear, [torch.tensor([[0.0, 0, 0, 2]])])
    assert (layer.median, layer.outliers, layer.ratio) == (0, (3,), float("inf"))
    report = outlier_channels(linear, [torch.ones(0, 4)])
    assert not report
    assert report.silent == ("0",)


def test_words_and_data(model: Stack) -> None:
    report = outlier_channels(model, batches(planted=50.0))
    text = str(report)
    count = sum(len(layer.outliers) for layer in report)
    assert f"{count} outlier channels: |x| over 6 medians" in text
    assert "first.in_proj" in text
    assert "not called: first.dt_proj, unused" in " ".join(text.split())
    data = json.loads(json.dumps(report.to_dict()))
    assert data["layers"][0]["outliers"] == [5]
    assert len(data["layers"][0]["absmax"]) == data["layers"][0]["channels"] == 16
    assert data["silent"] == ["first.dt_proj", "unused"]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: outlier_channels(3, []), TypeError, "model must be an nn.Module, got int"),  # type: ignore[arg-type]
        (lambda: outlier_channels(Mamba(8), [], threshold=0), ValueError, "threshold must be above 0, got 0"),
        (lambda: outlier_channels(nn.ReLU(), []), ValueError, "model must hold an nn.Linear, got none"),
        (lambda: outlier_channels(Mamba(8), []), ValueError, "batches must hold at least one, got none"),
    ],
)
def test_bad_input(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert f"outlier_channels: {words}" == str(caught.value)
