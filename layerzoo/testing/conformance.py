"""The conformance kit: what every layer of the zoo promises, checked on the CPU from nothing but its card.

A check is a function of a subject that raises when the promise is broken, and returns a reason when it does not apply.
"""

import copy
import inspect
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

from layerzoo.zoo import card, create, layer_class


class ConformanceError(AssertionError):
    """A layer breaks a promise; the message names the layer, the check and what went wrong."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check of one layer: ``status`` is passed, or skipped with a reason."""

    layer: str
    check: str
    status: str
    reason: str
    seconds: float


class _Subject:
    """A layer under test, with what is needed to build it and its inputs again and again, always equal."""

    def __init__(self, name: str, config: Mapping[str, Any] | None, inputs: Mapping[str, Tensor] | None) -> None:
        self.card = card(name)
        self.config = dict(self.card.sample.config if config is None else config)
        self.given = inputs
        if inputs is not None and inputs.keys() != self.card.inputs.keys():
            raise ValueError(f"check_layer: inputs must be {list(self.card.inputs)}, got {list(inputs)}")

    def layer(self, seed: int = 0, **factory: Any) -> nn.Module:
        torch.manual_seed(seed)
        return create(self.card.name, **self.config, **factory).eval()

    def inputs(self, dtype: torch.dtype = torch.float32, odd: Mapping[str, int] | None = None) -> tuple[Tensor, ...]:
        if self.given is not None:
            tensors = (self.given[name] for name in self.card.inputs)
            return tuple(x.detach().clone().to(dtype if x.is_floating_point() else x.dtype) for x in tensors)
        torch.manual_seed(1)
        sizes = self.card.sizes(self.config) | dict(odd or {})
        shapes = [_shape(dims, sizes) for dims in self.card.inputs.values()]
        return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)

    def outputs(self, layer: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        result = layer(*inputs)
        tensors = tuple(result) if isinstance(result, tuple | list) else (result,)
        assert len(tensors) == len(self.card.outputs), (
            f"the card promises the outputs {list(self.card.outputs)}, forward gave {len(tensors)}"
        )
        for name, tensor in zip(self.card.outputs, tensors, strict=True):
            assert isinstance(tensor, Tensor), f"output {name} must be a tensor, got {type(tensor).__name__}"
        return tensors

    def check_shapes(self, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        sizes = self.card.sizes(self.config)
        for (name, dims), tensor in zip(self.card.inputs.items(), inputs, strict=True):
            assert tensor.dim() == len(dims), f"input {name} must have dimensions {dims}, got {tuple(tensor.shape)}"
            free = (pair for pair in zip(dims, tensor.shape, strict=True) if pair[0] not in self.card.config)
            sizes.update(free)
        for (name, dims), tensor in zip(self.card.outputs.items(), outputs, strict=True):
            expected = _shape(dims, sizes)
            assert tuple(tensor.shape) == expected, (
                f"output {name} must have shape {dims} = {expected}, got {tuple(tensor.shape)}"
            )


def _shape(dims: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(dim) if dim.isdecimal() else sizes[dim] for dim in dims)


def _same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal bit for bit."""
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, rtol=0, atol=0)


def signature(s: _Subject) -> str | None:
    """The card's options are the constructor's arguments, with the same defaults; device= and dtype= are taken too."""
    parameters = dict(inspect.signature(layer_class(s.card.name)).parameters)
    for name in ("device", "dtype"):
        assert parameters.pop(name, None) is not None, f"the constructor must take {name}="
    assert parameters.keys() == s.card.config.keys(), (
        f"the card's options are {sorted(s.card.config)}, the constructor's arguments are {sorted(parameters)}"
    )
    for name, parameter in parameters.items():
        option = s.card.config[name]
        default = ... if parameter.default is parameter.empty else parameter.default
        default = list(default) if isinstance(default, tuple) else default
        assert default == option.default, f"{name} defaults to {default!r}, the card says {option.default!r}"
    return None


def shapes(s: _Subject) -> str | None:
    """Outputs have the card's shapes and are finite."""
    inputs = s.inputs()
    outputs = s.outputs(s.layer(), inputs)
    s.check_shapes(inputs, outputs)
    for name, tensor in zip(s.card.outputs, outputs, strict=True):
        assert tensor.isfinite().all(), f"output {name} is not finite"
    return None


def odd_sizes(s: _Subject) -> str | None:
    """A batch of 0 or 1 and a length of 1 work."""
    odd = [{dim: size} for dim, size in (("batch", 0), ("batch", 1), ("length", 1)) if dim in s.card.sample.dims]
    if s.given is not None or not odd:
        return "the inputs were given" if s.given is not None else "no dimension is called batch or length"
    for dims in odd:
        inputs = s.inputs(odd=dims)
        s.check_shapes(inputs, s.outputs(s.layer(), inputs))
    return None


def strides(s: _Subject) -> str | None:
    """Inputs in another memory layout give the same result."""
    layer, inputs = s.layer(), s.inputs()
    spread = tuple(torch.stack([x, x], dim=-1)[..., 0] for x in inputs)
    for got, expected in zip(s.outputs(layer, spread), s.outputs(layer, inputs), strict=True):
        assert_close(got, expected)
    return None


def dtypes(s: _Subject) -> str | None:
    """Every dtype of the card works; floating outputs have the input's dtype, or float32 for half-precision inputs."""
    for name in s.card.dtypes:
        dtype = getattr(torch, name)
        outputs = s.outputs(s.layer(dtype=dtype), s.inputs(dtype))
        allowed = {dtype, torch.promote_types(dtype, torch.float32)}
        for output, tensor in zip(s.card.outputs, outputs, strict=True):
            right = not tensor.is_floating_point() or tensor.dtype in allowed
            assert right, f"output {output} of {name} inputs has dtype {tensor.dtype}"
    return None


def gradients(s: _Subject) -> str | None:
    """Gradients of inputs and parameters agree with finite differences in float64."""
    if "float64" not in s.card.dtypes:
        return "the card does not list float64"
    layer = s.layer().to(torch.float64)
    inputs, names = s.inputs(torch.float64), [name for name, _ in layer.named_parameters()]

    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        weights = dict(zip(names, tensors[len(inputs) :], strict=True))
        outputs = s.outputs(lambda *x: functional_call(layer, weights, x), tensors[: len(inputs)])
        return tuple(output for output in outputs if output.is_floating_point())

    leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in (*inputs, *layer.parameters()))
    torch.autograd.gradcheck(forward, leaves, fast_mode=True)
    return None


def modes(s: _Subject) -> str | None:
    """train() and eval() reach every submodule, and a training step gives finite gradients."""
    layer = s.layer().train()
    assert all(module.training for module in layer.modules()), "train() does not reach every submodule"
    outputs = s.outputs(layer, s.inputs())
    differentiable = [output for output in outputs if output.requires_grad]
    if differentiable:
        torch.autograd.backward([output.float().square().mean() for output in differentiable])
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
    assert not any(module.training for module in layer.eval().modules()), "eval() does not reach every submodule"
    return None


def deepcopy(s: _Subject) -> str | None:
    """A deep copy computes the same and shares no parameter."""
    layer, inputs = s.layer(), s.inputs()
    twin = copy.deepcopy(layer)
    _same(s.outputs(twin, inputs), s.outputs(layer, inputs))
    shared = {p.data_ptr() for p in layer.parameters()} & {p.data_ptr() for p in twin.parameters() if p.numel()}
    assert not shared, "the copy shares parameters with the original"
    return None


def pickled(s: _Subject) -> str | None:
    """A layer that went through pickle computes the same."""
    layer, inputs = s.layer(), s.inputs()
    _same(s.outputs(pickle.loads(pickle.dumps(layer)), inputs), s.outputs(layer, inputs))
    return None


def state_dict(s: _Subject) -> str | None:
    """Another instance computes the same, bit for bit, once it has loaded the state_dict."""
    layer, other, inputs = s.layer(), s.layer(seed=2), s.inputs()
    other.load_state_dict(layer.state_dict(), strict=True)
    _same(s.outputs(other, inputs), s.outputs(layer, inputs))
    return None


def meta(s: _Subject) -> str | None:
    """The layer can be built and run on the meta device, allocating nothing."""
    layer, inputs = s.layer(device="meta"), tuple(x.to("meta") for x in s.inputs())
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        assert tensor.is_meta, f"{name} is on {tensor.device} although device='meta' was asked for"
    s.check_shapes(inputs, s.outputs(layer, inputs))
    return None


def determinism(s: _Subject) -> str | None:
    """The same bits from run to run, with one thread and with two."""
    layer, inputs, threads = s.layer(), s.inputs(), torch.get_num_threads()
    first = s.outputs(layer, inputs)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            _same(s.outputs(layer, inputs), first)
    finally:
        torch.set_num_threads(threads)
    return None


def inputs_unchanged(s: _Subject) -> str | None:
    """forward writes to none of its inputs."""
    inputs = s.inputs()
    s.outputs(s.layer(), inputs)
    for name, used, fresh in zip(s.card.inputs, inputs, s.inputs(), strict=True):
        assert torch.equal(used, fresh), f"forward changed its input {name}"
    return None


def compiles(s: _Subject) -> str | None:
    """torch.compile without a graph break computes the same, forward and backward (backend aot_eager)."""
    torch._dynamo.reset()
    layer = s.layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        inputs = tuple(x.requires_grad_(x.is_floating_point()) for x in s.inputs())
        outputs = s.outputs(function, inputs)
        differentiable = [output for output in outputs if output.requires_grad]
        leaves = [x for x in inputs if x.requires_grad] if differentiable else []
        sums = [output.sum() for output in differentiable]
        # an input that only decides has no gradient: zeros
        grads = torch.autograd.grad(sums, leaves, materialize_grads=True) if leaves else ()
        results.append((*outputs, *grads))
    for eager, graph in zip(*results, strict=True):
        assert_close(graph, eager)
    return None


def exports(s: _Subject) -> str | None:
    """torch.export gives a program that computes the same."""
    layer, inputs = s.layer(), s.inputs()
    program = torch.export.export(layer, inputs)
    for got, expected in zip(s.outputs(program.module(), inputs), s.outputs(layer, inputs), strict=True):
        assert_close(got, expected)
    return None


CHECKS: dict[str, Callable[[_Subject], str | None]] = {
    check.__name__: check
    for check in (
        signature,
        shapes,
        odd_sizes,
        strides,
        dtypes,
        gradients,
        modes,
        deepcopy,
        pickled,
        state_dict,
        meta,
        determinism,
        inputs_unchanged,
        compiles,
        exports,
    )
}


def _run(check: str, subject: _Subject) -> CheckResult:
    start = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=[]):
            reason = CHECKS[check](subject)
    except Exception as error:  # whatever a layer raises breaks the promise that is being checked
        raise ConformanceError(f"{subject.card.name} breaks its promise {check!r}: {error}") from error
    seconds = time.perf_counter() - start
    return CheckResult(subject.card.name, check, "skipped" if reason else "passed", reason or "", seconds)


def check_layer(
    name: str, *, config: Mapping[str, Any] | None = None, inputs: Mapping[str, Tensor] | None = None
) -> list[CheckResult]:
    """Run every check on a layer, on the CPU.

    Args:
        name: the layer's name in the zoo.
        config: constructor arguments instead of the card's sample.
        inputs: the tensors of one call by name, instead of random ones of the card's sample sizes; floating tensors are
            cast to the dtype under test.

    Returns:
        One result a check. A check that does not apply is skipped and says why.

    Raises:
        ConformanceError: the first broken promise.
        ValueError: no such layer, or inputs that are not the card's.
    """
    subject = _Subject(name, config, inputs)
    return [_run(check, subject) for check in CHECKS]


def conformance(
    name: str, *, config: Mapping[str, Any] | None = None, inputs: Mapping[str, Tensor] | None = None
) -> Callable[[str], None]:
    """The kit as a pytest test, a case a check: ``test_mine = conformance("mine:layer")``; see ``check_layer``."""
    import pytest

    @pytest.mark.parametrize("check", list(CHECKS))
    def test(check: str) -> None:
        result = _run(check, _Subject(name, config, inputs))
        if result.status == "skipped":
            pytest.skip(result.reason)

    return test
