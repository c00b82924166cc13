"""What the state-space ops promise besides numbers: opcheck, compile, export, autocast, errors, memory, call counts."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from layerzoo import _native, reference
from layerzoo.ops import causal_conv1d, causal_conv1d_update, selective_scan, selective_state_update
from layerzoo.reference.ssm import CHUNK

from .inputs import conv_arguments, leaves, scan_arguments
from .oracle import assert_close

SCAN = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state", "seq_idx", "reverse")
CONV = ("x", "weight", "bias", "seq_idx", "initial_states", "silu", "reverse")


def scan_positions(arguments: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(arguments.get(name) for name in SCAN)


def conv_positions(arguments: dict[str, Any]) -> tuple[Any, ...]:
    arguments = {"reverse": False} | arguments | {"silu": arguments["activation"] is not None}
    return tuple(arguments.get(name) for name in CONV)


def op_calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Arguments of every op in torch.ops.layerzoo, with and without what is optional, in several layouts."""
    grouped = scan_arguments(2, 6, 5, 3, B="grouped", C="constant", groups=2, layouts=("channel-last", "chunk"))
    short = scan_arguments(
        2, 6, 5, 3, leave_out=("D", "z", "delta_bias", "initial_state", "seq_idx"), dtype=torch.bfloat16
    )
    empty = scan_arguments(2, 6, 0, 3, layouts=("channel-last",))
    conv = conv_arguments(2, 6, 5, 4, layouts=("chunk", "gaps"))
    bare = conv_arguments(2, 6, 5, 3, leave_out=("bias", "seq_idx", "initial_states"), activation=None, reverse=True)

    def scan_backward(arguments: dict[str, Any], grad_last: Tensor | None) -> tuple[Any, ...]:
        inputs = scan_positions(arguments)
        states = torch.ops.layerzoo.selective_scan(*inputs, CHUNK)[2]
        return (torch.randn_like(arguments["u"]), grad_last, *inputs, states)

    update = scan_arguments(2, 6, 1, 3)
    step = (update["initial_state"], update["u"][..., 0], update["delta"][..., 0], update["A"], update["B"][..., 0])
    step += (update["C"][..., 0], update["D"], update["z"][..., 0], update["delta_bias"], True)
    conv_step = (conv["x"], conv["initial_states"].clone(), conv["weight"], conv["bias"], True)
    trained = [dict(arguments) for arguments in (grouped, short, conv)]
    for arguments in trained:
        for name, x in arguments.items():
            if isinstance(x, Tensor) and x.is_floating_point():
                arguments[name] = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    return {
        "scan": ("selective_scan", (*scan_positions(trained[0]), CHUNK)),
        "scan_short": ("selective_scan", (*scan_positions(trained[1]), CHUNK)),
        "scan_inference": ("selective_scan", (*scan_positions(grouped), 0)),
        "scan_empty": ("selective_scan", (*scan_positions(empty), CHUNK)),
        "scan_backward_empty": ("selective_scan_backward", scan_backward(empty, torch.ones(2, 1, 3).expand(2, 6, 3))),
        "scan_backward": ("selective_scan_backward", scan_backward(grouped, torch.randn(2, 6, 3))),
        "scan_backward_short": ("selective_scan_backward", scan_backward(short, None)),
        "conv": ("causal_conv1d", conv_positions(trained[2])),
        "conv_bare": ("causal_conv1d", conv_positions(bare)),
        "conv_backward": (
            "causal_conv1d_backward",
            (torch.randn(2, 6, 5), torch.randn(2, 6, 3), *conv_positions(conv)),
        ),
        "conv_backward_bare": ("causal_conv1d_backward", (torch.randn(2, 6, 5), None, *conv_positions(bare))),
        "state_update": ("selective_state_update", step),
        "conv_update": ("causal_conv1d_update", conv_step),
    }


@pytest.mark.parametrize("case", list(op_calls()))
def test_opcheck(case: str) -> None:
    name, arguments = op_calls()[case]
    torch.library.opcheck(getattr(torch.ops.layerzoo, name).default, arguments)


# ---- compile, export ----


