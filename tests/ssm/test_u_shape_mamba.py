"""nn.UShapeMamba: the kit, the U walked through by hand, the paths, and the catalogue's check against a flat stack."""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn import Mamba, UShapeMamba
from layerzoo.nn.ssm.u_shape_mamba import PATHS
from layerzoo.testing import conformance

from .oracle import Array, array, assert_close, sigmoid
from .test_mamba import by_hand

test_u_shape_mamba = conformance("ssm/u_shape_mamba")


@torch.no_grad()
def layer(**options: Any) -> UShapeMamba:
    """No weight at its initial value, zero, so that each of them counts."""
    torch.manual_seed(0)
    module = UShapeMamba(**{"channels": 6, "temb_channels": 5, "d_state": 3} | options)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def walk(height: int, width: int, path: int) -> list[tuple[int, int]]:
    """The pixels (row, column) in the order of a path: from a corner along rows or columns, back along the next one."""
    columns, turned = PATHS[path]
    rows = list(range(height))[:: -1 if 1 in turned else 1]
    cols = list(range(width))[:: -1 if 2 in turned else 1]
    places = []
    for count, outer in enumerate(cols if columns else rows):
        inner = rows if columns else cols
        for i in inner[:: -1 if count % 2 else 1]:
            places.append((i, outer) if columns else (outer, i))
    return places


def normed(x: Array, weight: Any = 1.0, bias: Any = 0.0) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def expected(module: UShapeMamba, x: Tensor, temb: Tensor | None) -> Array:
    """In numpy, token by token, from the parameters."""
    p = {name: array(value) for name, value in module.named_parameters()}

    def linear(name: str, value: Array) -> Array:
        return value @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def block(name: str, number: int, grid: Array) -> Array:
        mixer = module.get_submodule(f"{name}.mixer")
        assert isinstance(mixer, Mamba)
        rows, cols = zip(*walk(grid.shape[1], grid.shape[2], number % 8), strict=True)
        gate: Any = 1.0
        if temb is None:
            h = normed(grid, p[f"{name}.norm.weight"], p[f"{name}.norm.bias"])
        else:
            time = array(temb)
            shift, scale, gate = np.split(linear(f"{name}.modulation", time * sigmoid(time)), 3, axis=1)
            h = normed(grid) * (1 + scale[:, None, None]) + shift[:, None, None]
            gate = gate[:, None, None]
        mixed = np.zeros_like(grid)
        mixed[:, rows, cols] = by_hand(mixer, torch.as_tensor(h[:, rows, cols]))
        return grid + gate * mixed

    def numbers() -> Iterator[int]:
        yield from range(100)

    count, depth = numbers(), module.depth
    grid, skips = np.moveaxis(array(x), 1, 3), []
    for stage in range(module.stages):
        for i in range(depth):
            grid = block(f"encoder.{stage}.{i}", next(count), grid)
        skips.append(grid)
        one, two = (grid[:, ::2], grid[:, 1::2]) if stage % 2 else (grid[:, :, ::2], grid[:, :, 1::2])
        grid = linear(f"merges.{stage}.proj", np.concatenate([one, two], 3))
    for i in range(depth):
        grid = block(f"bottleneck.{i}", next(count), grid)
    for stage in range(module.stages):
        skip = skips.pop()
        wide, grid = linear(f"expands.{stage}.proj", grid), np.zeros_like(skip)
        for k, half in enumerate(np.split(wide, 2, axis=3)):
            if (module.stages - 1 - stage) % 2:
                grid[:, k::2] = half
            else:
                grid[:, :, k::2] = half
        grid = linear(f"expands.{stage}.join", np.concatenate([grid, skip], 3))
        for i in range(depth):
            grid = block(f"decoder.{stage}.{i}", next(count), grid)
    out = linear("out_proj", normed(grid, p["norm.weight"], p["norm.bias"]))
    return array(x) + np.moveaxis(out, 3, 1)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (6, 4)),
        ({"stages": 3, "depth": 2}, (2, 4)),
        ({"stages": 0, "temb_channels": None}, (3, 5)),
        ({"stages": 1, "temb_channels": None}, (1, 2)),
    ],
    ids=str,
)
def test_the_formula(options: dict[str, Any], size: tuple[int, int]) -> None:
    module = layer(**options)
    x = torch.randn(2, 6, *size)
    temb = None if module.temb_channels is None else torch.randn(2, 5)
    want = expected(module, x, temb)
    assert_close("y", module(x, temb), want, 3e-5)
    module.double()
    assert_close("y", module(x.double(), None if temb is None else temb.double()), want, 1e-6)


def test_the_formula_in_float64() -> None:
    module = layer().double()
    x, temb = torch.randn(2, 6, 6, 4).double(), torch.randn(2, 5).double()
    assert_close("y", module(x, temb), expected(module, x, temb), 1e-9)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 3), (3, 4)])
def test_paths_visit_every_pixel_and_step_to_a_neighbour(size: tuple[int, int]) -> None:
    paths = [walk(*size, path) for path in range(8)]
    for places in paths:
        assert len(set(places)) == len(places) == size[0] * size[1]
        assert all(abs(a - c) + abs(b - d) == 1 for (a, b), (c, d) in pairwise(places))
    if min(size) > 1:
        assert len({tuple(places) for places in paths}) == 8


def test_blocks_take_turns_with_the_paths() -> None:
    module = UShapeMamba(4, stages=2, depth=2)
    paths = [block.path for name, block in module.named_modules() if name.count(".") == 2 and hasattr(block, "path")]
    paths += [block.path for block in module.bottleneck]
    assert sorted(paths) == sorted(i % 8 for i in range(10))


