"""layerzoo.nn.Mamba: parameters of mamba-ssm's, one maths on every path, training."""

import copy
import math
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn import Mamba

from . import oracle
from .oracle import TOLERANCE, Array, array, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def one_thread(threads: Any) -> None:
    """Small matrix products only wait for other threads."""
    threads(1)


def fresh(**options: Any) -> Mamba:
    torch.manual_seed(0)
    return Mamba(**{"d_model": 12, "d_state": 5, **options})


@torch.no_grad()
def layer(seed: int = 0, **options: Any) -> Mamba:
    """A layer whose state weighs as much as its skip connection, which initial values do not give."""
    mamba = fresh(**options)
    torch.manual_seed(seed)
    mamba.dt_proj.bias.normal_(0, 1)
    mamba.x_proj.weight.normal_()
    mamba.A_log.add_(torch.randn_like(mamba.A_log)).mul_(0.7)
    return mamba


def inputs(batch: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, length, 12).to(dtype)


def by_hand(mamba: Mamba, hidden: Tensor) -> Array:
    """The layer as numpy computes it in float64 from its parameters."""
    p = {name: array(x) for name, x in mamba.named_parameters()}
    rank, n = mamba.dt_rank, mamba.d_state
    x, z = np.split(array(hidden) @ p["in_proj.weight"].T + p.get("in_proj.bias", 0), 2, axis=2)
    x, _ = oracle.causal_conv1d(x.swapaxes(1, 2), p["conv1d.weight"][:, 0], p.get("conv1d.bias"), silu=True)
    low, B, C = np.split(x.swapaxes(1, 2) @ p["x_proj.weight"].T, [rank, rank + n], axis=2)
    delta = (low @ p["dt_proj.weight"].T).swapaxes(1, 2)
    A, D, bias = -np.exp(p["A_log"]), p["D"], p["dt_proj.bias"]
    BC = (B.swapaxes(1, 2), C.swapaxes(1, 2))
    y, _ = oracle.selective_scan(x, delta, A, *BC, D, z.swapaxes(1, 2), bias, delta_softplus=True)
    return y.swapaxes(1, 2) @ p["out_proj.weight"].T + p.get("out_proj.bias", 0)


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "d_conv": 3}, {"conv_bias": False, "dt_rank": 4, "expand": 3}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_the_formula(dtype: torch.dtype, options: dict[str, Any]) -> None:
    mamba = layer(**options).to(dtype)
    hidden = inputs(2, 40, dtype)
    out = mamba(hidden)
    assert out.dtype == dtype
    assert_close("out", out, by_hand(mamba, hidden), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_argument_leaves_decay_and_skip_in_float32(dtype: torch.dtype) -> None:
    mamba = layer(dtype=dtype)
    kinds = {name: x.dtype for name, x in mamba.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {"A_log", "D"}
    assert set(kinds.values()) == {torch.float32, dtype}
    assert_close("out", mamba(inputs(2, 40, dtype)), by_hand(mamba, inputs(2, 40, dtype)), TOLERANCE[dtype])


def test_state_dict_is_that_of_mamba_ssm() -> None:
    shapes = {
        "A_log": (1536, 16),
        "D": (1536,),
        "in_proj.weight": (3072, 768),
        "conv1d.weight": (1536, 1, 4),
        "conv1d.bias": (1536,),
        "x_proj.weight": (48 + 32, 1536),
        "dt_proj.weight": (1536, 48),
        "dt_proj.bias": (1536,),
        "out_proj.weight": (768, 1536),
    }
    assert {name: tuple(x.shape) for name, x in Mamba(768, device="meta").state_dict().items()} == shapes
    with_biases = Mamba(768, bias=True, device="meta").state_dict()
    assert with_biases.keys() - shapes.keys() == {"in_proj.bias", "out_proj.bias"}
    without = Mamba(768, conv_bias=False, device="meta").state_dict()
    assert shapes.keys() - without.keys() == {"conv1d.bias"}


def test_constructor_is_that_of_mamba_ssm() -> None:
    mamba = Mamba(32, 8, 3, 1, "auto", 0.01, 0.2, "constant", 2.0, 1e-3, False, True, True, 7)
    assert (mamba.d_model, mamba.d_state, mamba.d_conv, mamba.expand, mamba.dt_rank) == (32, 8, 3, 1, 2)
    assert (mamba.d_inner, mamba.layer_idx) == (32, 7)
    assert (mamba.dt_proj.weight == 2 / math.sqrt(2)).all()


@pytest.mark.parametrize("reset", [False, True])
def test_initial_values(reset: bool) -> None:
    mamba = fresh(d_model=64, d_state=16, dt_min=1e-6, dt_max=0.2, dt_init_floor=1e-3)
    if reset:
        with torch.no_grad():
            for parameter in mamba.parameters():
                parameter.fill_(math.nan)
        mamba.reset_parameters()
    dt = F.softplus(mamba.dt_proj.bias.double())
    assert 1e-3 * (1 - 1e-4) <= dt.min() < 2e-3
    assert 0.02 < dt.max() <= 0.2 * (1 + 1e-4)
    assert torch.equal(mamba.A_log.exp().round(), torch.arange(1.0, 17).expand(128, 16))
    assert (mamba.D == 1).all()
    assert mamba.dt_proj.weight.abs().max() <= mamba.dt_rank**-0.5
    assert mamba.A_log._no_weight_decay
    assert mamba.D._no_weight_decay
    assert mamba.dt_proj.bias._no_reinit
    assert all(x.isfinite().all() for x in mamba.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"d_state": -1}, "d_state must be at least 1, got -1"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"expand": 0}, "expand must be at least 1, got 0"),
        ({"dt_rank": 0}, "dt_rank must be at least 1, got 0"),
        ({"dt_init": "ones"}, "dt_init must be 'random' or 'constant', got 'ones'"),
        ({"dt_min": 0.2}, "dt_min and dt_max must satisfy 0 < dt_min <= dt_max, got 0.2 and 0.1"),
        ({"dt_min": 0.0}, "dt_min and dt_max must satisfy"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"Mamba: {words}"):
        fresh(**options)