def both(u: Tensor, arguments: dict[str, Any], conv: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    x, final = causal_conv1d(u, **conv, return_final_states=True)
    out, last = selective_scan(x, **arguments, return_last_state=True)
    return out, last, final


def both_arguments(batch: int, length: int, channels: int = 6) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    arguments = scan_arguments(
        batch, channels, length, 3, leave_out=("seq_idx",), layouts=("time-last", "channel-last")
    )
    conv = conv_arguments(batch, channels, length, 4, leave_out=("x", "seq_idx", "initial_states"))
    return arguments.pop("u"), arguments, conv


def results(function: Callable[..., Any], u: Tensor, *arguments: dict[str, Any]) -> list[Tensor]:
    inputs = [u.requires_grad_(), *(x for group in arguments for x in leaves(group).values())]
    outputs = function(u, *arguments)
    return [*outputs, *torch.autograd.grad([x.sum() for x in outputs], inputs)]


@pytest.mark.slow
def test_compile_without_graph_breaks_and_with_two_graphs_for_all_sizes() -> None:
    # Sequences of one chunk would get a third: the number of saved states is a size, and torch tells 1 from more.
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, fullgraph=True, backend=counter)
    for batch, length in ((2, CHUNK + 1), (3, 97), (5, 200), (4, 129)):
        want = results(both, *both_arguments(batch, length))
        got = results(compiled, *both_arguments(batch, length))
        for one, two in zip(got, want, strict=True):
            assert torch.equal(one, two)
            assert one.stride() == two.stride()
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_compile_of_ops_that_work_in_place() -> None:
    torch._dynamo.reset()
    _, arguments = op_calls()["state_update"]
    _, conv = op_calls()["conv_update"]

    def step(state: Tensor, conv_state: Tensor) -> tuple[Tensor, Tensor]:
        x = causal_conv1d_update(conv[0], conv_state, *conv[2:4], activation="silu")
        return selective_state_update(state, x[..., 0], *arguments[2:]), x

    states, compiled_states = ([x.clone() for x in (arguments[0], conv[1])] for _ in range(2))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for one, two in zip(compiled(*compiled_states), step(*states), strict=True):
            assert torch.equal(one, two)
    for one, two in zip(compiled_states, states, strict=True):
        assert torch.equal(one, two)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    torch._dynamo.reset()
    want = results(both, *both_arguments(2, 37))
    got = results(torch.compile(both, fullgraph=True), *both_arguments(2, 37))
    for one, two in zip(got, want, strict=True):
        assert_close("inductor", one, two, 1e-6)