def test_gradcheck() -> None:
    module = layer(channels=2, temb_channels=2, d_state=2, expand=1, stages=1).double()
    names = [name for name, _ in module.named_parameters()]

    def forward(x: Tensor, temb: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, temb))

    x, temb = torch.randn(1, 2, 2, 2).double().requires_grad_(), torch.randn(1, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, temb, *module.parameters()), fast_mode=True)


@pytest.mark.parametrize("reset", [False, True])
def test_begins_as_the_identity(reset: bool) -> None:
    module, x = UShapeMamba(6, 5), torch.randn(2, 6, 4, 4)
    if reset:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(torch.nan)
        module.reset_parameters()
    assert torch.equal(module(x, torch.randn(2, 5)), x)
    dt = F.softplus(module.bottleneck[0].mixer.dt_proj.bias)
    assert dt.min() > 0.9e-4
    assert dt.max() < 0.11


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: UShapeMamba(0), "channels and depth must be at least 1, got 0 and 1"),
        (lambda: UShapeMamba(4, stages=-1), "stages must be at least 0, got -1"),
        (lambda: UShapeMamba(4, temb_channels=0), "temb_channels must be at least 1, or None, got 0"),
        (
            lambda: UShapeMamba(4)(torch.ones(2, 4, 4)),
            "must have shape (batch, channels = 4, height, width), got (2, 4",
        ),
        (
            lambda: UShapeMamba(4)(torch.ones(2, 4, 4, 3)),
            "height must be divisible by 2 and width by 2 (stages = 2), go",
        ),
        (lambda: UShapeMamba(4)(torch.ones(2, 4, 4, 4), torch.ones(2, 4)), "temb must be None, since temb_channels is"),
        (
            lambda: UShapeMamba(4, 3)(torch.ones(2, 4, 4, 4)),
            "temb must have shape (batch, temb_channels) = (2, 3), got N",
        ),
        (lambda: UShapeMamba(4, 3)(torch.ones(2, 4, 4, 4), torch.ones(1, 3)), "= (2, 3), got (1, 3)"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert f"UShapeMamba: {words}" in str(caught.value) or words in str(caught.value)


# ---- the catalogue's check ----


class Denoiser(nn.Module):
    """The noise in images (batch, 1, 16, 16) at times in [0, 1]."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 1)
        self.body = UShapeMamba(width, 32, d_state=8, **options)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * 2.0 ** torch.arange(8)
        y: Tensor = self.last(self.body(self.first(x), self.time(torch.cat([angle.sin(), angle.cos()], 1))))
        return y


def shapes(count: int) -> Tensor:
    """Discs and squares of any size and place, 1 on -1, (count, 1, 16, 16)."""
    place = torch.arange(16.0)
    centre, radius = 4 + 8 * torch.rand(count, 2, 1), 2 + 3 * torch.rand(count, 1, 1)
    dy, dx = (place - centre[:, 0]).abs()[:, :, None], (place - centre[:, 1]).abs()[:, None]
    disc, square = (dy**2 + dx**2).sqrt(), torch.maximum(dy, dx)
    inside = torch.where(torch.rand(count, 1, 1) < 0.5, disc, square) < radius
    return inside.unsqueeze(1).float() * 2 - 1


def denoising_loss(model: Denoiser, steps: int = 120) -> float:
    """After training, over the noise levels: the mean square of what is left of the noise."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss(count: int) -> Tensor:
        x, t = shapes(count), torch.rand(count)
        noise, angle = torch.randn_like(x), (t * torch.pi / 2)[:, None, None, None]
        return F.mse_loss(model(angle.cos() * x + angle.sin() * noise, t), noise)

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss(16).backward()
        optimizer.step()
    torch.manual_seed(2)
    with torch.no_grad():
        return float(loss(256))


def token_steps(model: Denoiser) -> int:
    """How many tokens go through a scan, for one image."""
    total, handles = 0, []

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        total += args[0].shape[1]

    for module in model.modules():
        if isinstance(module, Mamba):
            handles.append(module.register_forward_pre_hook(count))
    with torch.no_grad():
        model(torch.zeros(1, 1, 16, 16), torch.zeros(1))
    for handle in handles:
        handle.remove()
    return total


def seconds(*models: Denoiser) -> list[float]:
    """The best of several calls each, in turn."""
    x, t = shapes(16), torch.rand(16)
    best = [float("inf")] * len(models)
    with torch.no_grad():
        for _ in range(6):
            for i, model in enumerate(models):
                start = time.process_time()
                model(x, t)
                best[i] = min(best[i], time.process_time() - start)
    return best


@pytest.mark.slow
def test_fewer_token_steps_in_less_time_and_no_worse_a_loss_than_a_flat_stack(threads: Any) -> None:
    """The catalogue's check. The flat stack has a block more, whose parameters the U has in its merges."""
    threads(1)
    test_the_formula_in_float64()
    torch.manual_seed(0)
    u, flat = Denoiser(24, stages=2), Denoiser(24, stages=0, depth=6)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (u, flat)]
    assert 0.95 * sizes[0] < sizes[1] < 1.1 * sizes[0], sizes
    assert token_steps(u) < 0.6 * token_steps(flat)
    fast, slow = seconds(u, flat)
    assert fast < 0.9 * slow, f"{fast:.4f} s and {slow:.4f} s"
    ours, theirs = denoising_loss(u), denoising_loss(flat)
    assert ours < 0.5, ours
    assert ours <= 1.02 * theirs, f"U: {ours:.4f}, flat: {theirs:.4f}"
