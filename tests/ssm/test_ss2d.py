"""nn.SS2D and nn.LocalMamba: the kit, and the formula pixel by pixel, along paths that are written down."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo import _native
from layerzoo.nn import SS2D, LocalMamba
from layerzoo.nn.ssm.local_mamba import CANDIDATES
from layerzoo.testing import conformance

from . import oracle
from .oracle import assert_close, sigmoid
from .paths import path

test_ss2d = conformance("ssm/ss2d")
test_local_mamba = conformance("ssm/local_mamba")
test_local_mamba_that_searches = conformance(
    "ssm/local_mamba", config={"d_model": 4, "d_state": 3, "directions": CANDIDATES, "search": True}
)


def silu(x: Any) -> Any:
    return x * sigmoid(x)


def gelu(x: Any) -> Any:
    return F.gelu(torch.from_numpy(x)).numpy()


def normalised(x: Any) -> Any:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def formula(layer: SS2D, x: Tensor) -> Any:
    """In numpy: convolution tap by tap, each direction along its path, its output back to the pixels it came from."""
    p = {name: value.detach().double().numpy() for name, value in layer.named_parameters()}
    height, width = x.shape[1:3]

    def linear(name: str, value: Any) -> Any:
        return value @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    def norm(name: str, value: Any) -> Any:
        return normalised(value) * p[f"{name}.weight"] + p[f"{name}.bias"]

    def gated(y: Any) -> Any:
        n = norm("attn.norm", y)
        whole = gelu(linear("attn.global_reduce", n.mean((1, 2), keepdims=True)))
        each = gelu(linear("attn.local_reduce", n))
        pixel = linear("attn.spatial_select", np.concatenate([each, np.broadcast_to(whole, each.shape)], -1))
        return y * sigmoid(linear("attn.channel_select", whole)) * sigmoid(pixel)

    inner, z = np.split(linear("in_proj", x.detach().double().numpy()), 2, axis=-1)
    half = layer.d_conv // 2
    padded = np.pad(inner, ((0, 0), (half, half), (half, half), (0, 0)))
    u = np.zeros_like(inner) + p.get("conv2d.bias", 0)
    for i in range(layer.d_conv):
        for j in range(layer.d_conv):
            u += padded[:, i : i + height, j : j + width] * p["conv2d.weight"][:, 0, i, j]
    u = silu(u)
    ways, total = len(layer.directions), np.zeros_like(u)
    for k, direction in enumerate(layer.directions):
        pixels = path(direction, height, width)
        sequence = np.stack([u[:, i, j] for i, j in pixels], axis=2)
        chosen = np.einsum("bdl,od->bol", sequence, p["x_proj_weight"][k])
        low, B, C = np.split(chosen, [layer.dt_rank, layer.dt_rank + layer.d_state], axis=1)
        delta = np.einsum("brl,dr->bdl", low, p["dt_projs_weight"][k])
        A, D = -np.exp(np.split(p["A_logs"], ways)[k]), np.split(p["Ds"], ways)[k]
        y, _ = oracle.selective_scan(sequence, delta, A, B, C, D, None, p["dt_projs_bias"][k], True)
        image = np.zeros_like(u)
        for t, (i, j) in enumerate(pixels):
            image[:, i, j] = y[:, :, t]
        if isinstance(layer, LocalMamba):
            image = gated(image)
        if "direction_logits" in p:
            weights = np.exp(p["direction_logits"])
            image = weights[k] / weights.sum() * normalised(image)
        total += image
    return linear("out_proj", norm("out_norm", total) * silu(z))


def shaken(layer: SS2D) -> SS2D:
    """No parameter at its start, so that each of them counts."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return layer


LAYERS = {
    "SS2D": lambda: SS2D(12, d_state=5),
    "SS2D with windows": lambda: SS2D(6, d_state=2, directions=("window3_column_reversed", "row", "window3_column")),
    "SS2D with other options": lambda: SS2D(6, 3, 5, expand=1, dt_rank=3, conv_bias=False, bias=True),
    "LocalMamba": lambda: LocalMamba(12, d_state=5),
    "LocalMamba that searches": lambda: LocalMamba(6, 3, directions=CANDIDATES, search=True, reduction=4),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [(5, 6), (1, 1), (9, 8)], ids=str)