@pytest.mark.slow
def test_export_with_a_dynamic_length() -> None:
    class Both(nn.Module):
        def __init__(self, arguments: dict[str, Any], conv: dict[str, Any]) -> None:
            super().__init__()
            self.arguments = {name: arguments[name] for name in ("A", "D", "delta_softplus")}
            self.conv = conv

        def forward(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> Any:
            return both(u, self.arguments | {"delta": delta, "B": B, "C": C}, self.conv)

    def inputs(length: int) -> tuple[Tensor, ...]:
        u, arguments, _ = both_arguments(2, length)
        return (u, *(arguments[name] for name in ("delta", "B", "C")))

    module = Both(*both_arguments(2, 37)[1:])
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(module, inputs(37), dynamic_shapes=({2: length},) * 4)
    for size in (37, 70):
        for one, two in zip(program.module()(*inputs(size)), module(*inputs(size)), strict=True):
            assert torch.equal(one, two)


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_autocast_casts_sequences_and_leaves_parameters_and_states(dtype: torch.dtype, compiled: bool) -> None:
    torch._dynamo.reset()

    def run(scan: dict[str, Any], conv: dict[str, Any]) -> tuple[Tensor, ...]:
        return (
            *selective_scan(**scan, return_last_state=True),
            *causal_conv1d(**conv, return_final_states=True),
        )

    function = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    scan, conv = scan_arguments(2, 6, 37, 3), conv_arguments(2, 6, 37, 4)
    by_hand = scan | {name: scan[name].to(dtype) for name in ("u", "B", "C", "z")}
    want = run(by_hand, conv | {"x": conv["x"].to(dtype)})
    inputs = [*leaves(scan).values(), *leaves(conv).values()]
    with torch.autocast("cpu", dtype):
        got = function(scan, conv)
    assert [x.dtype for x in got] == [dtype, torch.float32, dtype, dtype]
    for one, two in zip(got, want, strict=True):
        assert torch.equal(one, two)
    for x, grad in zip(inputs, torch.autograd.grad([x.float().sum() for x in got], inputs), strict=True):
        assert grad.dtype == x.dtype


def test_autocast_leaves_float64_alone() -> None:
    scan = scan_arguments(2, 6, 37, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        out = selective_scan(**scan)
    assert torch.equal(out, selective_scan(**scan))


# ---- bad input: what changes, the error, words of its message ----

meta = {"device": "meta"}
Bad = tuple[dict[str, Any], type[Exception], tuple[str, ...]]
BAD_SCAN: list[Bad] = [
    ({"u": [1.0]}, TypeError, ("u must be a tensor", "got list")),
    ({"u": torch.ones(4, 6)}, ValueError, ("u must have shape (batch, channels, length)", "(4, 6)")),
    ({"u": torch.ones(2, 4, 6).long()}, TypeError, ("u must have dtype float32", "got int64")),
    ({"u": torch.ones(2, 4, 6).cfloat()}, TypeError, ("u must have dtype", "got complex64")),
    ({"u": torch.ones(2, 0, 6)}, ValueError, ("u must have at least one channel", "got 0")),
    ({"delta": torch.ones(2, 4, 7)}, ValueError, ("delta", "(batch, channels, length) = (2, 4, 6)", "got (2, 4, 7)")),
    ({"delta": torch.ones(2, 6)}, ValueError, ("delta", "(2, 4, 6)", "got (2, 6)")),
    ({"delta": None}, TypeError, ("delta must be a tensor", "got NoneType")),
    ({"delta": torch.ones(2, 4, 6).int()}, TypeError, ("delta", "got int32")),
    ({"delta": torch.ones(2, 4, 6, **meta)}, ValueError, ("delta must be on cpu", "got meta")),
    ({"A": torch.ones(4)}, ValueError, ("A must have shape (channels, state)", "got (4,)")),
    ({"A": torch.ones(5, 3)}, ValueError, ("A", "(channels, state) = (4, 3)", "got (5, 3)")),
    ({"A": torch.ones(4, 0)}, ValueError, ("A must have at least one state", "got 0")),
    ({"A": torch.ones(4, 3).cfloat()}, TypeError, ("A must have dtype float32", "got complex64")),
    ({"A": torch.ones(4, 3, **meta)}, ValueError, ("A must be on cpu", "got meta")),
    (
        {"B": torch.ones(3)},
        ValueError,
        ("B must have shape (channels, state) or (batch, state, length) or", "got (3,)"),
    ),
    ({"B": torch.ones(3, 4)}, ValueError, ("B", "(channels, state) = (4, 3)", "got (3, 4)")),
    ({"B": torch.ones(2, 6, 3)}, ValueError, ("B", "(batch, state, length) = (2, 3, 6)", "got (2, 6, 3)")),
    ({"B": torch.ones(2, 1, 6, 3)}, ValueError, ("B", "(batch, groups, state, length) = (2, 1, 3, 6)", "(2, 1, 6, 3)")),
    ({"B": torch.ones(2, 3, 3, 6)}, ValueError, ("B has 3 groups", "divide the 4 channels")),
    ({"B": torch.ones(2, 0, 3, 6)}, ValueError, ("B has 0 groups", "divide the 4 channels")),
    ({"B": torch.ones(2, 8, 3, 6)}, ValueError, ("B has 8 groups", "divide the 4 channels")),
    ({"B": torch.ones(2, 1, 2, 3, 6)}, ValueError, ("B must have shape", "got (2, 1, 2, 3, 6)")),
    ({"B": torch.ones(2, 3, 6, **meta)}, ValueError, ("B must be on cpu", "got meta")),
    ({"B": torch.ones(2, 3, 6).bool()}, TypeError, ("B must have dtype", "got bool")),
    ({"C": torch.ones(2, 3, 5)}, ValueError, ("C", "(2, 3, 6)", "got (2, 3, 5)")),
    ({"C": torch.ones(2, 2, 3, 6)}, ValueError, ("B and C must have equal numbers of groups", "(2, 2, 3, 6)")),
    ({"C": torch.ones(2, 3, 6).cfloat()}, TypeError, ("C must have dtype", "got complex64")),
    ({"D": torch.ones(5)}, ValueError, ("D", "(channels,) = (4,)", "got (5,)")),
    ({"D": 1.0}, TypeError, ("D must be a tensor", "got float")),
    ({"D": torch.ones(4, **meta)}, ValueError, ("D must be on cpu", "got meta")),
    ({"z": torch.ones(2, 4, 1)}, ValueError, ("z", "(2, 4, 6)", "got (2, 4, 1)")),
    ({"delta_bias": torch.ones(1, 4)}, ValueError, ("delta_bias", "(4,)", "got (1, 4)")),
    ({"initial_state": torch.ones(2, 3, 4)}, ValueError, ("initial_state", "(2, 4, 3)", "got (2, 3, 4)")),
    ({"seq_idx": torch.zeros(6).int()}, ValueError, ("seq_idx", "(batch, length) = (2, 6)", "got (6,)")),
    ({"seq_idx": torch.zeros(2, 6)}, TypeError, ("seq_idx must have dtype int32, int64", "got float32")),
    ({"seq_idx": torch.zeros(2, 6).bool()}, TypeError, ("seq_idx must have dtype int32, int64", "got bool")),
]
BAD_CONV: list[Bad] = [
    ({"x": 3}, TypeError, ("x must be a tensor", "got int")),
    ({"x": torch.ones(4, 6)}, ValueError, ("x must have shape (batch, channels, length)", "(4, 6)")),
    ({"x": torch.ones(2, 4, 6).int()}, TypeError, ("x must have dtype", "got int32")),
    ({"x": torch.ones(2, 0, 6)}, ValueError, ("x must have at least one channel",)),
    ({"weight": torch.ones(4, 1, 3)}, ValueError, ("weight must have shape (channels, width)", "got (4, 1, 3)")),
    ({"weight": torch.ones(3, 3)}, ValueError, ("weight", "(channels, width) = (4, 3)", "got (3, 3)")),
    ({"weight": torch.ones(4, 0)}, ValueError, ("weight must have at least one tap", "got 0")),
    ({"weight": torch.ones(4, 3, **meta)}, ValueError, ("weight must be on cpu", "got meta")),
    ({"bias": torch.ones(3)}, ValueError, ("bias", "(4,)", "got (3,)")),
    ({"bias": torch.ones(4).cfloat()}, TypeError, ("bias must have dtype", "got complex64")),
    ({"seq_idx": torch.zeros(2, 5).int()}, ValueError, ("seq_idx", "(2, 6)", "got (2, 5)")),
    ({"seq_idx": torch.zeros(2, 6)}, TypeError, ("seq_idx must have dtype int32, int64", "got float32")),
    ({"initial_states": torch.ones(2, 4, 3)}, ValueError, ("initial_states", "width - 1) = (2, 4, 2)", "(2, 4, 3)")),
    ({"activation": "relu"}, ValueError, ("activation must be None, 'silu' or 'swish'", "got 'relu'")),
]
BAD_STEP: list[Bad] = [
    ({"x": torch.ones(4)}, ValueError, ("x must have shape (batch, channels) or (batch, heads, channels)", "(4,)")),
    ({"x": torch.ones(2, 4).long()}, TypeError, ("x must have dtype", "got int64")),
    ({"state": torch.ones(2, 3, 4)}, ValueError, ("state", "(batch, channels, state) = (2, 4, 3)", "got (2, 3, 4)")),
    ({"state": torch.ones(2, 4, 3, **meta)}, ValueError, ("state must be on cpu", "got meta")),
    ({"state": None}, TypeError, ("state must be a tensor", "got NoneType")),
    ({"dt": torch.ones(2, 5)}, ValueError, ("dt", "(2, 4)", "got (2, 5)")),
    ({"A": torch.ones(4, 3, 1)}, ValueError, ("A must have shape (channels, state)", "got (4, 3, 1)")),
    ({"A": torch.ones(4, 0)}, ValueError, ("A must have at least one state",)),
    ({"B": torch.ones(2, 4)}, ValueError, ("B", "(batch, state) = (2, 3)", "got (2, 4)")),
    ({"C": torch.ones(3)}, ValueError, ("C", "(2, 3)", "got (3,)")),
    ({"D": torch.ones(4, 3)}, ValueError, ("D", "(4,)", "got (4, 3)")),
    ({"z": torch.ones(4, 2)}, ValueError, ("z", "(2, 4)", "got (4, 2)")),
    ({"dt_bias": torch.ones(4).int()}, TypeError, ("dt_bias must have dtype", "got int32")),
]
BAD_CONV_STEP: list[Bad] = [
    ({"x": torch.ones(4)}, ValueError, ("x must have shape (batch, channels) or (batch, channels, length)", "(4,)")),
    ({"x": torch.ones(2, 5)}, ValueError, ("weight", "(5, 3)", "got (4, 3)")),
    ({"conv_state": torch.ones(2, 4)}, ValueError, ("conv_state must have shape (batch, channels, kept)", "(2, 4)")),
    ({"conv_state": torch.ones(1, 4, 3)}, ValueError, ("conv_state", "(2, 4, 3)", "got (1, 4, 3)")),
    ({"conv_state": torch.ones(2, 4, 1)}, ValueError, ("conv_state must keep at least width - 1 = 2", "got 1")),
    ({"conv_state": torch.ones(2, 4, 3).int()}, TypeError, ("conv_state must have dtype", "got int32")),
    ({"weight": torch.ones(4)}, ValueError, ("weight must have shape (channels, width)", "got (4,)")),
    ({"bias": torch.ones(4, **meta)}, ValueError, ("bias must be on cpu", "got meta")),
    ({"activation": True}, ValueError, ("activation must be", "got True")),
]


def good(op: Callable[..., Any]) -> dict[str, Any]:
    if op is selective_scan:
        return scan_arguments(2, 4, 6, 3, B="grouped", C="grouped")
    if op is causal_conv1d:
        return conv_arguments(2, 4, 6, 3)
    if op is causal_conv1d_update:
        return {"x": torch.ones(2, 4), "conv_state": torch.ones(2, 4, 3), "weight": torch.ones(4, 3)}
    return {name: torch.ones(2, 4) for name in ("x", "dt", "z")} | {
        "state": torch.ones(2, 4, 3),
        "A": torch.ones(4, 3),
        "B": torch.ones(2, 3),
        "C": torch.ones(2, 3),
    }


BAD = [
    pytest.param(op, row, id=f"{op.__name__}-{i}-{next(iter(row[0]))}")
    for op, rows in (
        (selective_scan, BAD_SCAN),
        (causal_conv1d, BAD_CONV),
        (selective_state_update, BAD_STEP),
        (causal_conv1d_update, BAD_CONV_STEP),
    )
    for i, row in enumerate(rows)
]


@pytest.mark.parametrize(("op", "row"), BAD)
def test_bad_input(op: Callable[..., Any], row: Bad) -> None:
    change, error, words = row
    arguments = good(op)
    op(**arguments)
    state = next((arguments[name] for name in ("state", "conv_state") if name in arguments), torch.ones(1))
    before = state.clone()
    with pytest.raises(error) as caught:
        op(**arguments | change)
    message = str(caught.value)
    assert message.startswith(f"{op.__name__}: ")
    assert all(word in message for word in words), message
    assert torch.equal(state, before)


@pytest.mark.native
@pytest.mark.parametrize("case", ["scan", "scan_backward", "conv", "conv_backward"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32], ids=str)
def test_kernels_refuse_marks_of_another_type(case: str, dtype: torch.dtype) -> None:
    """Whoever calls torch.ops.layerzoo past the checks in Python must not get bytes read as what they are not."""
    name, arguments = op_calls()[case]
    (i,) = (i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.dtype == torch.int32)
    with pytest.raises(RuntimeError, match=r"seq_idx must .*int32"):
        getattr(torch.ops.layerzoo, name)(*arguments[:i], arguments[i].to(dtype), *arguments[i + 1 :])


# ---- values, seen by the kernel and by the reference ----


@pytest.mark.parametrize("marks", [[0, 1, 0, 1], [2, -1, 1, 3], [5, 5, -3, 4], [-1, 1, -1, 0]], ids=str)
@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_marks_that_go_back(marks: list[int], row: int, dtype: torch.dtype) -> None:
    seq_idx = torch.zeros(2, 4, dtype=dtype)
    seq_idx[row] = torch.tensor(marks)
    back = next(t for t in range(4) if 0 <= marks[t] < max(marks[:t], default=-1))
    words = rf"seq_idx must not decrease .* seq_idx\[{row}, {back}\] = {marks[back]} follows {max(marks[:back])}"
    scan, conv = scan_arguments(2, 6, 4, 3), conv_arguments(2, 6, 4, 3)
    scan["seq_idx"] = conv["seq_idx"] = seq_idx
    for call in (lambda: selective_scan(**scan), lambda: reference.ssm.selective_scan(*scan_positions(scan))):
        with pytest.raises(RuntimeError, match=f"selective_scan: {words}"):
            call()
    for call in (lambda: causal_conv1d(**conv), lambda: reference.ssm.causal_conv1d(*conv_positions(conv))):
        with pytest.raises(RuntimeError, match=f"causal_conv1d: {words}"):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nan_in_A(dtype: torch.dtype) -> None:
    scan = scan_arguments(2, 6, 4, 3, dtype=dtype)
    scan["A"][5, 2] = torch.nan
    for call in (lambda: selective_scan(**scan), lambda: reference.ssm.selective_scan(*scan_positions(scan))):
        with pytest.raises(RuntimeError, match="selective_scan: A must not contain NaN"):
            call()


# ---- costs and threads ----


def test_calls_from_several_python_threads() -> None:
    inputs = [both_arguments(2, 97, channels=40 + 8 * i) for i in range(4)]
    want = [results(both, *x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(lambda x: results(both, *x), inputs * 5)):
            for one, two in zip(got, want[i % 4], strict=True):
                assert_close(f"call {i}", one, two, 1e-6)


@pytest.mark.native
def test_the_call_counters_rise() -> None:
    names = ("selective_scan", "selective_scan_backward", "causal_conv1d", "causal_conv1d_backward")
    names += ("selective_state_update", "causal_conv1d_update")
    before = [_native.calls(name) for name in names]
    scan, conv = scan_arguments(2, 6, 4, 3), conv_arguments(2, 6, 4, 3)
    (*leaves(scan).values(), *leaves(conv).values())
    selective_scan(**scan).sum().backward()
    causal_conv1d(**conv).sum().backward()
    selective_state_update(**good(selective_state_update))
    causal_conv1d_update(**good(causal_conv1d_update))
    assert [_native.calls(name) for name in names] == [count + 1 for count in before]
    assert _native.calls("no such op") == 0


MEMORY = """
import sys
import torch
from layerzoo.ops import selective_scan


def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))


def inputs(length):
    tensors = [torch.randn(1, 512, length), torch.rand(1, 512, length), -torch.rand(512, 16)]
    tensors += [torch.randn(1, 16, length), torch.randn(1, 16, length)]
    tensors += [torch.randn(512), torch.randn(1, 512, length), torch.randn(512)]
    return [x.requires_grad_() for x in tensors]


def run(tensors):
    out, last = selective_scan(*tensors, delta_softplus=True, return_last_state=True)
    torch.autograd.grad([out, last], tensors, [torch.ones(()).expand_as(out), torch.ones_like(last)])


run(inputs(8))
tensors = inputs(2048)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts anew
before = status("VmRSS:")
run(tensors)
print((status("VmHWM:") - before) / sum(x.numel() * 4 for x in tensors))
"""


@pytest.mark.slow
@pytest.mark.native
def test_forward_and_backward_need_at_most_three_times_their_inputs(python: Any) -> None:
    done = python("-c", MEMORY)
    if "clear_refs" in done.stderr:
        pytest.skip("the high-water mark of memory cannot be reset here")
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) <= 3
