"""nn.DualPathMamba: the kit, the chunks, the layer by hand in numpy, and the catalogue's check."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn import DualPathMamba, Mamba
from layerzoo.nn.ssm.dual_path_mamba import overlap_add, to_chunks
from layerzoo.testing import conformance

from .oracle import TOLERANCE, Array, array, assert_close
from .test_mamba import by_hand

test_dual_path_mamba = conformance("ssm/dual_path_mamba")


@torch.no_grad()
def layer(**options: Any) -> DualPathMamba:
    torch.manual_seed(0)
    module = DualPathMamba(**{"d_model": 6, "chunk_size": 8, "d_state": 3} | options)
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def two_ways(mixer: nn.Module, x: Array) -> Array:
    """x (sequences, steps, d): one Mamba as it is, one on the sequence turned round."""
    ahead, back = mixer.ahead, mixer.back
    assert isinstance(ahead, Mamba)
    assert isinstance(back, Mamba)
    return by_hand(ahead, torch.as_tensor(x)) + by_hand(back, torch.as_tensor(x[:, ::-1].copy()))[:, ::-1]


def expected(module: DualPathMamba, x: Tensor) -> Array:
    """Chunk by chunk and place by place, in float64."""
    size, (batch, length, width) = module.chunk_size, x.shape
    half, value = size // 2, array(x)
    count = -(-length // half) + 1
    chunks = np.zeros((batch, count, size, width))
    for c in range(count):
        for k in range(size):
            if 0 <= (t := (c - 1) * half + k) < length:
                chunks[:, c, k] = value[:, t]

    def normed(y: Array, norm: Any) -> Array:
        return y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * array(norm.weight)

    eps = torch.finfo(x.dtype).eps
    for part in module.layers:
        chunks += np.stack([two_ways(part.intra, normed(chunks, part.intra_norm)[:, c]) for c in range(count)], 1)
        chunks += np.stack([two_ways(part.inter, normed(chunks, part.inter_norm)[:, :, k]) for k in range(size)], 2)
    out, times = np.zeros((batch, length, width)), np.zeros(length)
    for c in range(count):
        for k in range(size):
            if 0 <= (t := (c - 1) * half + k) < length:
                out[:, t] += chunks[:, c, k]
                times[t] += 1
    assert (times == 2).all()
    return out / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("options", "length"), [({}, 21), ({"num_layers": 2}, 16), ({"chunk_size": 2, "d_conv": 1}, 5), ({}, 1)], ids=str
)
def test_the_formula(options: dict[str, Any], length: int, dtype: torch.dtype) -> None:
    module, x = layer(**options).to(dtype), torch.randn(2, length, 6).to(dtype)
    assert_close("y", module(x), expected(module, x), TOLERANCE[dtype])


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8, 37])
@pytest.mark.parametrize("size", [2, 4, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_chunks_and_overlap_add_are_the_identity_to_the_bit(length: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, length, 3).to(dtype)
    chunks = to_chunks(x, size)
    assert chunks.shape == (2, -(-length // (size // 2)) + 1, size, 3)
    assert torch.equal(overlap_add(chunks, length), x)


def test_every_step_sees_both_sides() -> None:
    module, x = layer(), torch.randn(1, 40, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[0, 17].sum(), x)
    assert (grad.abs().sum(2) > 0).all()


def test_gradcheck() -> None:
    module = layer(d_model=2, chunk_size=4, d_state=2, expand=1).double()
    names = [name for name, _ in module.named_parameters()]

    def forward(x: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(2, 5, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(forward, (x, *module.parameters()), fast_mode=True)


# ---- the catalogue's check ----


class Separator(nn.Module):
    """Waves (batch, samples) -> two sources: learned windows, one mask a source, windows back."""

    def __init__(self, width: int = 32, window: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, width, window, window // 2, window // 2, bias=False)
        self.decoder = nn.ConvTranspose1d(width, 1, window, window // 2, window // 2, bias=False)
        self.mixer = DualPathMamba(width, chunk_size=16, d_state=8)
        self.masks = nn.Linear(width, 2 * width)

    def forward(self, wave: Tensor) -> Tensor:
        features = self.encoder(wave.unsqueeze(1)).mT
        masks = self.masks(self.mixer(features)).sigmoid().unflatten(2, (2, -1))
        masked = (masks * features.unsqueeze(2)).permute(0, 2, 3, 1)
        sources: Tensor = self.decoder(masked.flatten(0, 1)).view(*masked.shape[:2], -1)
        return sources


def tones(count: int, samples: int = 512) -> Tensor:
    """A low and a high tone of any pitch, phase and strength, (count, 2, samples)."""
    t = torch.arange(float(samples))
    low, high = 0.02 + 0.06 * torch.rand(count, 1), 0.12 + 0.1 * torch.rand(count, 1)
    phase, strength = 2 * torch.pi * torch.rand(2, count, 1), 0.5 + torch.rand(2, count, 1)
    waves = [s * torch.sin(2 * torch.pi * f * t + p) for f, p, s in zip((low, high), phase, strength, strict=True)]
    return torch.stack(waves, 1)


def si_sdr(estimate: Tensor, source: Tensor) -> Tensor:
    """Scale-invariant ratio of signal to distortion, in decibels."""
    scaled = (estimate * source).sum(-1, keepdim=True) / source.square().sum(-1, keepdim=True) * source
    return 10 * torch.log10(scaled.square().sum(-1) / (estimate - scaled).square().sum(-1))


def improvement(steps: int = 100) -> float:
    """After training: decibels of each source in its estimate, beyond those in the mixture."""
    torch.manual_seed(0)
    model = Separator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        sources = tones(8)
        optimizer.zero_grad()
        (-si_sdr(model(sources.sum(1)), sources).mean()).backward()
        optimizer.step()
    with torch.no_grad():
        sources = tones(64)
        mixture = sources.sum(1)
        return float((si_sdr(model(mixture), sources) - si_sdr(mixture.unsqueeze(1), sources)).mean())


def kept(module: nn.Module, x: Tensor) -> int:
    """The bytes that a forward keeps for its backward, but for parameters."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x).sum()
    return sum(storages.values())


