"""nn.DenseMamba: the kit, the formula with every state written out in numpy, decoding, and the catalogue's check."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn import DenseMamba, Mamba
from layerzoo.testing import conformance

from .oracle import TOLERANCE, Array, array, assert_close, sigmoid, softplus

test_dense_mamba = conformance("ssm/dense_mamba")


@torch.no_grad()
def stack(**options: Any) -> DenseMamba:
    """States that weigh as much as the skip connections, and open gates."""
    torch.manual_seed(0)
    module = DenseMamba(**{"d_model": 6, "num_layers": 4, "d_state": 3, "rank": 2} | options)
    for name, parameter in module.named_parameters():
        scale = 1.0 if name.endswith(("dt_proj.bias", "x_proj.weight")) or ".gate_up." in name else 0.3
        parameter.add_(torch.randn_like(parameter) * scale)
    return module


def expected(module: DenseMamba, hidden: Tensor) -> Array:
    """Step by step in float64, with the states (batch, d_inner, d_state) of all layers at hand."""
    p = {name: array(value) for name, value in module.named_parameters()}
    eps, value = torch.finfo(hidden.dtype).eps, array(hidden)

    def silu(x: Array) -> Array:
        return x * sigmoid(x)

    states: list[list[Array]] = []  # of each layer, at each step
    for k, mixer in enumerate(module.mixers):
        w = {name.removeprefix(f"mixers.{k}."): x for name, x in p.items() if name.startswith(f"mixers.{k}.")}
        x = value / np.sqrt((value**2).mean(-1, keepdims=True) + eps) * p[f"norms.{k}.weight"]
        inner, z = np.split(x @ w["in_proj.weight"].T, 2, axis=2)
        padded = np.pad(inner, ((0, 0), (mixer.d_conv - 1, 0), (0, 0)))
        h, own, out = np.zeros((len(value), mixer.d_inner, mixer.d_state)), [], []
        for t in range(value.shape[1]):
            taps = padded[:, t : t + mixer.d_conv]
            u = silu(np.einsum("bwd,dw->bd", taps, w["conv1d.weight"][:, 0]) + w["conv1d.bias"])
            low, B, C = np.split(u @ w["x_proj.weight"].T, [mixer.dt_rank, mixer.dt_rank + mixer.d_state], axis=1)
            dt = softplus(low @ w["dt_proj.weight"].T + w["dt_proj.bias"])
            h = np.exp(dt[..., None] * -np.exp(w["A_log"])) * h + (dt * u)[..., None] * B[:, None]
            own.append(h)
            joined = h.copy()
            for i in range(1, min(module.dense_layers, k) + 1):
                c = {name: p[f"connections.{k}.{i - 1}.{name}"] for name in ("down.weight", "up.weight")}
                g = {
                    name: p[f"connections.{k}.{i - 1}.{name}"]
                    for name in ("gate_down.weight", "gate_down.bias", "gate_up.weight", "gate_up.bias")
                }
                gate = silu(x[:, t] @ g["gate_down.weight"].T + g["gate_down.bias"]) @ g["gate_up.weight"].T
                gate = sigmoid(gate + g["gate_up.bias"])
                projection = c["up.weight"] @ c["down.weight"]
                joined += gate[..., None] * np.einsum("de,ben->bdn", projection, states[k - i][t])
            out.append((np.einsum("bdn,bn->bd", joined, C) + w["D"] * u) * silu(z[:, t]))
        states.append(own)
        value = value + np.stack(out, 1) @ w["out_proj.weight"].T
    return value


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"dense_layers": 3, "d_conv": 2}, {"dense_layers": 0}, {"num_layers": 1}, {"rank": "auto"}], ids=str
)
def test_the_formula(options: dict[str, Any], dtype: torch.dtype) -> None:
    module, x = stack(**options).to(dtype), torch.randn(2, 20, 6).to(dtype)
    assert_close("y", module(x), expected(module, x), TOLERANCE[dtype])


def plain(mixers: Any, norms: Any, x: Tensor) -> Tensor:
    for mixer, norm in zip(mixers, norms, strict=True):
        x = x + mixer(norm(x))
    return x


@torch.no_grad()
def test_gates_of_zero_leave_the_stack_as_it_is() -> None:
    torch.manual_seed(0)
    mixers, norms = [Mamba(6, 3) for _ in range(3)], [nn.LayerNorm(6) for _ in range(3)]
    module, x = DenseMamba.around(mixers, norms), torch.randn(2, 20, 6)
    assert [*module.mixers] == mixers
    assert [*module.norms] == norms
    assert torch.equal(module(x), plain(mixers, norms, x))
    opened = stack(num_layers=3)
    assert (opened(x) - plain(opened.mixers, opened.norms, x)).norm() > 0.01 * opened(x).norm()
    for connections in opened.connections:
        for connection in connections:
            connection.gate_up.bias.fill_(-torch.inf)
    assert torch.equal(opened(x), plain(opened.mixers, opened.norms, x))
    fresh = DenseMamba.around(mixers)
    assert torch.equal(fresh(x), plain(mixers, fresh.norms, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_pieces_with_a_cache_are_the_whole(dtype: torch.dtype) -> None:
    module, x = stack().to(dtype), torch.randn(2, 20, 6).to(dtype)
    for sizes in ([1] * 20, [7, 1, 1, 11], [20], [0, 2, 18]):
        cache = module.allocate_inference_cache(2)
        assert [tuple(state.shape) for state in cache[0]] == [(2, 12, 4), (2, 12, 3)]
        parts = [module(part, cache=cache) for part in x.split(sizes, dim=1)]
        assert_close(f"{sizes}", torch.cat(parts, 1), module(x), TOLERANCE[dtype])


def test_gradcheck() -> None:
    module = stack(d_model=2, num_layers=3, d_state=2, expand=1, rank=1).double()
    names = [name for name, _ in module.named_parameters()]

    def forward(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(2, 4, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, *module.parameters()), fast_mode=True)


def test_no_state_is_stored() -> None:
    """Of the tensors kept for the backward none is as large as the states of all steps, (b, l, d_inner, d_state)."""
    module, x, largest = stack(d_model=16, d_state=16), torch.randn(1, 256, 16), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    assert 0 < largest <= 256 * 2 * 32


# ---- the catalogue's check ----


def recall_loss(mixer: nn.Module, steps: int = 250) -> float:
    """After training, in nats: what came four tokens ago? Guessing costs 1.39."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(4, 16), mixer, nn.LayerNorm(16), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(rows: int) -> Tensor:
        tokens = torch.randint(4, (rows, 14))
        return F.cross_entropy(model(tokens)[:, 4:].flatten(0, 1), tokens[:, :-4].flatten())

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        loss(16).backward()
        optimizer.step()
    with torch.no_grad():
        return float(loss(256))


