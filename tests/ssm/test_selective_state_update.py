"""The ops that work in place, selective_state_update and causal_conv1d_update, against the numpy oracle."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerzoo.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update

from . import oracle
from .inputs import LAYOUTS, conv_arguments, lay_out, plain, scan_arguments
from .oracle import TOLERANCE, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
STATE_OPTIONAL = ("D", "z", "dt_bias")


def step_arguments(
    batch: int,
    channels: int,
    state: int,
    *,
    dtype: torch.dtype = torch.float32,
    state_dtype: torch.dtype | None = None,
    leave_out: tuple[str, ...] = (),
    softplus: bool = True,
    layouts: tuple[str, ...] = ("time-last",),
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of selective_state_update."""
    scan = scan_arguments(batch, channels, 1, state, dtype=dtype, softplus=softplus, seed=seed)
    tensors = {
        "state": scan["initial_state"].to(state_dtype or scan["initial_state"].dtype),
        "A": scan["A"],
        "D": scan["D"],
        "dt_bias": scan["delta_bias"],
    }
    tensors |= {"x" if name == "u" else name: scan[name][..., 0] for name in ("u", "z", "B", "C")}
    tensors["dt"] = scan["delta"][..., 0]
    laid = {name: lay_out(x, layouts[i % len(layouts)]) for i, (name, x) in enumerate(tensors.items())}
    return {name: x for name, x in laid.items() if name not in leave_out} | {"dt_softplus": softplus}


