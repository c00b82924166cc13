"""nn.Mambular: the kit, the model by hand in numpy, the order of features, and the catalogue's check against an MLP."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn import Mambular
from layerzoo.testing import conformance

from .oracle import TOLERANCE, Array, array, assert_close, sigmoid
from .test_mamba import by_hand

test_mambular = conformance("ssm/mambular")


@torch.no_grad()
def model(**options: Any) -> Mambular:
    torch.manual_seed(0)
    sizes = {"numeric": 3, "categories": [2, 4], "out_features": 2, "d_model": 6, "num_layers": 2, "d_state": 3}
    module = Mambular(**sizes | {"frequencies": 4} | options)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def expected(module: Mambular, numbers: Tensor | None, ids: Tensor | None) -> Array:
    """Feature by feature, in float64."""
    p = {name: array(value) for name, value in module.named_parameters()}
    eps = torch.finfo(next(module.parameters()).dtype).eps

    def normed(x: Array, name: str) -> Array:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * p[f"{name}.weight"]

    tokens = []
    for j in range(module.numeric):
        x = array(numbers)[:, j, None]
        if module.encoding == "periodic":
            angle = 2 * np.pi * x * p["numeric_embedding.frequency"][j]
            x = np.concatenate([np.sin(angle), np.cos(angle)], 1)
        token = x @ p["numeric_embedding.weight"][j] + p["numeric_embedding.bias"][j]
        tokens.append(np.maximum(token, 0) if module.encoding == "periodic" else token)
    for j in range(len(module.categories)):
        tokens.append(p[f"category_embeddings.{j}.weight"][ids[:, j].numpy()])
    x = np.stack(tokens, 1)
    for k, layer in enumerate(module.layers):
        x = x + by_hand(layer.mixer, torch.as_tensor(normed(x, f"layers.{k}.norm")))
    pooled = normed(x, "norm").mean(1)
    hidden = pooled @ p["head.0.weight"].T + p["head.0.bias"]
    return hidden * sigmoid(hidden) @ p["head.2.weight"].T + p["head.2.bias"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"encoding": "linear", "head": 5}, {"numeric": 0}, {"categories": [], "expand": 1}], ids=str
)
def test_the_formula(options: dict[str, Any], dtype: torch.dtype) -> None:
    module = model(**options).to(dtype)
    numbers = torch.randn(5, module.numeric).to(dtype) if module.numeric else None
    ids = torch.randint(2, (5, len(module.categories))) if module.categories else None
    assert_close("y", module(numbers, ids), expected(module, numbers, ids), TOLERANCE[dtype])


def test_the_order_of_features_is_a_part_of_the_model() -> None:
    """Two columns of one kind change places with their embeddings: other predictions. Without the scan: the same."""
    module, numbers, ids = model(), torch.randn(5, 3), torch.randint(2, (5, 2))
    order = torch.tensor([1, 0, 2])
    permuted = model()
    permuted.load_state_dict(module.state_dict())
    assert permuted.numeric_embedding is not None
    with torch.no_grad():
        for parameter in permuted.numeric_embedding.parameters():
            parameter.copy_(parameter[order])
    before, after = module(numbers, ids), permuted(numbers[:, order], ids)
    assert (before - after).norm() > 1e-3 * before.norm()
    for one in (module, permuted):
        one.layers = nn.ModuleList()
    assert_close("without layers", permuted(numbers[:, order], ids), module(numbers, ids), 1e-5)


def test_gradcheck() -> None:
    module = model(d_model=3, num_layers=1, d_state=2, expand=1).double()
    names = [name for name, _ in module.named_parameters()]
    ids = torch.randint(2, (2, 2))

    def forward(numbers: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (numbers, ids))

    numbers = torch.randn(2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(forward, (numbers, *module.parameters()), fast_mode=True)


def test_reset_reaches_every_parameter() -> None:
    module = model()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)
    module.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())


# ---- the catalogue's check ----


def table(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Six numbers and two categories; the class hangs on a product of two numbers, and on one whose sign the second
    category says. The rest is noise."""
    numbers, ids = torch.randn(rows, 6), torch.stack([torch.randint(3, (rows,)), torch.randint(2, (rows,))], 1)
    return numbers, ids, (numbers[:, 0] * numbers[:, 1] + numbers[:, 2] * (2 * ids[:, 1] - 1) > 0).long()


class MLP(nn.Module):
    """Numbers and one-hot categories through three linear layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = (nn.Linear(11, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.layers = nn.Sequential(*layers)

    def forward(self, numbers: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = self.layers(torch.cat([numbers, F.one_hot(ids[:, 0], 3), F.one_hot(ids[:, 1], 2)], 1))
        return y


def accuracy(module: nn.Module, steps: int) -> float:
    torch.manual_seed(1)
    train, test = table(4000), table(2000)
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - step / steps)
        rows = torch.randint(4000, (128,))
        numbers, ids, answer = (x[rows] for x in train)
        optimizer.zero_grad()
        F.cross_entropy(module(numbers, ids), answer).backward()
        optimizer.step()
    with torch.no_grad():
        return float((module(*test[:2]).argmax(1) == test[2]).float().mean())


@pytest.mark.slow
def test_scan_order_and_accuracy_on_interactions_of_features(threads: Any) -> None:
    """The catalogue's check. As many steps for both."""
    threads(1)
    for options in ({}, {"encoding": "linear", "head": 5}):
        test_the_formula(options, torch.float64)
        test_the_formula(options, torch.float32)
    test_the_order_of_features_is_a_part_of_the_model()
    torch.manual_seed(0)
    sizes = {"d_model": 24, "num_layers": 2, "encoding": "linear", "d_state": 8}
    ours = accuracy(Mambular(6, [3, 2], 2, **sizes), 250)
    torch.manual_seed(0)
    theirs = accuracy(MLP(), 250)
    assert ours > 0.93, f"{ours:.3f}"
    assert ours > theirs - 0.02, f"Mambular {ours:.3f}, MLP {theirs:.3f}"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Mambular(3, d_model=0), ValueError, "Mambular: d_model must be at least 1, got 0"),
        (lambda: Mambular(3, frequencies=0), ValueError, "Mambular: frequencies must be at least 1, got 0"),
        (
            lambda: Mambular(-1),
            ValueError,
            "numeric must be at least 0 and each of categories at least 1, got -1 and []",
        ),
        (lambda: Mambular(1, [0]), ValueError, "each of categories at least 1, got 1 and [0]"),
        (lambda: Mambular(0), ValueError, "there must be a feature, but numeric is 0 and categories is empty"),
        (lambda: Mambular(1, encoding="bins"), ValueError, "must be 'linear' or 'periodic', got 'bins'"),
        (lambda: model()(torch.ones(2, 3)), ValueError, "ids must have shape (batch, 2), got None"),
        (
            lambda: model()(torch.ones(2, 4), torch.ones(2, 2)),
            ValueError,
            "numbers must have shape (batch, 3), got (2, 4",
        ),
        (
            lambda: Mambular(3)(torch.ones(2, 3), torch.ones(2, 1)),
            ValueError,
            "ids must be None, since there are no such",
        ),
        (lambda: model()(torch.ones(1, 3), torch.tensor([[0, 4]])), IndexError, "index out of range"),
    ],
)
def test_bad_input(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
