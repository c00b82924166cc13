"""What the ops of experts promise besides numbers: opcheck, compile, export, autocast, errors, memory, call counts."""

import math
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from ssm.inputs import leaves
from ssm.oracle import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from layerzoo import _native, reference
from layerzoo.ops import moe_experts, moe_experts_ragged

from .inputs import expert_arguments

ORDER = ("x", "ids", "weights", "offsets", "w13", "w2", "b13", "b2")


def positions(arguments: dict[str, Any], first: int = -1) -> tuple[Any, ...]:
    """Arguments of the op in torch.ops.layerzoo, but whether it keeps its hidden layer."""
    arguments = arguments | {"ids": arguments.get("ids", arguments.get("tokens"))}
    alpha, limit = arguments.get("alpha"), arguments.get("limit")
    return (
        *(arguments.get(name) for name in ORDER),
        reference.moe.ACTIVATIONS.index(arguments.get("activation", "silu")),
        arguments.get("gated", True),
        arguments["transposed"],
        arguments["interleaved"],
        1.0 if alpha is None else alpha,
        0.0 if alpha is None else 1.0,
        math.inf if limit is None else limit,
        first,
    )


def op_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Arguments of both ops, with and without what is optional, in several layouts."""
    full = expert_arguments(5, 6, 4, 3, 2, layouts=("rows", "channel-last"))
    bare = expert_arguments(5, 6, 4, 3, 2, biases=False, dtype=torch.bfloat16, scores=torch.float32)
    oss = expert_arguments(5, 6, 4, 3, 2, gate="gpt-oss", transposed=True, interleaved=True, parameters=torch.float16)
    ragged = expert_arguments(5, 6, 4, 3, 2, gate="relu2 alone", ragged=True, ids=torch.int32)
    empty = expert_arguments(0, 6, 4, 3, 2)

    def backward(arguments: dict[str, Any], needed: int, first: int = -1) -> tuple[Any, ...]:
        inputs = positions(arguments, first)
        hidden = torch.ops.layerzoo.moe_experts(*inputs, True)[1]
        return (torch.randn_like(arguments["x"]), *inputs, hidden, needed)

    def trained(arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            name: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
            for name, x in arguments.items()
        }

    calls = {"full": full, "bare": bare, "oss": oss, "ragged": ragged, "empty": empty}
    return {
        **{name: ("moe_experts", (*positions(trained(arguments)), True)) for name, arguments in calls.items()},
        "inference": ("moe_experts", (*positions(full), False)),
        "range": ("moe_experts", (*positions(full, 0), True)),
        **{
            f"{name} backward": ("moe_experts_backward", backward(arguments, 63 if "b13" in arguments else 15))
            for name, arguments in calls.items()
        },
        "backward of x": ("moe_experts_backward", backward(full, 1)),
        "backward of the weights": ("moe_experts_backward", backward(full, 2)),
    }


@pytest.mark.parametrize("case", list(op_calls()))
def test_opcheck(case: str) -> None:
    name, arguments = op_calls()[case]
    torch.library.opcheck(getattr(torch.ops.layerzoo, name).default, arguments)


# ---- compile, export ----


def with_gradients(function: Callable[..., Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    inputs = leaves(arguments)
    out = function(**arguments)
    return [out, *torch.autograd.grad(out.float().square().sum(), list(inputs.values()))]


@pytest.mark.slow
@pytest.mark.parametrize("ragged", [False, True])
def test_compile_without_graph_breaks_and_with_two_graphs_for_all_sizes(ragged: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    op = moe_experts_ragged if ragged else moe_experts
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    for tokens in (5, 9, 40, 13):
        arguments = expert_arguments(tokens, 8, 6, 4, 2, gate="gpt-oss", ragged=ragged, transposed=True)
        want = with_gradients(op, arguments)
        got = with_gradients(compiled, arguments)
        for one, two in zip(got, want, strict=True):
            assert torch.equal(one, two)
            assert one.stride() == two.stride()
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    torch._dynamo.reset()
    arguments = expert_arguments(7, 8, 6, 4, 2)
    want = with_gradients(moe_experts, arguments)
    got = with_gradients(torch.compile(moe_experts, fullgraph=True), arguments)
    for one, two in zip(got, want, strict=True):
        assert_close("inductor", one, two, 1e-6)


@pytest.mark.slow
def test_export_with_a_dynamic_number_of_tokens() -> None:
    class Experts(nn.Module):
        def __init__(self, arguments: dict[str, Any]) -> None:
            super().__init__()
            self.w13, self.w2 = nn.Parameter(arguments["w13"]), nn.Parameter(arguments["w2"])

        def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return moe_experts(x, ids, weights, self.w13, self.w2)

    def inputs(tokens: int) -> tuple[Tensor, ...]:
        arguments = expert_arguments(tokens, 8, 6, 4, 2)
        return tuple(arguments[name] for name in ("x", "ids", "weights"))

    module = Experts(expert_arguments(1, 8, 6, 4, 2))
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(module, inputs(5), dynamic_shapes=({0: tokens},) * 3)
    for count in (5, 70):
        assert torch.equal(program.module()(*inputs(count)), module(*inputs(count)))


# ---- autocast ----


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast_leaves_every_type_alone(dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()
    arguments = expert_arguments(7, 8, 6, 4, 2, dtype=dtype)
    want = with_gradients(moe_experts, arguments)
    function = torch.compile(moe_experts, fullgraph=True, backend="aot_eager") if compiled else moe_experts
    with torch.autocast("cpu", torch.bfloat16):
        got = with_gradients(function, arguments)
    for one, two in zip(got, want, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)


# ---- bad input: what changes, the error, words of its message ----

meta = {"device": "meta"}
T, K, H, I, E = 5, 2, 6, 4, 3  # noqa: E741
Bad = tuple[dict[str, Any], type[Exception], tuple[str, ...]]
# Of both ops.
BAD: list[Bad] = [
    ({"x": [1.0]}, TypeError, ("x must be a tensor", "got list")),
    ({"x": torch.ones(H)}, ValueError, ("x must have shape (tokens, H)", "got (6,)")),
    ({"x": torch.ones(T, H).long()}, TypeError, ("x must have dtype float32", "got int64")),
    ({"x": torch.ones(T, H).cfloat()}, TypeError, ("x must have dtype", "got complex64")),
    ({"x": torch.ones(T, H).double()}, TypeError, ("w13 must have dtype float64, got float32",)),
    ({"x": torch.ones(T, H + 1)}, ValueError, ("w13", "(E, 2 I, H) = (3, 8, 7)", "got (3, 8, 6)")),
    ({"w13": None}, TypeError, ("w13 must be a tensor", "got NoneType")),
    ({"w13": torch.ones(2 * I, H)}, ValueError, ("w13 must have shape (E, 2 I, H)", "got (8, 6)")),
    ({"w13": torch.ones(E, I, H)}, ValueError, ("w13", "(E, 2 I, H) = (3, 8, 6)", "got (3, 4, 6)")),
    ({"w13": torch.ones(E, 2 * I, H).int()}, TypeError, ("w13 must have dtype", "got int32")),
    ({"w13": torch.ones(E, 2 * I, H).double()}, TypeError, ("w13 must have dtype", "got float64")),
    ({"w13": torch.ones(E, 2 * I, H, **meta)}, ValueError, ("w13 must be on cpu", "got meta")),
    ({"w2": torch.ones(H, I)}, ValueError, ("w2 must have shape (E, H, I)", "got (6, 4)")),
    ({"w2": torch.ones(E, I, H)}, ValueError, ("w13", "(3, 12, 6)", "got (3, 8, 6)")),
    ({"w2": torch.ones(E + 1, H, I)}, ValueError, ("w2", "(E, H, I) = (3, 6, 4)", "got (4, 6, 4)")),
    ({"w2": torch.ones(E, H, I).double()}, TypeError, ("w2 must have dtype", "got float64")),
    ({"w2": torch.ones(E, H, I, **meta)}, ValueError, ("w2 must be on cpu", "got meta")),
    ({"b13": torch.ones(E, I)}, ValueError, ("b13", "(E, 2 I) = (3, 8)", "got (3, 4)")),
    ({"b13": torch.ones(E, 2 * I).int()}, TypeError, ("b13 must have dtype", "got int32")),
    ({"b2": torch.ones(H)}, ValueError, ("b2", "(E, H) = (3, 6)", "got (6,)")),
    ({"b2": torch.ones(E, H, **meta)}, ValueError, ("b2 must be on cpu", "got meta")),
    ({"gated": False}, ValueError, ("w13", "(E, I, H) = (3, 4, 6)", "got (3, 8, 6)")),
    ({"transposed": True}, ValueError, ("w13", "(E, H, 2 I)", "got (3, 8, 6)")),
    ({"activation": "swish"}, ValueError, ("activation must be one of silu, gelu,", "got 'swish'")),
    ({"alpha": 1.702, "activation": "gelu"}, ValueError, ("alpha must be None unless", "got 1.702 with 'gelu'")),
    ({"limit": 0.0}, ValueError, ("limit must be positive or None", "got 0.0")),
    ({"limit": math.nan}, ValueError, ("limit must be positive or None", "got nan")),
    *(
        (
            {"gated": False, "w13": torch.ones(E, I, H), "b13": None, **option},
            ValueError,
            ("interleaved, alpha and limit are for gated experts", "got gated=False"),
        )
        for option in ({"interleaved": True}, {"alpha": 1.0}, {"limit": 7.0})
    ),
]
BAD_IDS: list[Bad] = [
    ({"ids": [0]}, TypeError, ("ids must be a tensor", "got list")),
    ({"ids": torch.zeros(T).long()}, ValueError, ("ids must have shape (tokens, k)", "got (5,)")),
    ({"ids": torch.zeros(T + 1, K).long()}, ValueError, ("ids", "(tokens, k) = (5, 2)", "got (6, 2)")),
    ({"ids": torch.zeros(T, K)}, TypeError, ("ids must have dtype int32, int64", "got float32")),
    ({"ids": torch.zeros(T, K, **meta).long()}, ValueError, ("ids must be on cpu", "got meta")),
    ({"weights": None}, TypeError, ("weights must be a tensor", "got NoneType")),
    ({"weights": torch.ones(T, K + 1)}, ValueError, ("weights", "like ids = (5, 2)", "got (5, 3)")),
    ({"weights": torch.ones(T, K).int()}, TypeError, ("weights must have dtype", "got int32")),
    ({"weights": torch.ones(T, K, **meta)}, ValueError, ("weights must be on cpu", "got meta")),
    ({"expert_range": (0, 2)}, ValueError, ("expert_range must be (begin, end)", "end - begin = 3", "got (0, 2)")),
    ({"expert_range": (-1, 2)}, ValueError, ("expert_range must be (begin, end)", "got (-1, 2)")),
    ({"expert_range": (3, 0)}, ValueError, ("expert_range must be (begin, end)", "got (3, 0)")),
    ({"expert_range": (0,)}, ValueError, ("expert_range must be (begin, end)", "got (0,)")),
    ({"expert_range": 3}, TypeError, ("expert_range must be (begin, end)", "got 3")),
    ({"ids": torch.tensor([[0, 1]] * 4 + [[4, 0]])}, RuntimeError, ("ids must be in [0, 3]", "got 4 for token 4")),
    ({"ids": torch.tensor([[0, -1]] * T)}, RuntimeError, ("ids must be in [0, 3]", "got -1 for token 0")),
    ({"ids": torch.full((T, K), -1), "expert_range": (3, 6)}, RuntimeError, ("ids must be", "got -1 for token 0")),
]
BAD_TOKENS: list[Bad] = [
    ({"tokens": 3}, TypeError, ("tokens must be a tensor", "got int")),
    ({"tokens": torch.zeros(T, K).long()}, ValueError, ("tokens must have shape (pairs,)", "got (5, 2)")),
    ({"tokens": torch.zeros(T * K)}, TypeError, ("tokens must have dtype int32, int64", "got float32")),
    ({"tokens": torch.zeros(T * K, **meta).long()}, ValueError, ("tokens must be on cpu", "got meta")),
    ({"weights": torch.ones(T, K)}, ValueError, ("weights", "(pairs,) like tokens = (10,)", "got (5, 2)")),
    ({"weights": torch.ones(T * K).int()}, TypeError, ("weights must have dtype", "got int32")),
    ({"offsets": torch.zeros(E).long()}, ValueError, ("offsets", "(E + 1,) = (4,)", "got (3,)")),
    ({"offsets": torch.zeros(E + 1)}, TypeError, ("offsets must have dtype int32, int64", "got float32")),
    ({"offsets": torch.zeros(E + 1, **meta).long()}, ValueError, ("offsets must be on cpu", "got meta")),
    ({"offsets": torch.tensor([0, 1, 2, 9])}, RuntimeError, ("offsets must go from 0 to 10", "got 0 to 9")),
    ({"offsets": torch.tensor([1, 1, 2, 10])}, RuntimeError, ("offsets must go from 0 to 10", "got 1 to 10")),
    ({"offsets": torch.tensor([0, 4, 3, 10])}, RuntimeError, ("offsets must not descend", "4, 3")),
    ({"offsets": torch.tensor([0, 1 << 40, 3, 10])}, RuntimeError, ("offsets must not descend",)),
    ({"tokens": torch.full((T * K,), T)}, RuntimeError, ("tokens must be in [0, 5)", "got 5")),
    ({"tokens": torch.full((T * K,), -1)}, RuntimeError, ("tokens must be in [0, 5)", "got -1")),
]
ROWS = [
    pytest.param(op, row, id=f"{op.__name__}-{i}-{next(iter(row[0]))}")
    for op, rows in ((moe_experts, BAD + BAD_IDS), (moe_experts_ragged, BAD + BAD_TOKENS))
    for i, row in enumerate(rows)
]


@pytest.mark.parametrize(("op", "row"), ROWS)
def test_bad_input(op: Callable[..., Any], row: Bad) -> None:
    change, error, words = row
    arguments = expert_arguments(T, H, I, E, K, ragged=op is moe_experts_ragged)
    op(**arguments)
    with pytest.raises(error) as caught:
        op(**arguments | change)
    message = str(caught.value)
    assert "moe_experts" in message if error is RuntimeError else message.startswith(f"{op.__name__}: ")
    assert all(word in message for word in words), message


def test_without_experts() -> None:
    arguments = expert_arguments(T, H, I, 1, 1, biases=False)
    arguments |= {"w13": torch.ones(0, 2 * I, H), "w2": torch.ones(0, H, I)}
    with pytest.raises(ValueError, match="moe_experts: w13 must have at least one expert, got 0"):
        moe_experts(**arguments)


def test_an_id_outside_of_the_range_is_no_error() -> None:
    arguments = expert_arguments(T, H, I, E, K) | {"expert_range": (7, 10)}
    arguments["ids"] = torch.full((T, K), 1 << 40)
    assert not moe_experts(**arguments).any()


@pytest.mark.native
@pytest.mark.parametrize(("name", "word"), [("w13", "w2"), ("w2", "w2"), ("b13", "b13"), ("b2", "b2"), ("x", "x, ids")])
def test_kernels_refuse_what_does_not_fit(name: str, word: str) -> None:
    """Whoever calls torch.ops.layerzoo past the checks in Python must not get memory read that is not there."""
    arguments = list(positions(expert_arguments(T, H, I, E, K)))
    at = ORDER.index(name)
    torch.ops.layerzoo.moe_experts(*arguments, False)
    arguments[at] = arguments[at][:-1]
    with pytest.raises(RuntimeError, match=word):
        torch.ops.layerzoo.moe_experts(*arguments, False)


# ---- costs and threads ----


def test_calls_from_several_python_threads() -> None:
    inputs = [expert_arguments(40 + 8 * i, 16, 24, 4, 2) for i in range(4)]
    want = [with_gradients(moe_experts, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(lambda x: with_gradients(moe_experts, x), inputs * 5)):
            for one, two in zip(got, want[i % 4], strict=True):
                assert_close(f"call {i}", one, two, 1e-6)


@pytest.mark.native
def test_the_call_counters_rise() -> None:
    names = ("moe_experts", "moe_experts_backward")
    before = [_native.calls(name) for name in names]
    with_gradients(moe_experts, expert_arguments(5, 8, 4, 3, 2))
    with_gradients(moe_experts_ragged, expert_arguments(5, 8, 4, 3, 2, ragged=True))
    moe_experts(**expert_arguments(0, 8, 4, 3, 2))
    assert [_native.calls(name) for name in names] == [before[0] + 3, before[1] + 2]


MEMORY = """
import sys
import torch
from layerzoo.ops import moe_experts


