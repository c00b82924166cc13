"""The state-space ops as numpy loops in float64, written from their formulas and independent of the package.

Letters: b batch, d channel, l time, n state, g group, w kernel width. Gradients are adjoints written out by hand;
test_selective_scan.py holds them to complex-step derivatives of the forward loops.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# Relative in norm.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def assert_close(name: str, got: Tensor, want: Array | Tensor, tolerance: float) -> None:
    """Holds |got - want| to `tolerance` |want|, in norm, and the worst element to 8 times that of the largest."""
    have = got.detach().double().numpy()
    expected = want.detach().double().numpy() if isinstance(want, Tensor) else want
    assert have.shape == expected.shape, f"{name}: shape {have.shape}, expected {expected.shape}"
    assert np.isfinite(have).all(), f"{name}: {np.sum(~np.isfinite(have))} of {have.size} elements are not finite"
    if not have.size:
        return
    off = np.abs(have - expected)
    distance, size = np.linalg.norm(off), np.linalg.norm(expected)
    worst = np.unravel_index(off.argmax(), off.shape)
    where = f"worst at {tuple(map(int, worst))}: {have[worst]:.9g}, expected {expected[worst]:.9g}"
    assert distance <= tolerance * size, (
        f"{name}: off by {distance / (size or 1):.3g}, allowed {tolerance:.3g}; {where}"
    )
    assert off.max() <= 8 * tolerance * np.abs(expected).max(), f"{name}: {where}"


def array(x: Tensor | None) -> Array | None:
    return None if x is None else x.detach().double().numpy().copy()


def sigmoid(x: Array) -> Array:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.log1p(np.exp(-x * np.sign(x.real))) + x * (x.real > 0)  # complex too


def steps(ids: NDArray[np.int64] | None, length: int, reverse: bool) -> Iterator[tuple[int, bool]]:
    """(t, does another sequence begin here?) for the steps of one row that are no padding, in the order of the scan."""
    previous = None
    for t in reversed(range(length)) if reverse else range(length):
        mark = 0 if ids is None else ids[t]
        if mark >= 0:
            yield t, previous is not None and mark != previous
            previous = mark


def at(x: Array, b: int, t: int, channels: int) -> Array:
    """B or C of every channel at one step, (d, n)."""
    if x.ndim == 2:
        return x
    if x.ndim == 3:
        return np.repeat(x[b, None, :, t], channels, axis=0)
    return np.repeat(x[b, :, :, t], channels // x.shape[1], axis=0)


def add_at(x: Array, b: int, t: int, value: Array) -> None:
    """The adjoint of `at`: adds (d, n) to the place that it was read from."""
    if x.ndim == 2:
        x += value
    elif x.ndim == 3:
        x[b, :, t] += value.sum(0)
    else:
        x[b, :, :, t] += value.reshape(x.shape[1], -1, value.shape[1]).sum(1)


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    seq_idx: NDArray[np.int64] | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """(out (b, d, l), last state (b, d, n))."""
    batch, channels, length = u.shape
    kind = np.result_type(*(x for x in (u, delta, A, B, C, D, z, delta_bias, initial_state) if x is not None))
    out, last = np.zeros(u.shape, kind), np.zeros((batch, *A.shape), kind)
    for b in range(batch):
        x = np.zeros(A.shape, kind) if initial_state is None else initial_state[b]
        for t, begins in steps(None if seq_idx is None else seq_idx[b], length, reverse):
            s = delta[b, :, t] + (0 if delta_bias is None else delta_bias)
            dt = (softplus(s) if delta_softplus else s)[:, None]
            x = np.exp(dt * A) * (0 if begins else x) + dt * u[b, :, t, None] * at(B, b, t, channels)
            y = (at(C, b, t, channels) * x).sum(1) + (0 if D is None else D * u[b, :, t])
            out[b, :, t] = y if z is None else y * z[b, :, t] * sigmoid(z[b, :, t])
        last[b] = x
    return out, last


def selective_scan_gradients(
    grad_out: Array,
    grad_last: Array,
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    seq_idx: NDArray[np.int64] | None = None,
    reverse: bool = False,
) -> dict[str, Array]:
    """The gradient of sum(grad_out out) + sum(grad_last last) by argument; D, z, ... are always there."""
    batch, channels, length = u.shape
    grads = {name: np.zeros_like(x) for name, x in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C), ("z", u))}
    grads |= {"D": np.zeros(channels), "delta_bias": np.zeros(channels), "initial_state": np.zeros((batch, *A.shape))}
    for b in range(batch):
        order = list(steps(None if seq_idx is None else seq_idx[b], length, reverse))
        x = np.zeros(A.shape) if initial_state is None else initial_state[b]
        before, after = {}, {}
        for t, begins in order:
            s = delta[b, :, t] + (0 if delta_bias is None else delta_bias)
            dt = (softplus(s) if delta_softplus else s)[:, None]
            before[t] = np.zeros(A.shape) if begins else x
            after[t] = x = np.exp(dt * A) * before[t] + dt * u[b, :, t, None] * at(B, b, t, channels)
        grad_x = grad_last[b].copy()  # of the state after the step at hand
        for t, begins in reversed(order):
            ut, Bt, Ct = u[b, :, t], at(B, b, t, channels), at(C, b, t, channels)
            s = delta[b, :, t] + (0 if delta_bias is None else delta_bias)
            dt = softplus(s) if delta_softplus else s
            decay = np.exp(dt[:, None] * A)
            grad_y = grad_out[b, :, t]
            if z is not None:
                gate = sigmoid(z[b, :, t])
                y = (Ct * after[t]).sum(1) + (0 if D is None else D * ut)
                grads["z"][b, :, t] = grad_y * y * (gate + z[b, :, t] * gate * (1 - gate))
                grad_y = grad_y * z[b, :, t] * gate
            add_at(grads["C"], b, t, grad_y[:, None] * after[t])
            grads["D"] += grad_y * ut
            grads["u"][b, :, t] = 0 if D is None else D * grad_y
            grad_x = grad_x + grad_y[:, None] * Ct
            add_at(grads["B"], b, t, grad_x * (dt * ut)[:, None])
            grads["u"][b, :, t] += (grad_x * Bt).sum(1) * dt
            grads["A"] += grad_x * before[t] * decay * dt[:, None]
            grad_dt = (grad_x * (before[t] * decay * A + ut[:, None] * Bt)).sum(1)
            grad_s = grad_dt * sigmoid(s) if delta_softplus else grad_dt
            grads["delta"][b, :, t] = grad_s
            grads["delta_bias"] += grad_s
            grad_x = np.zeros(A.shape) if begins else grad_x * decay
        grads["initial_state"][b] = grad_x
    return grads


def _of_heads(x: Array, b: int, t: int, heads: int) -> Array:
    """B or C of every head at one step, (h, n)."""
    return np.repeat(x[b, t], heads // x.shape[2], axis=0)


def _to_groups(value: Array, groups: int) -> Array:
    """The adjoint of `_of_heads`: (h, n) summed to (g, n)."""
    return value.reshape(groups, -1, value.shape[1]).sum(1)


def _skip(D: Array | None) -> Array:
    """D by which (h, p) is multiplied."""
    if D is None:
        return np.zeros((1, 1))
    return D if D.ndim == 2 else D[:, None]


def ssd_chunk_scan(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    initial_states: Array | None = None,
    seq_idx: NDArray[np.int64] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, np.inf),
) -> tuple[Array, Array]:
    """(out (b, l, h, p), final states (b, h, p, n))."""
    batch, length, heads, width = x.shape
    kind = np.result_type(*(v for v in (x, dt, A, B, C, D, z, dt_bias, initial_states) if v is not None))
    out, final = np.zeros(x.shape, kind), np.zeros((batch, heads, width, B.shape[3]), kind)
    for b in range(batch):
        state = np.zeros(final.shape[1:], kind) if initial_states is None else initial_states[b]
        for t, begins in steps(None if seq_idx is None else seq_idx[b], length, False):
            s = dt[b, t] + (0 if dt_bias is None else dt_bias)
            size = softplus(s) if dt_softplus else s
            size = np.where(size.real < dt_limit[0], dt_limit[0], np.where(size.real > dt_limit[1], dt_limit[1], size))
            state = 0 * state if begins else state
            into = (size[:, None] * x[b, t])[:, :, None] * _of_heads(B, b, t, heads)[:, None]
            state = np.exp(size * A)[:, None, None] * state + into
            y = np.einsum("hpn,hn->hp", state, _of_heads(C, b, t, heads)) + _skip(D) * x[b, t]
            out[b, t] = y if z is None else y * z[b, t] * sigmoid(z[b, t])
        final[b] = state
    return out, final


def ssd_chunk_scan_gradients(
    grad_out: Array,
    grad_final: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    initial_states: Array | None = None,
    seq_idx: NDArray[np.int64] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, np.inf),
) -> dict[str, Array]:
    """The gradient of sum(grad_out out) + sum(grad_final final) by argument; D, z, ... are always there."""
    batch, length, heads, width = x.shape
    grads = {name: np.zeros_like(v) for name, v in (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C), ("z", x))}
    grads |= {"D": np.zeros((heads, width)), "dt_bias": np.zeros(heads), "initial_states": np.zeros(grad_final.shape)}
    for b in range(batch):
        order = list(steps(None if seq_idx is None else seq_idx[b], length, False))
        state = np.zeros(grad_final.shape[1:]) if initial_states is None else initial_states[b]
        before, after, sizes, slopes = {}, {}, {}, {}
        for t, begins in order:
            s = dt[b, t] + (0 if dt_bias is None else dt_bias)
            size = softplus(s) if dt_softplus else s
            inside = (size >= dt_limit[0]) & (size <= dt_limit[1])
            slopes[t] = inside * (sigmoid(s) if dt_softplus else 1.0)
            sizes[t] = np.clip(size, *dt_limit)
            before[t] = np.zeros_like(state) if begins else state
            into = (sizes[t][:, None] * x[b, t])[:, :, None] * _of_heads(B, b, t, heads)[:, None]
            after[t] = state = np.exp(sizes[t] * A)[:, None, None] * before[t] + into
        grad_state = grad_final[b].copy()
        for t, begins in reversed(order):
            Bt, Ct, size = _of_heads(B, b, t, heads), _of_heads(C, b, t, heads), sizes[t]
            grad_y = grad_out[b, t]
            if z is not None:
                gate = sigmoid(z[b, t])
                y = np.einsum("hpn,hn->hp", after[t], Ct) + _skip(D) * x[b, t]
                grads["z"][b, t] = grad_y * y * (gate + z[b, t] * gate * (1 - gate))
                grad_y = grad_y * z[b, t] * gate
            grads["C"][b, t] = _to_groups(np.einsum("hp,hpn->hn", grad_y, after[t]), C.shape[2])
            grads["D"] += grad_y * x[b, t]
            grad_state = grad_state + grad_y[:, :, None] * Ct[:, None]
            into = np.einsum("hpn,hn->hp", grad_state, Bt)
            grads["B"][b, t] = _to_groups(np.einsum("hpn,hp->hn", grad_state, size[:, None] * x[b, t]), B.shape[2])
            grads["x"][b, t] = size[:, None] * into + _skip(D) * grad_y
            decay = np.exp(size * A)
            by_decay = (grad_state * before[t]).sum((1, 2)) * decay
            grads["A"] += by_decay * size
            grad_s = (by_decay * A + (into * x[b, t]).sum(1)) * slopes[t]
            grads["dt"][b, t] = grad_s
            grads["dt_bias"] += grad_s
            grad_state = np.zeros_like(grad_state) if begins else grad_state * decay[:, None, None]
        grads["initial_states"][b] = grad_state
    if D is not None and D.ndim == 1:
        grads["D"] = grads["D"].sum(1)
    return grads


def _read(x: Array, initial: Array | None, b: int, s: int) -> Array:
    """Input s of row b; those left of step 0 come from `initial`, newest last."""
    if s >= 0:
        return x[b, :, s]
    return np.zeros(x.shape[1]) if initial is None else initial[b, :, initial.shape[2] + s]


def _counts(seq_idx: NDArray[np.int64] | None, b: int, t: int, s: int) -> bool:
    """Does step t read input s? What lies left of step 0 belongs to the sequence of step 0."""
    return seq_idx is None or (seq_idx[b, t] >= 0 and seq_idx[b, max(s, 0)] == seq_idx[b, t])


def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    seq_idx: NDArray[np.int64] | None = None,
    initial_states: Array | None = None,
    silu: bool = False,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """(out (b, d, l), the last w - 1 inputs (b, d, w - 1)); `reverse` turns time round, in arguments and results."""
    if reverse:
        x, ids, initial = (None if t is None else t[..., ::-1] for t in (x, seq_idx, initial_states))
        out, final = causal_conv1d(x, weight, bias, ids, initial, silu)
        return out[..., ::-1], final[..., ::-1]
    batch, _, length = x.shape
    halo = weight.shape[1] - 1
    out, final = np.zeros_like(x), np.zeros((*x.shape[:2], halo))
    for b in range(batch):
        for t in range(length):
            if seq_idx is not None and seq_idx[b, t] < 0:
                continue
            y = np.zeros(x.shape[1]) if bias is None else bias.copy()
            for k in range(halo + 1):
                if _counts(seq_idx, b, t, t - halo + k):
                    y += weight[:, k] * _read(x, initial_states, b, t - halo + k)
            out[b, :, t] = y * sigmoid(y) if silu else y
        for i in range(halo):
            final[b, :, i] = _read(x, initial_states, b, length - halo + i)
    return out, final


def causal_conv1d_gradients(
    grad_out: Array,
    grad_final: Array,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    seq_idx: NDArray[np.int64] | None = None,
    initial_states: Array | None = None,
    silu: bool = False,
    reverse: bool = False,
) -> dict[str, Array]:
    """The gradient of sum(grad_out out) + sum(grad_final final) by argument; bias, initial_states are always there."""
    if reverse:
        turned = [None if t is None else t[..., ::-1] for t in (grad_out, grad_final, x, seq_idx, initial_states)]
        found = causal_conv1d_gradients(*turned[:3], weight, bias, *turned[3:], silu)
        return {name: grad[..., ::-1] if name in ("x", "initial_states") else grad for name, grad in found.items()}
    batch, channels, length = x.shape
    halo = weight.shape[1] - 1
    inputs = np.zeros((batch, channels, halo + length))  # initial_states, then x
    grad_weight, grad_bias = np.zeros_like(weight), np.zeros(channels)
    for b in range(batch):
        for t in range(length):
            if seq_idx is not None and seq_idx[b, t] < 0:
                continue
            taps = [k for k in range(halo + 1) if _counts(seq_idx, b, t, t - halo + k)]
            y = np.zeros(channels) if bias is None else bias.copy()
            for k in taps:
                y += weight[:, k] * _read(x, initial_states, b, t - halo + k)
            gate = sigmoid(y)
            grad = grad_out[b, :, t] * ((gate + y * gate * (1 - gate)) if silu else 1)
            grad_bias += grad
            for k in taps:
                grad_weight[:, k] += grad * _read(x, initial_states, b, t - halo + k)
                inputs[b, :, t + k] += grad * weight[:, k]
        inputs[b, :, length:] += grad_final[b]
    return {"x": inputs[:, :, halo:], "weight": grad_weight, "bias": grad_bias, "initial_states": inputs[:, :, :halo]}


def selective_state_update(
    state: Array,
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    dt_bias: Array | None = None,
    dt_softplus: bool = False,
    state_batch_indices: NDArray[np.int64] | None = None,
) -> tuple[Array, Array]:
    """The step in heads: (out (b, h, p), state (rows, h, p, n) after it). Rows of padding give 0 and change nothing."""
    batch, heads, channels = x.shape
    out, after = np.zeros(x.shape), state.copy()
    for b in range(batch):
        row = b if state_batch_indices is None else state_batch_indices[b]
        if row < 0:
            continue
        for h in range(heads):
            group = h * B.shape[1] // heads
            for p in range(channels):
                s = np.float64(dt[b, h, p] + (0 if dt_bias is None else dt_bias[h, p]))
                step = softplus(s) if dt_softplus else s
                after[row, h, p] = np.exp(step * A[h, p]) * state[row, h, p] + step * x[b, h, p] * B[b, group]
                y = C[b, group] @ after[row, h, p] + (0 if D is None else D[h, p] * x[b, h, p])
                out[b, h, p] = y if z is None else y * z[b, h, p] * sigmoid(z[b, h, p])
    return out, after


def causal_conv1d_update(
    x: Array,
    conv_state: Array,
    weight: Array,
    bias: Array | None = None,
    silu: bool = False,
    cache_seqlens: NDArray[np.int64] | None = None,
    conv_state_indices: NDArray[np.int64] | None = None,
) -> tuple[Array, Array]:
    """Input by input: (out (b, d, l), conv_state (rows, d, kept) after them), which is a ring with `cache_seqlens`."""
    batch, channels, length = x.shape
    kept, halo = conv_state.shape[2], weight.shape[1] - 1
    out, after = np.zeros(x.shape), conv_state.copy()
    for b in range(batch):
        row = b if conv_state_indices is None else conv_state_indices[b]
        for t in range(length if row >= 0 else 0):
            first = kept if cache_seqlens is None else int(cache_seqlens[b]) + t  # where the input at hand belongs
            y = (np.zeros(channels) if bias is None else bias.copy()) + weight[:, halo] * x[b, :, t]
            for k in range(halo):
                y += weight[:, k] * after[row, :, (first - halo + k) % kept]
            out[b, :, t] = y * sigmoid(y) if silu else y
            if cache_seqlens is None:
                after[row] = np.concatenate([after[row], x[b, :, t, None]], 1)[:, 1:]
            elif kept:
                after[row, :, first % kept] = x[b, :, t]
    return out, after


def linear_scan(a: Any, x: Any, initial_state: Any = None, reverse: bool = False) -> Any:
    """Step t as a sum of all inputs before it, each by the product of the factors since: no recurrence."""
    if reverse:
        return linear_scan(a[:, ::-1], x[:, ::-1], initial_state)[:, ::-1]
    out = np.zeros(x.shape, np.result_type(a, x))
    for t in range(x.shape[1]):
        factor = np.ones_like(out[:, t])
        for s in range(t, -1, -1):
            out[:, t] += factor * x[:, s]
            factor = factor * a[:, s]
        out[:, t] += 0 if initial_state is None else factor * initial_state
    return out


def linear_scan_gradients(
    grad: Any, a: Any, x: Any, initial_state: Any = None, reverse: bool = False
) -> dict[str, Any]:
    """The gradient of Re sum(conj(grad) h) by argument, as torch defines it for complex ones."""
    if reverse:
        found = linear_scan_gradients(grad[:, ::-1], a[:, ::-1], x[:, ::-1], initial_state)
        return {name: g if name == "initial_state" else g[:, ::-1] for name, g in found.items()}
    first = np.zeros_like(x[:, :1].sum(1)) if initial_state is None else initial_state
    h = linear_scan(a, x, first)
    grads = {"a": np.zeros_like(h), "x": np.zeros_like(h), "initial_state": np.zeros_like(h[:, :1].sum(1))}
    for t in range(x.shape[1]):  # what h_t sends back to the inputs, factors and state before it
        through = grad[:, t]
        for s in range(t, -1, -1):
            grads["x"][:, s] += through
            grads["a"][:, s] += through * np.conj(first if s == 0 else h[:, s - 1])
            through = through * np.conj(a[:, s])
        grads["initial_state"] += through
    return grads