class Attention(nn.Module):
    """The twin: softmax(Q K^T) V over the whole sequence in place of both paths, its matrix formed, as in SepFormer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, 2)
        y: Tensor = x + self.out(F.softmax(q @ k.mT * q.shape[2] ** -0.5, 2) @ v)
        return y


@pytest.mark.slow
def test_round_trip_separation_of_two_tones_and_memory(threads: Any) -> None:
    """The catalogue's check. Of attention's matrix there is no need: a fused attention would keep less."""
    threads(1)
    for length in (512, 1000):
        x = torch.randn(2, length, 3)
        assert torch.equal(overlap_add(to_chunks(x, 16), length), x)
    gain = improvement()
    assert gain > 6, f"SI-SDR: {gain:.1f} dB more than in the mixture"
    x = torch.randn(1, 16384, 16)
    ours, attention = kept(DualPathMamba(16, chunk_size=128), x), kept(Attention(16), x)
    assert attention > 16384**2 * 4
    assert ours < 0.25 * attention, f"kept for the backward: {ours / 1e6:.0f} MB, attention {attention / 1e6:.0f} MB"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DualPathMamba(8, 7), "chunk_size must be even and at least 2, got 7"),
        (lambda: DualPathMamba(8, 0), "chunk_size must be even and at least 2, got 0"),
        (lambda: DualPathMamba(0), "d_model and num_layers must be at least 1, got 0 and 1"),
        (
            lambda: DualPathMamba(8)(torch.ones(2, 8)),
            "hidden_states must have shape (batch, length, d_model = 8), got (2",
        ),
    ],
)
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert f"DualPathMamba: {words}" in str(caught.value)
