"""The experts of a mixture as numpy loops over pairs of a token and an expert, in float64, independent of the package.

Gradients are adjoints written out by hand; test_moe_experts.py holds them to complex-step derivatives of the forward
loops, so everything here takes complex numbers too.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

# Relative in norm: sums are in float32 or float64, and what is returned is rounded once.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Pair(NamedTuple):
    token: int
    place: tuple[int, ...]  # in the weights
    expert: int


def chosen(ids: Array, experts: int, expert_range: tuple[int, int] | None = None) -> Iterator[Pair]:
    """The pairs that count."""
    first = expert_range[0] if expert_range else 0
    for place, expert in np.ndenumerate(ids):
        if 0 <= expert - first < experts:
            yield Pair(place[0], place, int(expert - first))


def choosing(tokens: Array, offsets: Array) -> Iterator[Pair]:
    """The same where experts choose."""
    for expert, (begin, end) in enumerate(itertools.pairwise(offsets)):
        for i in range(begin, end):
            yield Pair(int(tokens[i]), (i,), expert)


def error_function(x: Array) -> Array:
    """By math.erf, and off the real axis by its series."""
    if not np.iscomplexobj(x):
        return np.vectorize(math.erf, otypes=[float])(x)
    term, total = x, x
    for n in range(1, 80):
        term = -term * x * x / n
        total = total + term / (2 * n + 1)
    return 2 / math.sqrt(math.pi) * total


def activate(name: str, g: Array) -> tuple[Array, Array]:
    """An activation and its derivative."""
    on = g.real > 0
    if name == "relu":
        return g * on, 1.0 * on
    if name == "relu2":
        return g * g * on, 2 * g * on
    if name == "gelu":
        below = (1 + error_function(g / math.sqrt(2))) / 2
        return g * below, below + g * np.exp(-g * g / 2) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        t = np.tanh(c * (g + 0.044715 * g**3))
        return g * (1 + t) / 2, (1 + t) / 2 + g * (1 - t * t) / 2 * c * (1 + 3 * 0.044715 * g * g)
    return swish(g, 1.0)


def swish(g: Array, alpha: float) -> tuple[Array, Array]:
    s = 1 / (1 + np.exp(-alpha * g))
    return g * s, s + alpha * g * s * (1 - s)


class Experts:
    """All experts, with views of their parameters (and, by the same code, of the gradients of these)."""

    def __init__(
        self,
        w13: Array,
        w2: Array,
        b13: Array | None = None,
        b2: Array | None = None,
        *,
        activation: str = "silu",
        gated: bool = True,
        transposed: bool = False,
        interleaved: bool = False,
        alpha: float | None = None,
        limit: float | None = None,
    ) -> None:
        self.w13, self.w2, self.b13, self.b2 = w13, w2, b13, b2
        self.activation, self.gated, self.alpha, self.limit = activation, gated, alpha, limit
        self.transposed, self.interleaved = transposed, interleaved

    def halves(self, rows: Array) -> tuple[Array, Array]:
        """What belongs to the gates and to the ups; without gates all and nothing."""
        if not self.gated:
            return rows, rows[:0]
        return (rows[0::2], rows[1::2]) if self.interleaved else (rows[: len(rows) // 2], rows[len(rows) // 2 :])

    def matrix(self, packed: Array, expert: int) -> Array:
        """(out, in)."""
        return packed[expert].T if self.transposed else packed[expert]

    def hidden(self, x: Array, expert: int) -> tuple[Array, Array]:
        h = self.matrix(self.w13, expert) @ x
        return self.halves(h if self.b13 is None else h + self.b13[expert])

    def gate(self, g: Array, u: Array) -> tuple[Array, Array, Array]:
        """a, and its derivatives by g and u."""
        below, within = np.ones(g.shape), np.ones(u.shape)
        if self.limit is not None:
            below, within = 1.0 * (g.real <= self.limit), 1.0 * (abs(u.real) <= self.limit)
            g = np.where(below, g, self.limit)
            u = np.where(within, u, np.sign(u.real) * self.limit)
        y, slope = activate(self.activation, g) if self.alpha is None else swish(g, self.alpha)
        if not self.gated:
            return y, slope, within
        up = u if self.alpha is None else u + 1
        return y * up, slope * up * below, y * within

    def output(self, a: Array, expert: int) -> Array:
        y = self.matrix(self.w2, expert) @ a
        return y if self.b2 is None else y + self.b2[expert]


def forward(x: Array, weights: Array, pairs: list[Pair], experts: Experts) -> Array:
    parameters = (x, weights, experts.w13, experts.w2, experts.b13, experts.b2)
    out = np.zeros(x.shape, dtype=np.result_type(*(p for p in parameters if p is not None)))
    for token, place, e in pairs:
        a, _, _ = experts.gate(*experts.hidden(x[token], e))
        out[token] += weights[place] * experts.output(a, e)
    return out


def gradients(grad_out: Array, x: Array, weights: Array, pairs: list[Pair], experts: Experts) -> dict[str, Array]:
    """Of x, weights and the parameters that there are."""
    grads = {"x": np.zeros_like(x), "weights": np.zeros_like(weights)}
    for name in ("w13", "w2", "b13", "b2"):
        if (parameter := getattr(experts, name)) is not None:
            grads[name] = np.zeros_like(parameter)
    for token, place, e in pairs:
        a, by_g, by_u = experts.gate(*experts.hidden(x[token], e))
        grads["weights"][place] = grad_out[token] @ experts.output(a, e)
        grad_y = weights[place] * grad_out[token]
        grad_a = experts.matrix(experts.w2, e).T @ grad_y
        grad_h = np.zeros(grads["w13"].shape[2 if experts.transposed else 1])
        gates, ups = experts.halves(grad_h)
        gates[:] = grad_a * by_g
        if experts.gated:
            ups[:] = grad_a * by_u
        grads["x"][token] += experts.matrix(experts.w13, e).T @ grad_h
        experts.matrix(grads["w13"], e)[:] += np.outer(grad_h, x[token])
        experts.matrix(grads["w2"], e)[:] += np.outer(grad_y, a)
        if "b13" in grads:
            grads["b13"][e] += grad_h
        if "b2" in grads:
            grads["b2"][e] += grad_y
    return grads


def taken_apart(arguments: dict[str, Any]) -> tuple[Array, Array, list[Pair], Experts]:
    """Arguments of moe_experts or moe_experts_ragged, as arrays, in the form of `forward` and `gradients`."""
    rest = dict(arguments)
    x, weights = rest.pop("x"), rest.pop("weights")
    if "offsets" in rest:
        pairs = choosing(rest.pop("tokens"), rest.pop("offsets"))
    else:
        pairs = chosen(rest.pop("ids"), len(rest["w13"]), rest.pop("expert_range", None))
    return x, weights, list(pairs), Experts(**rest)
