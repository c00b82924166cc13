"""Each check of the kit catches the fault that it is for, and passes a layer that has none."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerzoo.testing import ConformanceError, check_layer, conformance
from layerzoo.testing.conformance import CHECKS
from layerzoo.zoo import LayerCard, Option, Sample, register, registry

CARD = LayerCard(
    name="testing/affine",
    domain="general",
    family="testing",
    summary="A linear map.",
    licence="MIT",
    inputs={"x": ("batch", "length", "dim")},
    outputs={"y": ("batch", "length", "dim")},
    config={"dim": Option("int"), "bias": Option("bool", True)},
    dtypes=("float64", "float32", "bfloat16"),
    sample=Sample({"dim": 4}, {"batch": 2, "length": 3}),
)


class Affine(nn.Module):
    def __init__(self, dim: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class TooManyOptions(Affine):
    def __init__(self, dim: int, bias: bool = True, extra: int = 1, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, bias, device, dtype)


class OtherDefault(Affine):
    def __init__(self, dim: int, bias: bool = False, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, bias, device, dtype)


class WrongShape(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., :-1]


class NotFinite(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


class NoEmptyBatch(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.amax()


class WrongStride(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride()))


class WidensDtype(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


class WrongGradient(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return Detached.apply(super().forward(x))


class DeafToTrain(Affine):
    def train(self, mode: bool = True) -> "DeafToTrain":
        self.training = mode
        return self


class SharedByCopies(Affine):
    def __deepcopy__(self, memo: Any) -> "SharedByCopies":
        return copy.copy(self)


class NotPicklable(Affine):
    def __init__(self, dim: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, bias, device, dtype)
        self.activation = lambda x: x


class HiddenState(Affine):
    def __init__(self, dim: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, bias, device, dtype)
        self.scale = torch.rand(()).item()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class NotOnMeta(Affine):
    def __init__(self, dim: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__(dim, bias, None, dtype)


class Noisy(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x)


class DependsOnThreads(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-6 * torch.get_num_threads())


class InPlace(Affine):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x.add_(1)
        return super().forward(x)


class GraphBreak(Affine):
    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x)


class DependsOnData(Affine):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum().item() > 0 else -super().forward(x)


FAULTS = [
    (TooManyOptions, "signature", "the constructor's arguments are"),
    (OtherDefault, "signature", "bias defaults to False, the card says True"),
    (WrongShape, "shapes", r"output y must have shape .* = \(2, 3, 4\), got \(2, 3, 3\)"),
    (NotFinite, "shapes", "output y is not finite"),
    (NoEmptyBatch, "odd_sizes", "amax"),
    (WrongStride, "strides", "not close"),
    (WidensDtype, "dtypes", "output y of float32 inputs has dtype torch.float64"),
    (WrongGradient, "gradients", "Jacobian mismatch"),
    (DeafToTrain, "modes", r"eval\(\) does not reach|train\(\) does not reach"),
    (SharedByCopies, "deepcopy", "the copy shares parameters"),
    (NotPicklable, "pickled", "pickle"),
    (HiddenState, "state_dict", "not equal|not close"),
    (NotOnMeta, "meta", "linear.weight is on cpu"),
    (Noisy, "determinism", "not equal|not close"),
    (DependsOnThreads, "determinism", "not equal|not close"),
    (InPlace, "inputs_unchanged", "forward changed its input x"),
    (GraphBreak, "compiles", "graph"),
    (DependsOnData, "exports", "data-dependent|guard"),
]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    registry._registered.clear()


def run(cls: type[nn.Module], check: str, card: LayerCard = CARD) -> None:
    register(cls, card)
    conformance(card.name)(check)


def test_a_sound_layer_passes_every_check() -> None:
    register(Affine, CARD)
    results = check_layer("testing/affine")
    assert [(result.check, result.status) for result in results] == [(check, "passed") for check in CHECKS]
    assert check_layer("testing/affine", config={"dim": 3, "bias": False})[1].status == "passed"


def test_every_check_has_a_fault_that_it_catches() -> None:
    assert {check for _, check, _ in FAULTS} == CHECKS.keys()


@pytest.mark.parametrize(("cls", "check", "message"), FAULTS, ids=[cls.__name__ for cls, _, _ in FAULTS])
def test_a_fault_is_caught_by_its_check(cls: type[nn.Module], check: str, message: str) -> None:
    with pytest.raises(ConformanceError, match=rf"(?s)testing/affine breaks its promise '{check}': .*({message})"):
        run(cls, check)


@pytest.mark.parametrize("check", ["gradients", "odd_sizes"])
def test_a_check_that_does_not_apply_says_why(check: str) -> None:
    card = replace(
        CARD,
        dtypes=("float32",),
        inputs={"x": ("rows", "dim")},
        outputs={"y": ("rows", "dim")},
        sample=Sample({"dim": 4}, {"rows": 5}),
    )
    register(Affine, card)
    skipped = {result.check: result.reason for result in check_layer(card.name) if result.status == "skipped"}
    assert skipped == {
        "gradients": "the card does not list float64",
        "odd_sizes": "no dimension is called batch or length",
    }
    with pytest.raises(pytest.skip.Exception, match=skipped[check]):
        run(Affine, check, card)


def test_given_inputs_are_used() -> None:
    register(NoEmptyBatch, CARD)
    inputs = {"x": torch.arange(4.0).reshape(1, 1, 4)}
    skipped = [result.reason for result in check_layer(CARD.name, inputs=inputs) if result.status == "skipped"]
    assert skipped == ["the inputs were given"]
    assert inputs["x"].flatten().tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"check_layer: inputs must be \['x'\], got \['y'\]"):
        check_layer(CARD.name, inputs={"y": torch.zeros(1)})


def test_the_kit_leaves_global_state_alone() -> None:
    register(Affine, CARD)
    threads = torch.get_num_threads()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check_layer(CARD.name)
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads


test_mamba: Callable[[str], None] = conformance("ssm/mamba")