@pytest.mark.slow
def test_gate_zero_decoding_and_recall_at_equal_parameters(threads: Any) -> None:
    """The catalogue's check. The stack without connections has more states instead, and no fewer parameters."""
    threads(1)
    test_gates_of_zero_leave_the_stack_as_it_is()
    test_pieces_with_a_cache_are_the_whole(torch.float32)
    sizes, losses = [], []
    for options in ({"dense_layers": 2, "d_state": 8}, {"dense_layers": 0, "d_state": 10}):
        torch.manual_seed(0)
        module = DenseMamba(16, num_layers=3, **options)
        sizes.append(sum(p.numel() for p in module.parameters()))
        losses.append(recall_loss(module))
    assert sizes[0] <= sizes[1], sizes
    assert losses[0] < 0.05, losses
    assert losses[0] <= losses[1] + 0.01, losses


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: DenseMamba(8, 0), ValueError, "num_layers must be at least 1, got 0"),
        (
            lambda: DenseMamba(8, dense_layers=-1),
            ValueError,
            "dense_layers must be at least 0 and rank at least 1, got -1",
        ),
        (lambda: DenseMamba(8, rank=0), ValueError, "and rank at least 1, got 2 and 0"),
        (
            lambda: DenseMamba(8)(torch.ones(2, 8)),
            ValueError,
            "must have shape (batch, length, d_model = 8), got (2, 8)",
        ),
        (lambda: DenseMamba.around([]), ValueError, "mixers must be layers of one (d_model, d_inner, d_state), got []"),
        (lambda: DenseMamba.around([Mamba(8), Mamba(9)]), ValueError, "got [(8, 16, 16), (9, 18, 16)]"),
        (
            lambda: DenseMamba.around([nn.Linear(8, 8)]),
            TypeError,
            "mixers must be layers of layerzoo.nn.Mamba, got Lin",
        ),
        (lambda: DenseMamba.around([Mamba(8)], []), ValueError, "norms must be as many as mixers, 1, got 0"),
    ],
)
def test_bad_input(call: Any, error: Any, words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert str(caught.value).startswith("DenseMamba: ")
