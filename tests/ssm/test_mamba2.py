"""layerzoo.nn.Mamba2: parameters of mamba-ssm's, one maths on every path, training."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn import Mamba2
from layerzoo.nn.ssm.heads_update import heads_update
from layerzoo.testing import conformance

from . import oracle
from .oracle import TOLERANCE, Array, array, assert_close
from .test_mamba import DTYPES, InferenceParams, inputs, one_thread

__all__ = ["one_thread"]  # a fixture

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"ngroups": 2, "bias": True, "d_conv": 3},
    {"d_ssm": 12, "D_has_hdim": True, "conv_bias": False, "norm_before_gate": True},
    {"rmsnorm": False, "ngroups": 3, "dt_limit": (0.3, 1.1)},
    {"d_ssm": 4, "rmsnorm": False, "expand": 3},
)

test_conformance = conformance("ssm/mamba2")


def fresh(**options: Any) -> Mamba2:
    torch.manual_seed(0)
    return Mamba2(**{"d_model": 12, "d_state": 5, "headdim": 4, **options})


@torch.no_grad()
def layer(seed: int = 0, **options: Any) -> Mamba2:
    """A layer whose state weighs as much as its skip connection, which initial values do not give."""
    mamba = fresh(**options)
    torch.manual_seed(seed)
    mamba.dt_bias.normal_(0, 1)
    mamba.A_log.normal_(0, 0.7)
    mamba.D.normal_(1, 0.3)
    mamba.in_proj.weight.mul_(2)
    if mamba.rmsnorm:
        mamba.norm.weight.normal_(1, 0.3)
    return mamba


def silu(x: Array) -> Array:
    return np.asarray(x * oracle.sigmoid(x))


def scan(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array) -> Array:
    """h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t, y_t = C_t h_t + D x_t; B, C (b, l, g, n)."""
    y = np.zeros(x.shape)
    heads = x.shape[2]
    for b in range(x.shape[0]):
        for k in range(heads):
            g = k // (heads // B.shape[2])
            state = np.zeros((x.shape[3], B.shape[3]))
            for t in range(x.shape[1]):
                state = np.exp(dt[b, t, k] * A[k]) * state + dt[b, t, k] * np.outer(x[b, t, k], B[b, t, g])
                y[b, t, k] = state @ C[b, t, g] + D[k] * x[b, t, k]
    return y


def rms(x: Array, groups: int) -> Array:
    parts = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return np.asarray((parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)).reshape(x.shape))


def by_hand(mamba: Mamba2, hidden: Tensor) -> Array:
    """The layer as numpy computes it in float64 from its parameters."""
    p = {name: array(x) for name, x in mamba.named_parameters()}
    mlp, d, n, g, heads = mamba.d_inner - mamba.d_ssm, mamba.d_ssm, mamba.d_state, mamba.ngroups, mamba.nheads
    sizes = [mlp, mlp, d, d + 2 * g * n, heads]
    projected = array(hidden) @ p["in_proj.weight"].T + p.get("in_proj.bias", 0)
    gate, beside, z, xBC, dt = np.split(projected, np.cumsum(sizes)[:-1], axis=2)
    conv = p["conv1d.weight"][:, 0], p.get("conv1d.bias")
    x, B, C = np.split(oracle.causal_conv1d(xBC.swapaxes(1, 2), *conv, silu=True)[0].swapaxes(1, 2), [d, d + g * n], 2)
    dt = np.clip(oracle.softplus(dt + p["dt_bias"]), *mamba.dt_limit)
    shape = hidden.shape[:2]
    heads_of = (
        x.reshape(*shape, heads, d // heads),
        dt,
        -np.exp(p["A_log"]),
        B.reshape(*shape, g, n),
        C.reshape(*shape, g, n),
    )
    y = scan(*heads_of, p["D"].reshape(heads, -1)).reshape(*shape, d)
    if not mamba.rmsnorm:
        y = y * silu(z)
    elif mamba.norm.norm_before_gate:
        y = rms(y, g) * p["norm.weight"] * silu(z)
    else:
        y = rms(y * silu(z), g) * p["norm.weight"]
    y = np.concatenate([silu(gate) * beside, y], 2)
    return np.asarray(y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_is_the_formula(dtype: torch.dtype, options: dict[str, Any]) -> None:
    mamba = layer(**options).to(dtype)
    hidden = inputs(2, 40, dtype)
    out = mamba(hidden)
    assert out.dtype == dtype
    assert_close("out", out, by_hand(mamba, hidden), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_argument_leaves_step_decay_and_skip_in_float32(dtype: torch.dtype) -> None:
    mamba = layer(dtype=dtype)
    kinds = {name: x.dtype for name, x in mamba.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {"A_log", "D", "dt_bias"}
    assert set(kinds.values()) == {torch.float32, dtype}
    assert_close("out", mamba(inputs(2, 40, dtype)), by_hand(mamba, inputs(2, 40, dtype)), TOLERANCE[dtype])


def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in Mamba2(768, device="meta", **options).state_dict().items()}


def test_state_dict_is_that_of_mamba_ssm() -> None:
    expected = {
        "dt_bias": (24,),
        "A_log": (24,),
        "D": (24,),
        "in_proj.weight": (2 * 1536 + 2 * 128 + 24, 768),
        "conv1d.weight": (1536 + 2 * 128, 1, 4),
        "conv1d.bias": (1536 + 2 * 128,),
        "norm.weight": (1536,),
        "out_proj.weight": (768, 1536),
    }
    assert shapes() == expected
    assert shapes(bias=True).keys() - expected.keys() == {"in_proj.bias", "out_proj.bias"}
    assert expected.keys() - shapes(conv_bias=False).keys() == {"conv1d.bias"}
    assert expected.keys() - shapes(rmsnorm=False).keys() == {"norm.weight"}
    part = shapes(d_ssm=1024, D_has_hdim=True, ngroups=2)
    assert part["in_proj.weight"] == (2 * 1536 + 4 * 128 + 16, 768)
    assert part["conv1d.weight"] == (1024 + 4 * 128, 1, 4)
    assert (part["D"], part["A_log"], part["norm.weight"]) == ((1024,), (16,), (1024,))
    assert part["out_proj.weight"] == (768, 1536)


def test_constructor_is_that_of_mamba_ssm() -> None:
    arguments = (32, 8, 3, 0.1, 1, 4, 16, 2, (2, 3), True, False, True, 0.01, 0.2, 1e-3, (0.0, 9.0), True, False, 64)
    mamba = Mamba2(*arguments, False, 7, None, False)
    assert (mamba.d_model, mamba.d_state, mamba.d_conv, mamba.expand, mamba.headdim) == (32, 8, 3, 1, 4)
    assert (mamba.d_inner, mamba.d_ssm, mamba.nheads, mamba.ngroups, mamba.layer_idx) == (32, 16, 4, 2, 7)
    assert (mamba.chunk_size, mamba.dt_limit, mamba.rmsnorm) == (64, (0.0, 9.0), False)
    assert mamba.conv1d.weight.abs().max() <= 0.1
    assert 2 <= mamba.A_log.exp().min() <= mamba.A_log.exp().max() <= 3 + 1e-6


@pytest.mark.parametrize("reset", [False, True])
def test_initial_values(reset: bool) -> None:
    mamba = fresh(d_model=512, dt_min=1e-6, dt_max=0.2, dt_init_floor=1e-3, conv_init=0.01)
    if reset:
        with torch.no_grad():
            for parameter in mamba.parameters():
                parameter.fill_(math.nan)
        mamba.reset_parameters()
    dt = F.softplus(mamba.dt_bias.double())
    assert 1e-3 * (1 - 1e-4) <= dt.min() < 2e-3
    assert 0.02 < dt.max() <= 0.2 * (1 + 1e-4)
    assert 1 <= mamba.A_log.exp().min() < 2
    assert 15 < mamba.A_log.exp().max() <= 16 + 1e-5
    assert (mamba.D == 1).all()
    assert (mamba.norm.weight == 1).all()
    assert 0.009 < mamba.conv1d.weight.abs().max() <= 0.01
    assert all(x._no_weight_decay for x in (mamba.A_log, mamba.D, mamba.dt_bias))
    assert all(x.isfinite().all() for x in mamba.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"d_state": -1}, "d_state must be at least 1, got -1"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"expand": 0}, "expand must be at least 1, got 0"),
        ({"headdim": 0}, "headdim must be at least 1, got 0"),
        ({"ngroups": 0}, "ngroups must be at least 1, got 0"),
        ({"d_ssm": 0}, "d_ssm must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"headdim": 5}, r"d_ssm must be a multiple of headdim = 5, at most expand \* d_model = 24, got 24"),
        ({"d_ssm": 28}, r"d_ssm must be a multiple of headdim = 4, at most expand \* d_model = 24, got 28"),
        ({"ngroups": 4}, "ngroups must divide the number of heads, 6, got 4"),
        ({"dt_min": 0.2}, "dt_min and dt_max must satisfy 0 < low <= high, got 0.2 and 0.1"),
        ({"A_init_range": (0, 1)}, "A_init_range must satisfy 0 < low <= high, got 0 and 1"),
        ({"dt_limit": (1, 0)}, r"dt_limit must be \(low, high\) with low <= high, got \(1, 0\)"),
        ({"process_group": "gloo"}, "process_group must be None, got 'gloo'"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"Mamba2: {words}"):
        fresh(**options)


@pytest.mark.parametrize("shape", [(2, 12), (2, 5, 11), (1, 2, 5, 12)])
def test_bad_inputs(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"Mamba2: u must have shape \(batch, length, d_model = 12\), got"):
        layer()(torch.ones(shape))


@pytest.mark.parametrize(("shape", "seqlen"), [((2, 5, 12), 5), ((10, 12), 3), ((10, 12), 0)])
def test_bad_seqlen(shape: tuple[int, ...], seqlen: int) -> None:
    with pytest.raises(ValueError, match=rf"with seqlen = {seqlen}, u must have shape \(batch \* seqlen, d_model"):
        layer()(torch.ones(shape), seqlen)


def test_other_bad_calls() -> None:
    mamba, offsets = layer(), torch.tensor([0, 2])
    with pytest.raises(ValueError, match="one token, got length 2"):
        mamba.step(inputs(1, 2), *mamba.allocate_inference_cache(1))
    with pytest.raises(ValueError, match="Mamba2: inference_params needs a layer_idx"):
        mamba(inputs(1, 2), inference_params=InferenceParams())
    with pytest.raises(ValueError, match="seq_idx and cu_seqlens say the same thing"):
        mamba(inputs(1, 2), seq_idx=torch.zeros(1, 2, dtype=torch.int32), cu_seqlens=offsets)
    with pytest.raises(ValueError, match="cu_seqlens needs a batch of 1, got 2"):
        mamba(inputs(2, 2), cu_seqlens=offsets)
    with pytest.raises(ValueError, match=r"cu_seqlens must end at or before length = 1, got 2"):
        mamba(inputs(1, 1), cu_seqlens=offsets)
    with pytest.raises(ValueError, match="no gradient"):
        mamba.step(inputs(1, 1), *mamba.allocate_inference_cache(1))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_empty_and_short_inputs(batch: int, length: int) -> None:
    mamba = layer(ngroups=2, d_ssm=16)
    hidden = inputs(batch, length).requires_grad_()
    out = mamba(hidden)
    assert_close("out", out, by_hand(mamba, hidden), 3e-5)
    out.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape


def test_seqlen() -> None:
    mamba, hidden = layer(), inputs(2, 9)
    assert torch.equal(mamba(hidden.flatten(0, 1), 9), mamba(hidden).flatten(0, 1))
    assert torch.equal(mamba(hidden.flatten(0, 1), seqlen=18), mamba(hidden.reshape(1, 18, 12)).flatten(0, 1))


# ---- decoding ----


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_step_by_step_equals_the_whole_at_every_step(dtype: torch.dtype, options: dict[str, Any]) -> None:
    mamba = layer(**options).to(dtype)
    hidden = inputs(2, 20, dtype)
    want = mamba(hidden)
    cache = mamba.allocate_inference_cache(2, 20)
    conv_dim = mamba.d_ssm + 10 * mamba.ngroups
    assert [tuple(x.shape) for x in cache] == [(2, conv_dim, mamba.d_conv), (2, mamba.nheads, 4, 5)]
    assert cache[0].dtype == dtype
    assert cache[1].dtype == torch.promote_types(dtype, torch.float32)
    for t in range(20):
        out, conv_state, ssm_state = mamba.step(hidden[:, t : t + 1], *cache)
        assert conv_state is cache[0]
        assert ssm_state is cache[1]
        assert_close(f"step {t}", out[:, 0], want[:, t], TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [(20,), (1, 19), (2, 3, 15), (7, 1, 1, 11), (0, 20)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_chunks_with_a_cache_equal_the_whole(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    mamba = layer(ngroups=2, d_ssm=16, dt_limit=(0.1, 2)).to(dtype)
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
        out = [second(first(hidden[:, :7], inference_params=params), inference_params=params)]
        for t in range(7, 12):
            params.seqlen_offset = t
            one = first(hidden[:, t : t + 1], inference_params=params)
            out.append(second(one, inference_params=params))
        assert params.key_value_memory_dict.keys() == {0, 1}
        assert_close("out", torch.cat(out, 1), want, 3e-5)


@pytest.mark.parametrize("per_channel", [False, True])
@torch.no_grad()
def test_heads_update_is_one_step_of_the_formula(per_channel: bool) -> None:
    torch.manual_seed(0)
    state, x, z = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    dt, A, bias = torch.rand(2, 4), -torch.rand(4), torch.randn(4)
    B, C, D = torch.randn(2, 2, 5), torch.randn(2, 2, 5), torch.randn(4, 3) if per_channel else torch.randn(4)
    before = array(state)
    y = heads_update(state, x, dt, A, B, C, D, z, bias, True)
    step = oracle.softplus(array(dt) + array(bias))[..., None, None]
    wide_B, wide_C = (np.repeat(array(t), 2, axis=1)[:, :, None] for t in (B, C))
    after = np.exp(step * array(A)[:, None, None]) * before + step * array(x)[..., None] * wide_B
    assert_close("state", state, after, 3e-6)
    skip = array(D).reshape(4, -1)
    assert_close("y", y, ((after * wide_C).sum(-1) + skip * array(x)) * silu(array(z)), 3e-6)


# ---- packed sequences ----


def test_packed_sequences_equal_separate_ones() -> None:
    mamba = layer(ngroups=2)
    hidden = inputs(1, 30)
    seq_idx = torch.tensor([[-1] * 2 + [0] * 9 + [-1] + [1] * 2 + [3] * 14 + [-1] * 2])
    out = mamba(hidden, seq_idx=seq_idx)
    for mark in (0, 1, 3):
        where = seq_idx[0] == mark
        assert_close(f"sequence {mark}", out[:, where], mamba(hidden[:, where]), 3e-6)
    parts = mamba(hidden, cu_seqlens=torch.tensor([0, 9, 9, 30]))
    assert_close("cu_seqlens", parts, torch.cat([mamba(hidden[:, :9]), mamba(hidden[:, 9:])], 1), 3e-6)


def test_causality() -> None:
    mamba, hidden = layer(), inputs(1, 70)
    changed = hidden.clone()
    changed[:, 50:] += 1
    assert torch.equal(mamba(hidden)[:, :50], mamba(changed)[:, :50])


# ---- as a module ----


@pytest.mark.parametrize(
    "options", [{"bias": True}, {"d_ssm": 2, "norm_before_gate": True}, {"rmsnorm": False, "D_has_hdim": True}], ids=str
)
def test_gradcheck(options: dict[str, Any]) -> None:
    mamba = layer(**{"d_model": 2, "d_state": 2, "headdim": 2, **options}).double()
    names = [name for name, _ in mamba.named_parameters()]

    def forward(hidden: Tensor, *parameters: Tensor) -> Any:
        return torch.func.functional_call(mamba, dict(zip(names, parameters, strict=True)), hidden)

    hidden = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (hidden, *mamba.parameters()))


def test_training_learns_to_repeat_what_the_convolution_cannot_see() -> None:
    block = fresh(d_model=16, d_state=8)
    model = nn.Sequential(nn.Embedding(8, 16), block, nn.Linear(16, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(200):
        tokens = torch.randint(8, (16, 16))
        loss = F.cross_entropy(model(tokens)[:, 5:].flatten(0, 1), tokens[:, :-5].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 2
    assert np.mean(losses[-10:]) < 1.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_trains(dtype: torch.dtype) -> None:
    mamba, hidden = layer(d_ssm=16), inputs(2, 40)
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
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "state_size": 5, "head_dim": 4, "num_heads": 6, "n_groups": 2, "vocab_size": 9}
    config = modeling.Mamba2Config(**sizes, num_hidden_layers=1, **options)
    mixer = modeling.Mamba2Mixer(config, layer_idx=0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    mamba = layer(bias=config.use_bias, conv_bias=config.use_conv_bias, ngroups=2)
    mamba.load_state_dict(mixer.state_dict(), strict=True)
    assert_close("out", mamba(inputs(2, 40)), mixer(inputs(2, 40)), 3e-5)
