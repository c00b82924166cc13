"""The ops that work in place, where test_selective_state_update.py has them plain: heads, pools of states, rings."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerzoo import _native, reference
from layerzoo.ops import causal_conv1d, causal_conv1d_update, selective_state_update, ssd_chunk_scan

from . import oracle
from .inputs import LAYOUTS, lay_out, plain
from .oracle import TOLERANCE, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIONAL = ("D", "z", "dt_bias")
TIED = ("A", "dt", "D", "dt_bias")  # what Mamba-2 has once for a head, and passes expanded


def pool_indices(batch: int, rows: int, padded: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Different rows in no order, and `padded` places without one."""
    indices = torch.randperm(rows)[:batch]
    indices[torch.randperm(batch)[:padded]] = -1 - torch.randint(0, 3, (min(padded, batch),))
    return lay_out(indices.to(dtype), "gaps")


def head_arguments(
    batch: int,
    heads: int,
    channels: int,
    state: int,
    *,
    groups: int = 1,
    tied: tuple[str, ...] = TIED,
    leave_out: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    softplus: bool = True,
    layouts: tuple[str, ...] = ("time-last",),
    pool: tuple[int, int, torch.dtype] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of selective_state_update in heads; `pool`: rows more than the batch, how many are padding, dtype."""
    torch.manual_seed(seed)
    kind = torch.promote_types(dtype, torch.float32)
    rows = batch if pool is None else batch + pool[0]
    tensors = {
        "state": torch.randn(rows, heads, channels, state).to(state_dtype or kind),
        "x": torch.randn(batch, heads, channels).to(dtype),
        "dt": (torch.randn(batch, heads, channels) * 0.5 if softplus else torch.rand(batch, heads, channels)).to(dtype),
        "A": (-0.05 - 2 * torch.rand(heads, channels, state)).to(kind),
        "B": torch.randn(batch, groups, state).to(dtype),
        "C": torch.randn(batch, groups, state).to(dtype),
        "D": torch.randn(heads, channels).to(kind),
        "z": torch.randn(batch, heads, channels).to(dtype),
        "dt_bias": (torch.rand(heads, channels) * 0.2).to(kind),
    }
    laid = {name: lay_out(x, layouts[i % len(layouts)]) for i, (name, x) in enumerate(tensors.items())}
    for name in tied:
        x = laid[name]
        laid[name] = (x[:, :1, :1] if name == "A" else x[..., :1]).expand(x.shape)
    if pool is not None:
        laid["state_batch_indices"] = pool_indices(batch, rows, pool[1], pool[2])
    return {name: x for name, x in laid.items() if name not in leave_out} | {"dt_softplus": softplus}


def used_rows(indices: Tensor | None, state: Tensor) -> Tensor:
    """Which rows of the pool are somebody's."""
    used = torch.zeros(state.shape[0], dtype=torch.bool)
    used[slice(None) if indices is None else indices[indices >= 0].long()] = True
    return used


def spoil(arguments: dict[str, Any], state: Tensor, indices: Tensor | None, *sequences: str) -> None:
    """NaN into what must not be read: rows of nobody, and the inputs of padding."""
    if indices is None:
        return
    state[~used_rows(indices, state)] = torch.nan
    for name in sequences:
        if name in arguments and not any(stride == 0 for stride in arguments[name].stride()):
            arguments[name][indices < 0] = torch.nan


def hold(name: str, got: Tensor, before: Tensor, want: Any, indices: Tensor | None, tolerance: float) -> None:
    """The state after the op: rows in use as expected, all others as they were, bit for bit."""
    used = used_rows(indices, got)
    assert_close(name, got[used], want[used.numpy()], tolerance)
    assert torch.equal(got[~used].nan_to_num(7.0), before[~used].nan_to_num(7.0))


def check_heads(arguments: dict[str, Any]) -> None:
    x, state, indices = arguments["x"], arguments["state"], arguments.get("state_batch_indices")
    spoil(arguments, state, indices, "x", "dt", "z", "B", "C")
    before = state.clone()
    want, want_state = oracle.selective_state_update(**plain(arguments))
    out = selective_state_update(**arguments)
    assert (out.dtype, out.stride()) == (x.dtype, torch.empty_like(x).stride())
    assert_close("out", out, want, TOLERANCE[x.dtype])
    if indices is not None:
        assert not out[indices < 0].any()
    wide = TOLERANCE[torch.float32] * (x.dtype != torch.float64)
    hold("state", state, before, want_state, indices, max(TOLERANCE[state.dtype], wide))


@pytest.mark.parametrize("tied", [(), *((name,) for name in TIED), TIED], ids="+".join)
@pytest.mark.parametrize("leave_out", [(), OPTIONAL], ids="+".join)
def test_heads_tied_or_not(tied: tuple[str, ...], leave_out: tuple[str, ...]) -> None:
    check_heads(head_arguments(2, 4, 19, 24, groups=2, tied=tied, leave_out=leave_out))


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tied", [(), TIED], ids="+".join)
def test_heads_dtypes(tied: tuple[str, ...], dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    check_heads(head_arguments(2, 2, 70, 32, tied=tied, dtype=dtype, state_dtype=state_dtype))


@given(st.data())
def test_any_heads(data: st.DataObject) -> None:
    def pick(*options: Any) -> Any:
        return data.draw(st.sampled_from(options))

    batch, (heads, groups) = pick(0, 1, 3), pick((1, 1), (2, 1), (3, 3), (6, 2))
    check_heads(
        head_arguments(
            batch,
            heads,
            pick(1, 3, 8, 17, 64, 67),
            pick(1, 3, 8, 16, 37, 128, 257),
            groups=groups,
            tied=tuple(data.draw(st.sets(st.sampled_from(TIED)))),
            leave_out=tuple(data.draw(st.sets(st.sampled_from(OPTIONAL)))) if batch else (),
            dtype=pick(*DTYPES),
            state_dtype=pick(None, *DTYPES),
            softplus=pick(True, False),
            layouts=tuple(data.draw(st.permutations(LAYOUTS))),
            pool=pick(None, (0, 0, torch.int32), (4, 1, torch.int64), (1, 3, torch.int32)),
            seed=data.draw(st.integers(0, 99)),
        )
        if batch
        else head_arguments(0, heads, 17, 3, groups=groups, pool=pick(None, (2, 0, torch.int32)))
    )


def test_heads_are_the_steps_of_mamba_2() -> None:
    batch, heads, channels, state, length = 2, 4, 8, 16, 6
    torch.manual_seed(0)
    x, z = torch.randn(2, batch, length, heads, channels)
    dt, A, D, bias = torch.randn(batch, length, heads), -torch.rand(heads), torch.randn(heads), torch.rand(heads)
    B, C = torch.randn(2, batch, length, 2, state)
    want, want_state = ssd_chunk_scan(
        x, dt, A, B, C, 4, D=D, z=z, dt_bias=bias, dt_softplus=True, return_final_states=True
    )
    h = torch.zeros(batch, heads, channels, state)
    wide = (A.view(heads, 1, 1).expand(-1, channels, state), *(t[:, None].expand(-1, channels) for t in (D, bias)))
    for t in range(length):
        dt_t = dt[:, t, :, None].expand(-1, -1, channels)
        out = selective_state_update(h, x[:, t], dt_t, wide[0], B[:, t], C[:, t], wide[1], z[:, t], wide[2], True)
        assert_close(f"step {t}", out, want[:, t], TOLERANCE[torch.float32])
    assert_close("state", h, want_state, TOLERANCE[torch.float32])


def test_the_plain_form_has_a_pool_too() -> None:
    heads = head_arguments(5, 1, 19, 16, tied=(), pool=(4, 2, torch.int64))
    flat = {name: x.squeeze(1) if name in ("state", "x", "dt", "z", "B", "C") else x for name, x in heads.items()}
    flat |= {name: heads[name].squeeze(0) for name in ("A", "D", "dt_bias")} | {"state": flat["state"].clone()}
    assert torch.equal(selective_state_update(**flat), selective_state_update(**heads).squeeze(1))
    assert torch.equal(flat["state"], heads["state"].squeeze(1))


# ---- causal_conv1d_update ----


def conv_step_arguments(
    batch: int,
    channels: int,
    length: int,
    width: int,
    kept: int,
    *,
    ring: torch.dtype | None = torch.int32,
    pool: tuple[int, int, torch.dtype] | None = None,
    bias: bool = True,
    activation: str | None = "silu",
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    layouts: tuple[str, ...] = ("time-last",),
    seed: int = 0,
) -> dict[str, Any]:
    torch.manual_seed(seed)
    kind = torch.promote_types(dtype, torch.float32)
    rows = batch if pool is None else batch + pool[0]
    tensors = {
        "conv_state": torch.randn(rows, channels, kept).to(state_dtype or kind),
        "x": torch.randn(batch, channels, length).to(dtype),
        "weight": torch.randn(channels, width).to(kind),
    }
    found = {name: lay_out(x, layouts[i % len(layouts)]) for i, (name, x) in enumerate(tensors.items())}
    found |= {"bias": torch.randn(channels).to(kind)} if bias else {}
    if ring is not None:
        found["cache_seqlens"] = lay_out(torch.randint(0, 3 * kept + 2, (batch,)).to(ring), "gaps")
    if pool is not None:
        found["conv_state_indices"] = pool_indices(batch, rows, pool[1], pool[2])
    return found | {"activation": activation}


def check_conv(arguments: dict[str, Any], flat: bool = False) -> None:
    """`flat`: x of one step without its axis of time."""
    x, state, indices = (arguments.get(name) for name in ("x", "conv_state", "conv_state_indices"))
    spoil(arguments, state, indices, "x")
    if indices is not None and "cache_seqlens" in arguments:
        arguments["cache_seqlens"][indices < 0] = -5  # of nobody
    before = state.clone()
    values = plain(arguments)
    values["silu"] = values.pop("activation") is not None
    want, want_state = oracle.causal_conv1d_update(**values)
    if flat:
        x, want = x.squeeze(2), want[..., 0]
    out = causal_conv1d_update(**arguments | {"x": x})
    assert (out.dtype, out.shape, out.stride()) == (x.dtype, x.shape, torch.empty_like(x).stride())
    assert_close("out", out, want, TOLERANCE[x.dtype])
    if indices is not None:
        assert not out[indices < 0].any()
    hold("conv_state", state, before, want_state, indices, TOLERANCE[state.dtype])


@pytest.mark.parametrize("kept", [3, 4, 5, 40])
@pytest.mark.parametrize("length", [1, 3, 9, 70])
@pytest.mark.parametrize("pool", [None, (3, 1, torch.int32)], ids=str)
def test_ring(pool: Any, length: int, kept: int) -> None:
    check_conv(conv_step_arguments(5, 19, length, 4, kept, pool=pool))


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ring_dtypes(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    check_conv(conv_step_arguments(3, 19, 2, 4, 5, dtype=dtype, state_dtype=state_dtype, pool=(2, 1, torch.int64)))


@given(st.data())
def test_any_conv_update(data: st.DataObject) -> None:
    def pick(*options: Any) -> Any:
        return data.draw(st.sampled_from(options))

    flat, width = pick(True, False), pick(1, 2, 3, 4, 5, 9)
    arguments = conv_step_arguments(
        pick(0, 1, 4),
        pick(1, 7, 8, 17, 67),
        1 if flat else pick(0, 1, 2, 5, 33, 70),
        width,
        width - 1 + pick(0, 1, 2, 40),
        ring=pick(None, torch.int32, torch.int64),
        pool=pick(None, (0, 0, torch.int32), (4, 1, torch.int64), (1, 3, torch.int32)),
        bias=pick(True, False),
        activation=pick(None, "silu", "swish"),
        dtype=pick(*DTYPES),
        layouts=tuple(data.draw(st.permutations(LAYOUTS))),
        seed=data.draw(st.integers(0, 99)),
    )
    check_conv(arguments, flat)


@pytest.mark.parametrize("kept", [3, 4, 7])
def test_calls_on_a_ring_equal_the_convolution(kept: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 19, 24), torch.randn(19, 4), torch.randn(19)
    want = causal_conv1d(x, weight, bias, activation="silu")
    ring, past = torch.zeros(2, 19, kept), torch.zeros(2, dtype=torch.int32)
    for step in x.split([1, 1, 2, 5, 1, 9, 3, 2], 2):
        t = int(past[0])
        out = causal_conv1d_update(step, ring, weight, bias, "silu", past)
        assert_close(f"step {t}", out, want[:, :, t : t + step.shape[2]], 1e-6)
        past += step.shape[2]
    last = torch.arange(24 - kept, 24)
    assert torch.equal(ring[:, :, last % kept], x[:, :, last])


# ---- both: bad values, kernels and reference, threads, torch ----


def calls() -> dict[str, tuple[Any, dict[str, Any], str, str]]:
    """By name: the op, its arguments, its state, the indices of that."""
    conv = conv_step_arguments(4, 131, 3, 4, 5, pool=(3, 1, torch.int32))
    return {
        "selective_state_update": (
            selective_state_update,
            head_arguments(4, 6, 70, 32, groups=2, pool=(3, 1, torch.int32)),
            "state",
            "state_batch_indices",
        ),
        "causal_conv1d_update": (causal_conv1d_update, conv, "conv_state", "conv_state_indices"),
    }


def positions(name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """As the op and its reference take them."""
    if name == "causal_conv1d_update":
        names = ("x", "conv_state", "weight", "bias", "silu", "cache_seqlens", "conv_state_indices")
        arguments = arguments | {"silu": arguments["activation"] is not None}
    else:
        names = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus", "state_batch_indices")
    return tuple(arguments.get(key) for key in names)


BAD_VALUES = [
    ("selective_state_update", {"state_batch_indices": [0, 7, 1, 2]}, "must be below the 7 rows", r"\[1\] = 7"),
    ("selective_state_update", {"state_batch_indices": [-1, 0, 3, 2**40]}, "must be below the 7 rows", rf"= {2**40}"),
    ("selective_state_update", {"state_batch_indices": [5, -1, -1, 5]}, "must not name a row of the state twice", "5"),
    ("causal_conv1d_update", {"conv_state_indices": [0, 1, 2, 9]}, "must be below the 7 rows", r"\[3\] = 9"),
    ("causal_conv1d_update", {"conv_state_indices": [6, 6, 2, -9]}, "must not name a row of the state twice", "6"),
    ("causal_conv1d_update", {"cache_seqlens": [0, -2, 0, 0]}, "must not be negative", r"cache_seqlens\[1\] = -2"),
]


@pytest.mark.parametrize("row", BAD_VALUES, ids=lambda row: f"{next(iter(row[1]))}-{row[3]}")
@pytest.mark.parametrize("by", ["op", "reference"])
def test_bad_values_are_refused_before_anything_is_written(row: Any, by: str) -> None:
    name, change, *words = row
    op, arguments, state, indices = calls()[name]
    arguments[indices] = torch.tensor([0, 1, 2, 3])
    arguments |= {key: torch.tensor(values) for key, values in change.items()}
    before = arguments[state].clone()
    run = op if by == "op" else getattr(reference.ssm, name)
    with pytest.raises(RuntimeError, match=f"{name}: {next(iter(change))} .*{words[0]}.*{words[1]}"):
        run(**arguments) if by == "op" else run(*positions(name, arguments))
    assert torch.equal(arguments[state], before)


meta = {"device": "meta"}
BAD_HEADS: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"x": torch.ones(2, 0, 3)}, ValueError, ("x must have at least one head", "got 0")),
    ({"x": torch.ones(2, 4, 0)}, ValueError, ("x must have at least one channel", "got 0")),
    ({"x": torch.ones(2, 4, 3, 1)}, ValueError, ("(batch, channels) or (batch, heads, channels)", "(2, 4, 3, 1)")),
    ({"state": torch.ones(2, 4, 5)}, ValueError, ("state", "(batch, heads, channels, state) = (2, 4, 3, 5)")),
    ({"dt": torch.ones(2, 4)}, ValueError, ("dt", "(batch, heads, channels) = (2, 4, 3)", "got (2, 4)")),
    ({"A": torch.ones(4)}, ValueError, ("A must have shape (heads, channels, state)", "got (4,)")),
    ({"A": torch.ones(4, 1, 5)}, ValueError, ("A", "(4, 3, 5)", "got (4, 1, 5)")),
    ({"B": torch.ones(2, 5)}, ValueError, ("B must have shape (batch, groups, state)", "got (2, 5)")),
    ({"B": torch.ones(2, 3, 5)}, ValueError, ("B has 3 groups", "divide the 4 heads")),
    ({"B": torch.ones(2, 0, 5)}, ValueError, ("B has 0 groups", "divide the 4 heads")),
    ({"C": torch.ones(2, 1, 5)}, ValueError, ("C", "(batch, groups, state) = (2, 2, 5)", "got (2, 1, 5)")),
    ({"D": torch.ones(4)}, ValueError, ("D", "(heads, channels) = (4, 3)", "got (4,)")),
    ({"dt_bias": torch.ones(4, 1)}, ValueError, ("dt_bias", "(4, 3)", "got (4, 1)")),
    ({"z": torch.ones(2, 4, 3).long()}, TypeError, ("z must have dtype", "got int64")),
    ({"state_batch_indices": [0, 1]}, TypeError, ("state_batch_indices must be a tensor", "got list")),
    ({"state_batch_indices": torch.zeros(3).int()}, ValueError, ("(batch,) = (2,)", "got (3,)")),
    ({"state_batch_indices": torch.zeros(2)}, TypeError, ("must have dtype int32, int64", "got float32")),
    ({"state_batch_indices": torch.zeros(2, dtype=torch.int32, **meta)}, ValueError, ("must be on cpu", "got meta")),
    (
        {"state_batch_indices": torch.zeros(2).int(), "state": torch.ones(9, 4, 5)},
        ValueError,
        ("state must have shape (rows, heads, channels, state)", "got (9, 4, 5)"),
    ),
    (
        {"state_batch_indices": torch.zeros(2).int(), "state": torch.ones(9, 4, 2, 5)},
        ValueError,
        ("state must have shape (rows, heads, channels, state) = (9, 4, 3, 5)", "got (9, 4, 2, 5)"),
    ),
]
BAD_POOLED_CONV: list[tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = [
    ({"cache_seqlens": torch.zeros(2)}, TypeError, ("cache_seqlens must have dtype int32, int64", "got float32")),
    ({"cache_seqlens": torch.zeros(1).int()}, ValueError, ("cache_seqlens", "(batch,) = (2,)", "got (1,)")),
    ({"cache_seqlens": 3}, TypeError, ("cache_seqlens must be a tensor", "got int")),
    ({"conv_state_indices": torch.zeros(2)}, TypeError, ("conv_state_indices must have dtype int32", "got float32")),
    ({"conv_state_indices": torch.zeros(2, 1).int()}, ValueError, ("conv_state_indices", "(2,)", "got (2, 1)")),
    (
        {"conv_state_indices": torch.zeros(2).int(), "conv_state": torch.ones(9, 5, 3)},
        ValueError,
        ("conv_state must have shape (rows, channels, kept) = (9, 4, 3)", "got (9, 5, 3)"),
    ),
    (
        {"conv_state_indices": torch.zeros(2).int(), "conv_state": torch.ones(9, 4, 1)},
        ValueError,
        ("conv_state must keep at least width - 1 = 2", "got 1"),
    ),
]


@pytest.mark.parametrize("name", list(calls()))
def test_bad_input(name: str) -> None:
    if name == "causal_conv1d_update":
        op: Any = causal_conv1d_update
        rows, good = BAD_POOLED_CONV, conv_step_arguments(2, 4, 1, 3, 3, ring=None)
    else:
        op, rows, good = selective_state_update, BAD_HEADS, head_arguments(2, 4, 3, 5, groups=2)
    for change, error, words in rows:
        with pytest.raises(error) as caught:
            op(**good | change)
        message = str(caught.value)
        assert message.startswith(f"{name}: ")
        assert all(word in message for word in words), message


@pytest.mark.native
@pytest.mark.parametrize("name", list(calls()))
def test_kernels_refuse_indices_of_another_type(name: str) -> None:
    _, arguments, _, indices = calls()[name]
    inputs = positions(name, arguments | {indices: torch.zeros(4)})
    with pytest.raises(RuntimeError, match=f"{name}: {indices} must be int32 or int64"):
        getattr(torch.ops.layerzoo, name)(*inputs)


@pytest.mark.native
@pytest.mark.parametrize("name", list(calls()))
def test_kernels_agree_with_the_reference(name: str) -> None:
    op, arguments, state, _ = calls()[name]
    twin = arguments[state].clone()
    count = _native.calls(name)
    out = op(**arguments)
    assert _native.calls(name) == count + 1
    want = getattr(reference.ssm, name)(*positions(name, arguments | {state: twin}))
    assert_close("out", out, want, TOLERANCE[torch.float32])
    assert_close(state, arguments[state], twin, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", list(calls()))
def test_any_number_of_threads_gives_the_same_bits(name: str, threads: Any) -> None:
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        op, arguments, state, _ = calls()[name]
        results.append((op(**arguments), arguments[state]))
    for out, state in results:
        assert torch.equal(out, results[0][0])
        assert torch.equal(state, results[0][1])


@pytest.mark.parametrize("name", list(calls()))
def test_opcheck(name: str) -> None:
    _, arguments, _, _ = calls()[name]
    torch.library.opcheck(getattr(torch.ops.layerzoo, name).default, positions(name, arguments))


def test_gradients_are_refused_and_autocast_leaves_all_alone() -> None:
    for name, (op, arguments, state, indices) in calls().items():
        with pytest.raises(ValueError, match=f"{name}: works in place and has no gradient"):
            op(**arguments | {"x": arguments["x"].clone().requires_grad_()})
        twin = arguments | {state: arguments[state].clone(), indices: arguments[indices].clone()}
        want = op(**arguments)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(op(**twin), want)
        assert torch.equal(twin[state], arguments[state])


@pytest.mark.slow
def test_compile() -> None:
    torch._dynamo.reset()
    for op, arguments, state, _ in calls().values():
        twin = arguments | {state: arguments[state].clone()}
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert torch.equal(compiled(**twin), op(**arguments))
        assert torch.equal(twin[state], arguments[state])


def test_a_pool_is_not_copied() -> None:
    """Views of it are written where they lie: rows of one in which every second stands between."""
    whole = torch.randn(8, 2, 4, 16)
    arguments = head_arguments(2, 2, 4, 16) | {"state": whole[::2], "state_batch_indices": torch.tensor([3, 1])}
    before = whole.clone()
    selective_state_update(**arguments)
    changed = (whole != before).flatten(1).any(1)
    assert np.flatnonzero(changed.numpy()).tolist() == [2, 6]