def check_step(arguments: dict[str, Any]) -> None:
    values = plain(arguments)
    names = {"u": "x", "delta": "dt", "z": "z", "B": "B", "C": "C"}
    steps = {name: values[given][..., None] for name, given in names.items() if given in values}
    others = {"A": values["A"], "D": values.get("D"), "delta_bias": values.get("dt_bias")}
    want, want_state = oracle.selective_scan(
        **steps, **others, delta_softplus=values["dt_softplus"], initial_state=values["state"]
    )
    x, state = arguments["x"], arguments["state"]
    out = selective_state_update(**arguments)
    assert (out.dtype, out.stride()) == (x.dtype, torch.empty_like(x).stride())
    assert_close("out", out, want[..., 0], TOLERANCE[x.dtype])
    assert_close(
        "state", state, want_state, max(TOLERANCE[state.dtype], TOLERANCE[torch.float32] * (x.dtype != torch.float64))
    )


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("leave_out", [(), *((name,) for name in STATE_OPTIONAL), STATE_OPTIONAL], ids="+".join)
def test_step_optional_arguments(leave_out: tuple[str, ...], softplus: bool) -> None:
    check_step(step_arguments(2, 19, 5, leave_out=leave_out, softplus=softplus))


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_mixed_dtypes(dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    check_step(step_arguments(2, 19, 16, dtype=dtype, state_dtype=state_dtype))


@st.composite
def any_step(draw: st.DrawFn) -> dict[str, Any]:
    return step_arguments(
        draw(st.sampled_from([0, 1, 2])),
        draw(st.sampled_from([1, 7, 8, 17, 64, 131])),
        draw(st.sampled_from([1, 2, 3, 4, 5, 16, 17, 37, 64, 65])),
        dtype=draw(st.sampled_from(DTYPES)),
        state_dtype=draw(st.sampled_from([None, *DTYPES])),
        leave_out=tuple(draw(st.sets(st.sampled_from(STATE_OPTIONAL)))),
        softplus=draw(st.booleans()),
        layouts=tuple(draw(st.permutations(LAYOUTS))),
        seed=draw(st.integers(0, 99)),
    )


@given(any_step())
def test_any_step(arguments: dict[str, Any]) -> None:
    check_step(arguments)


def test_steps_equal_the_scan() -> None:
    whole = scan_arguments(2, 19, 12, 4, leave_out=("seq_idx",))
    out, last = selective_scan(**whole, return_last_state=True)
    state = whole["initial_state"].clone()
    parameters = {"A": whole["A"], "D": whole["D"], "dt_bias": whole["delta_bias"], "dt_softplus": True}
    for t in range(12):
        x, dt, z, B, C = (whole[name][..., t] for name in ("u", "delta", "z", "B", "C"))
        assert_close(f"step {t}", selective_state_update(state, x, dt, B=B, C=C, z=z, **parameters), out[..., t], 1e-6)
    assert_close("state", state, last, 1e-6)


def test_step_far_out() -> None:
    arguments = step_arguments(2, 19, 4)
    arguments["dt"] = torch.linspace(-50, 50, 19).expand(2, 19)
    arguments["z"] = torch.linspace(-100, 100, 19).expand(2, 19)
    arguments["A"] = arguments["A"] * torch.tensor([1e-3, 1, 30, 200])
    check_step(arguments)


# ---- causal_conv1d_update ----


def check_conv(arguments: dict[str, Any], length: int | None, kept: int, layout: str = "time-last") -> None:
    """`arguments` of causal_conv1d become those of the update; `length` None is x without a time axis."""
    del arguments["seq_idx"]
    weight, left = arguments["weight"], arguments.pop("initial_states")
    older = torch.randn(*left.shape[:2], kept - left.shape[2]).to(left.dtype)
    state = lay_out(torch.cat([older, left], 2), layout)
    x = arguments["x"]
    values = plain(arguments) | {"initial_states": oracle.array(left)}
    values["silu"] = values.pop("activation") is not None
    want, _ = oracle.causal_conv1d(**values)
    moved = np.concatenate([oracle.array(state), values["x"]], 2)[:, :, x.shape[2] :]
    if length is None:
        arguments["x"], want = x.squeeze(2), want[..., 0]
    out = causal_conv1d_update(conv_state=state, **arguments)
    assert (out.dtype, out.shape, out.stride()) == (
        x.dtype,
        arguments["x"].shape,
        torch.empty_like(arguments["x"]).stride(),
    )
    assert_close("out", out, want, max(TOLERANCE[x.dtype], TOLERANCE[weight.dtype] if x.dtype == torch.float64 else 0))
    assert_close("conv_state", state, moved, TOLERANCE[state.dtype])


@pytest.mark.parametrize("state_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kept", [3, 4, 40])
def test_conv_step_dtypes(kept: int, dtype: torch.dtype, state_dtype: torch.dtype) -> None:
    arguments = conv_arguments(2, 19, 1, 4, dtype=dtype)
    arguments["initial_states"] = arguments["initial_states"].to(state_dtype)
    check_conv(arguments, None, kept)


@given(st.data())
def test_any_conv_step(data: st.DataObject) -> None:
    def pick(*options: Any) -> Any:
        return data.draw(st.sampled_from(options))

    length, width = pick(None, 0, 1, 2, 5, 33, 70), pick(1, 2, 3, 4, 5, 9)
    arguments = conv_arguments(
        pick(0, 1, 2),
        pick(1, 7, 8, 17, 131),
        1 if length is None else length,
        width,
        leave_out=pick((), ("bias",)),
        activation=pick(None, "silu", "swish"),
        dtype=pick(*DTYPES),
        layouts=tuple(data.draw(st.permutations(LAYOUTS))),
        seed=data.draw(st.integers(0, 99)),
    )
    check_conv(arguments, length, width - 1 + pick(0, 1, 40), pick(*LAYOUTS))


def test_conv_steps_equal_the_convolution() -> None:
    whole = conv_arguments(2, 19, 12, 4, leave_out=("seq_idx", "initial_states"))
    out = causal_conv1d(**whole)
    state = torch.zeros(2, 19, 4)
    x = whole.pop("x")
    for t in range(12):
        assert_close(f"step {t}", causal_conv1d_update(x[..., t], state, **whole), out[..., t], 1e-6)
    assert torch.equal(state, x[..., -4:])


# ---- both ----


def calls() -> dict[str, tuple[Any, dict[str, Any], str]]:
    conv = conv_arguments(2, 131, 3, 4, leave_out=("seq_idx",))
    conv["conv_state"] = conv.pop("initial_states")
    return {
        "selective_state_update": (selective_state_update, step_arguments(2, 131, 16), "state"),
        "causal_conv1d_update": (causal_conv1d_update, conv, "conv_state"),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_only_the_state_changes_and_any_number_of_threads_gives_the_same_bits(name: str, threads: Any) -> None:
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        op, arguments, changed = calls()[name]
        before = {key: x.clone() for key, x in arguments.items() if isinstance(x, Tensor)}
        out = op(**arguments)
        assert not torch.equal(arguments[changed], before.pop(changed))
        assert all(torch.equal(arguments[key], x) for key, x in before.items())
        results.append((out, arguments[changed]))
    for out, state in results:
        assert_close("out", out, results[0][0], 0)
        assert_close(changed, state, results[0][1], 0)


@pytest.mark.parametrize("name", list(calls()))
def test_inputs_that_need_gradients_are_refused(name: str) -> None:
    op, arguments, _ = calls()[name]
    for key, x in arguments.items():
        if isinstance(x, Tensor):
            with pytest.raises(ValueError, match=f"{name}: works in place and has no gradient"):
                op(**arguments | {key: x.detach().clone().requires_grad_()})
            with torch.no_grad():
                op(**arguments | {key: x.detach().clone().requires_grad_()})


@pytest.mark.parametrize("name", list(calls()))
def test_an_expanded_state_is_refused(name: str) -> None:
    op, arguments, changed = calls()[name]
    state = arguments[changed][:1].expand(arguments[changed].shape)
    before = state.clone()
    with pytest.raises(ValueError, match=f"{name}: {changed} is changed in place and must not be expanded"):
        op(**arguments | {changed: state})
    assert torch.equal(state, before)


@pytest.mark.parametrize("name", list(calls()))
def test_autocast_leaves_both_alone(name: str) -> None:
    op, arguments, changed = calls()[name]
    state = arguments[changed].clone()
    want = op(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        out = op(**arguments | {changed: state})
    assert torch.equal(out, want)
    assert torch.equal(state, arguments[changed])