@pytest.mark.parametrize("shape", [(2, 12), (2, 5, 11), (1, 2, 5, 12)])
def test_bad_inputs(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Mamba: hidden_states must have shape \(batch, length, d_model = 12\), got"):
        layer()(torch.ones(shape))


def test_bad_calls_of_step_and_inference_params() -> None:
    mamba = layer()
    with pytest.raises(ValueError, match="one token, got length 2"):
        mamba.step(inputs(1, 2), *mamba.allocate_inference_cache(1))
    with pytest.raises(ValueError, match="inference_params needs a layer_idx"):
        mamba(inputs(1, 2), InferenceParams())


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_empty_and_short_inputs(batch: int, length: int) -> None:
    mamba = layer()
    hidden = inputs(batch, length).requires_grad_()
    out = mamba(hidden)
    assert_close("out", out, by_hand(mamba, hidden), 3e-5)
    out.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


# ---- decoding ----


@dataclass
class InferenceParams:
    """What mamba-ssm's generation passes through a model."""

    seqlen_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_step_by_step_equals_the_whole_at_every_step(dtype: torch.dtype) -> None:
    mamba = layer().to(dtype)
    hidden = inputs(2, 20, dtype)
    want = mamba(hidden)
    cache = mamba.allocate_inference_cache(2, 20)
    assert [tuple(x.shape) for x in cache] == [(2, 24, 4), (2, 24, 5)]
    assert cache[0].dtype == dtype
    for t in range(20):
        out, conv_state, ssm_state = mamba.step(hidden[:, t : t + 1], *cache)
        assert conv_state is cache[0]
        assert ssm_state is cache[1]
        assert_close(f"step {t}", out[:, 0], want[:, t], TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [(20,), (1, 19), (2, 3, 15), (7, 1, 1, 11), (0, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_chunks_with_a_cache_equal_the_whole(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    mamba = layer().to(dtype)
    hidden = inputs(2, 20, dtype)
    cache = mamba.allocate_inference_cache(2)
    parts = [mamba(x, cache=cache) for x in hidden.split(list(sizes), dim=1)]
    assert_close("out", torch.cat(parts, 1), mamba(hidden), TOLERANCE[dtype])
    stepped = mamba.allocate_inference_cache(2)
    for t in range(20):
        mamba.step(hidden[:, t : t + 1], *stepped)
    for name, one, two in zip(("conv_state", "ssm_state"), cache, stepped, strict=True):
        assert_close(name, one, two, TOLERANCE[dtype])


@torch.no_grad()
def test_inference_params() -> None:
    first, second = layer(layer_idx=0), layer(seed=5, layer_idx=1)
    hidden = inputs(2, 12)
    want = second(first(hidden))
    params = InferenceParams()
    for _ in range(2):  # an offset of 0 starts anew
        params.seqlen_offset = 0
        out = [second(first(hidden[:, :7], params), params)]
        for t in range(7, 12):
            params.seqlen_offset = t
            out.append(second(first(hidden[:, t : t + 1], params), inference_params=params))
        assert params.key_value_memory_dict.keys() == {0, 1}
        assert_close("out", torch.cat(out, 1), want, 3e-5)


def test_packed_sequences_equal_separate_ones() -> None:
    mamba = layer()
    hidden = inputs(1, 30)
    seq_idx = torch.tensor([[-1] * 2 + [0] * 9 + [-1] + [1] * 2 + [3] * 14 + [-1] * 2])
    out = mamba(hidden, seq_idx=seq_idx)
    for mark in (0, 1, 3):
        where = seq_idx[0] == mark
        assert_close(f"sequence {mark}", out[:, where], mamba(hidden[:, where]), 3e-6)


def test_causality() -> None:
    mamba, hidden = layer(), inputs(1, 70)
    changed = hidden.clone()
    changed[:, 50:] += 1
    assert torch.equal(mamba(hidden)[:, :50], mamba(changed)[:, :50])


# ---- as a module ----


def test_gradcheck() -> None:
    mamba = layer(d_model=3, d_state=2, expand=1, bias=True).double()
    names = [name for name, _ in mamba.named_parameters()]

    def forward(hidden: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(mamba, dict(zip(names, parameters, strict=True)), hidden)

    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (hidden, *mamba.parameters()))


def test_training_learns_to_repeat_what_the_convolution_cannot_see() -> None:
    model = nn.Sequential(nn.Embedding(8, 16), fresh(d_model=16, d_state=8), nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(150):
        tokens = torch.randint(8, (16, 16))
        loss = F.cross_entropy(model(tokens)[:, 5:].flatten(0, 1), tokens[:, :-5].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert np.mean(losses[-10:]) < 1.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains(dtype: torch.dtype) -> None:
    mamba, hidden = layer(), inputs(2, 40)
    with torch.autocast("cpu", dtype):
        out = mamba(hidden)
    assert out.dtype == dtype
    assert_close("out", out, by_hand(mamba, hidden), 2 * TOLERANCE[dtype])
    out.float().square().mean().backward()
    for name, parameter in mamba.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


def test_deepcopy_and_pickle() -> None:
    mamba, hidden = layer(layer_idx=3), inputs(2, 9)
    for twin in (copy.deepcopy(mamba), pickle.loads(pickle.dumps(mamba))):
        assert torch.equal(twin(hidden), mamba(hidden))
        assert twin.A_log is not mamba.A_log
        assert twin.layer_idx == 3


@pytest.mark.slow
def test_compile() -> None:
    torch._dynamo.reset()
    mamba = layer()
    compiled = torch.compile(mamba, fullgraph=True, backend="aot_eager")
    gradients = []
    for module in (mamba, compiled):
        mamba.zero_grad()
        hidden = inputs(2, 40).requires_grad_()
        out = module(hidden)
        out.square().sum().backward()
        gradients.append([out, hidden.grad, *(x.grad for x in mamba.parameters())])
    for one, two in zip(*gradients, strict=True):
        assert_close("compiled", two, one, 1e-6)


@pytest.mark.slow
@torch.no_grad()
def test_compile_of_a_step() -> None:
    torch._dynamo.reset()
    mamba, hidden = layer(), inputs(2, 5)
    compiled = torch.compile(mamba.step, fullgraph=True, backend="aot_eager")
    cache = mamba.allocate_inference_cache(2)
    for t in range(5):
        out = compiled(hidden[:, t : t + 1], *cache)[0]
        assert_close(f"step {t}", out[:, 0], mamba(hidden)[:, t], 3e-5)


@pytest.mark.parametrize("options", [{}, {"use_bias": True, "use_conv_bias": False}], ids=str)
def test_weights_of_transformers_load_and_agree(options: dict[str, Any]) -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba", reason="transformers is not installed")
    torch.manual_seed(0)
    config = modeling.MambaConfig(hidden_size=12, state_size=5, num_hidden_layers=1, vocab_size=9, **options)
    mixer = modeling.MambaMixer(config, layer_idx=0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    mamba = layer(bias=config.use_bias, conv_bias=config.use_conv_bias)
    mamba.load_state_dict(mixer.state_dict(), strict=True)
    assert_close("out", mamba(inputs(2, 40)), mixer(inputs(2, 40)), 3e-5)