def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


def inputs(experts, inner, transposed):
    x, w13, w2 = torch.randn(64, 512), torch.randn(experts, 2 * inner, 512), torch.randn(experts, 512, inner)
    if transposed:
        w13, w2 = w13.mT, w2.mT
    ids = torch.rand(64, experts).argsort(1)[:, :2]
    return x.requires_grad_(), ids, torch.rand(64, 2), w13.bfloat16(), w2.bfloat16()


def run(train, transposed, tensors):
    for w in tensors[3:]:
        w.requires_grad_(train)
    moe_experts(*tensors, transposed=transposed).sum().backward()


train, transposed = (word == "True" for word in sys.argv[1:])
run(train, transposed, inputs(2, 32, transposed))
tensors = inputs(32, 1024, transposed)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts anew
before = status("VmRSS:")
run(train, transposed, tensors)
print((status("VmHWM:") - before) / sum(w.numel() * 2 for w in tensors[3:]))
"""


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_no_copy_of_the_matrices_is_made(train: bool, transposed: bool, python: Any) -> None:
    """Of 100 MB in bfloat16: their gradients are as large, and besides there is what belongs to the tokens."""
    done = python("-c", MEMORY, str(train), str(transposed))
    if "clear_refs" in done.stderr:
        pytest.skip("the high-water mark of memory cannot be reset here")
    assert done.returncode == 0, done.stderr
    assert train <= float(done.stdout) <= train + 0.25
