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
) -> tuple[Array, Array]:
    """(out (b, d, l), the last w - 1 inputs (b, d, w - 1))."""
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
) -> dict[str, Array]:
    """The gradient of sum(grad_out out) + sum(grad_final final) by argument; bias, initial_states are always there."""
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