def test_the_formula(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = shaken(LAYERS[name]())
    x = torch.randn(2, *size, layer.d_model)
    assert_close("y", layer(x), formula(layer, x), 2e-5)
    layer.double()
    assert_close("y", layer(x.double()), formula(layer, x), 1e-9)


def test_names_and_shapes_are_those_of_the_authors() -> None:
    got = {name: tuple(value.shape) for name, value in SS2D(32, d_state=16).state_dict().items()}
    assert got == {
        "in_proj.weight": (128, 32),
        "conv2d.weight": (64, 1, 3, 3),
        "conv2d.bias": (64,),
        "x_proj_weight": (4, 34, 64),
        "dt_projs_weight": (4, 64, 2),
        "dt_projs_bias": (4, 64),
        "A_logs": (256, 16),
        "Ds": (256,),
        "out_norm.weight": (64,),
        "out_norm.bias": (64,),
        "out_proj.weight": (32, 64),
    }


@pytest.mark.native
def test_one_scan_for_each_direction() -> None:
    ops = ("selective_scan", "selective_scan_backward")
    before = {op: _native.calls(op) for op in ops}
    SS2D(8)(torch.randn(1, 4, 5, 8)).sum().backward()
    for op in ops:
        assert _native.calls(op) - before[op] == 4, op


@pytest.mark.parametrize("name", LAYERS)
def test_each_pixel_sees_all_others(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.randn(1, 4, 5, layer.d_model, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0, 1, 2].sum(), x)
    assert (grad.abs().sum(3) > 0).all()


@pytest.mark.parametrize("name", LAYERS)
def test_reset_parameters_draws_every_parameter_anew(name: str) -> None:
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_a_search_finds_the_directions_that_matter() -> None:
    """The target depends on the directions of one layer; a search over more of them, all else equal, finds which."""
    torch.manual_seed(0)
    right = ("column", "window2_row_reversed")
    given = (*right, "row", "window7_row")
    layer = LocalMamba(8, d_state=4, directions=given, search=True).requires_grad_(False)
    target = LocalMamba(8, d_state=4, directions=given, search=True).requires_grad_(False)
    layer.load_state_dict(target.state_dict())
    target.direction_logits.copy_(torch.tensor([2.0, 2.0, -2.0, -2.0]))  # type: ignore[union-attr]
    logits = layer.direction_logits
    assert logits is not None
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(25):
        x = torch.randn(4, 6, 7, 8)
        optimizer.zero_grad()
        F.mse_loss(layer(x), target(x)).backward()
        optimizer.step()
    assert layer.best_directions(2) == right


def local_error(directions: tuple[str, ...], side: int = 14, steps: int = 150) -> float:
    """The share of wrong answers, after training, to: are the first and the last pixel of this 2 x 2 block equal?

    The depthwise convolution would answer for both, so it is 1 x 1. Each pixel is told where in its block it is.
    """
    torch.manual_seed(0)
    layer, embed, head = LocalMamba(16, 8, 1, directions=directions), nn.Linear(5, 16), nn.Linear(16, 2)
    optimizer = torch.optim.AdamW([p for m in (layer, embed, head) for p in m.parameters()], lr=1e-2)
    place = F.one_hot(torch.arange(side) % 2 * 2 + torch.arange(side).unsqueeze(1) % 2, 4).expand(16, -1, -1, -1)

    def run() -> tuple[Tensor, Tensor]:
        bits = torch.randint(2, (16, side, side))
        answer = (bits[:, ::2, ::2] == bits[:, 1::2, 1::2]).long()
        x = embed(torch.cat([bits.unsqueeze(3) * 2 - 1, place], 3).float())
        return head(layer(x))[:, 1::2, 1::2].flatten(0, 2), answer.flatten()

    for _ in range(steps):
        logits, answer = run()
        optimizer.zero_grad()
        F.cross_entropy(logits, answer).backward()
        optimizer.step()
    with torch.no_grad():
        tries = [run() for _ in range(4)]
    return float(torch.cat([logits.argmax(1) != answer for logits, answer in tries]).float().mean())


@pytest.mark.slow
def test_order_formula_and_locality() -> None:
    """The catalogue's check: orders that are undone, values, and local structure at equal parameters."""
    from .test_cross_scan import test_merging_undoes_scanning

    test_merging_undoes_scanning((15, 8), "channels-last")
    test_the_formula("LocalMamba", (9, 8))
    local = local_error(("window2_row", "window2_row_reversed"))
    raster = local_error(("row", "row_reversed"))
    assert local < 0.1, f"windows: {local:.0%} wrong"
    assert local < raster - 0.2, f"windows: {local:.0%} wrong, raster: {raster:.0%}"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SS2D(0), "SS2D: d_model must be at least 1, got 0"),
        (lambda: LocalMamba(8, d_state=0), "LocalMamba: d_state must be at least 1, got 0"),
        (lambda: SS2D(8, d_conv=4), "SS2D: d_conv must be odd, got 4"),
        (lambda: SS2D(8, directions=("row", "spiral")), "SS2D: directions must be 'row', 'column', 'window<k>_row' or"),
        (
            lambda: LocalMamba(8, directions=()),
            "LocalMamba: directions must be a sequence of at least one name, got ()",
        ),
        (lambda: LocalMamba(8, reduction=17), "LocalMamba: reduction must be at most d_inner = 16, got 17"),
        (lambda: LocalMamba(8).best_directions(), "search must be True when the layer is built, got False"),
        (lambda: LocalMamba(8, search=True).best_directions(5), "count must be between 1 and 4, got 5"),
        (
            lambda: SS2D(8)(torch.ones(2, 4, 8)),
            "SS2D: x must have shape (batch, height, width, d_model = 8), got (2, 4",
        ),
        (lambda: LocalMamba(8)(torch.ones(1, 2, 2, 4)), "LocalMamba: x must have shape (batch, height, width, d_model"),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)
