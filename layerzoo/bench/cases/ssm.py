"""State-space cases: the ops, transformers' Mamba block and a model of mamba-130m's shape."""

import copy
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo import ops, reference
from layerzoo.bench.case import Candidate, Case, Cost, Shape, Target, Work

Tensors = dict[str, Tensor]


def _leaves(inputs: Tensors, dtype: torch.dtype | None = None) -> Tensors:
    return {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items() if name != "grad_out"}


def _transformers() -> Any:
    transformers = import_module("transformers")
    transformers.logging.set_verbosity_error()  # it warns about each kernel that it does not have
    return transformers


# ---- selective_scan ----


def _scan_inputs(shape: Shape, channel_last: bool = False) -> Tensors:
    """Step sizes and decays as Mamba has them at its start; B and C as its projections return them."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, length, state = shape["B"], shape["D"], shape["L"], shape["N"]

    def sequence(width: int) -> Tensor:
        if channel_last:
            return torch.randn(batch, length, width, generator=generator).transpose(1, 2)
        return torch.randn(batch, width, length, generator=generator)

    return {
        "u": sequence(channels),
        "delta": sequence(channels).mul_(0.5),
        "A": -torch.arange(1.0, state + 1).repeat(channels, 1),
        "B": sequence(state),
        "C": sequence(state),
        "D": torch.randn(channels, generator=generator),
        "z": sequence(channels),
        "delta_bias": torch.empty(channels).uniform_(-6.9, -2.3, generator=generator),
        "grad_out": sequence(channels),
    }


def _scan_ours(inputs: Tensors) -> Work:
    leaves: Any = _leaves(inputs)
    scan: Any = ops.selective_scan
    return Work(lambda: scan(**leaves, delta_softplus=True), leaves, inputs["grad_out"])


def _scan_reference(inputs: Tensors) -> Work:
    leaves: Any = _leaves(inputs, torch.float64)
    scan = reference.ssm.selective_scan
    return Work(lambda: scan(**leaves, delta_softplus=True)[0], leaves, inputs["grad_out"].double())


def _scan_transformers(inputs: Tensors, scan: Any) -> Work:
    leaves: Any = _leaves(inputs)
    rest = {name: leaves[name] for name in ("A", "B", "C", "D", "z", "delta_bias")}
    return Work(lambda: scan(leaves["u"], leaves["delta"], **rest, delta_softplus=True), leaves, inputs["grad_out"])


def _scan_mambapy(inputs: Tensors, scan: Any) -> Work:
    leaves = _leaves(inputs)
    u, delta, A, B, C, D, z, bias = (leaves[k] for k in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"))

    def call() -> Tensor:
        u_, delta_, B_, C_, z_ = (x.transpose(1, 2) for x in (u, delta, B, C, z))
        y: Tensor = scan(None, u_, F.softplus(delta_ + bias), A, B_, C_, D) * F.silu(z_)
        return y.transpose(1, 2)

    return Work(call, leaves, inputs["grad_out"])


def _scan_cost(shape: Shape, inputs: Tensors, backward: bool) -> Cost:
    """Of one state of one channel at one step: dt A, the exponential, h = decay h + dt u B and y += C h forward.

    Backward: h again, the adjoint state, and from it the gradients of dt u, dt, A, B and C. Of one channel at one step
    besides: softplus and the gate.
    """
    steps = shape["B"] * shape["D"] * shape["L"]
    states = steps * shape["N"]
    given = sum(x.nbytes for name, x in inputs.items() if name != "grad_out")
    out = inputs["u"].nbytes
    if not backward:
        return Cost(read=given, written=out, flops=6 * states + 10 * steps, exps=states + 2 * steps)
    return Cost(read=2 * given + out, written=given + out, flops=25 * states + 30 * steps, exps=states + 2 * steps)


# ---- causal_conv1d ----


def _conv_inputs(shape: Shape, channel_last: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    batch, channels, length, width = shape["B"], shape["D"], shape["L"], shape["W"]
    x, grad_out = torch.randn(2, batch, channels, length, generator=generator)
    if channel_last:
        x, grad_out = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, grad_out))
    weight = torch.randn(channels, width, generator=generator) / width
    return {"x": x, "weight": weight, "bias": torch.randn(channels, generator=generator), "grad_out": grad_out}


def _conv_ours(inputs: Tensors) -> Work:
    leaves: Any = _leaves(inputs)
    conv: Any = ops.causal_conv1d
    return Work(lambda: conv(**leaves, activation="silu"), leaves, inputs["grad_out"])


def _conv_reference(inputs: Tensors) -> Work:
    return _conv_plain(inputs, torch.float64)


def _conv_plain(inputs: Tensors, dtype: torch.dtype | None = None) -> Work:
    leaves = _leaves(inputs, dtype)
    x, weight, bias = leaves.values()

    def call() -> Tensor:
        out = F.conv1d(x, weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=x.shape[1])
        return F.silu(out[..., : x.shape[2]])

    return Work(call, leaves, inputs["grad_out"].to(dtype))


def _conv_cost(shape: Shape, inputs: Tensors, backward: bool) -> Cost:
    """A convolution forward; again backward, for the activation, and one each for the gradients of x and the weight."""
    steps, x = shape["B"] * shape["D"] * shape["L"], inputs["x"].nbytes
    if not backward:
        return Cost(read=x, written=x, flops=steps * (2 * shape["W"] + 3), exps=steps)
    return Cost(read=3 * x, written=2 * x, flops=steps * (8 * shape["W"] + 12), exps=2 * steps)


# ---- linear_scan ----


def _recurrence_inputs(shape: Shape, time_last: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    batch, length, channels = shape["B"], shape["L"], shape["D"]

    def sequence() -> Tensor:
        if time_last:
            return torch.randn(batch, channels, length, generator=generator).mT
        return torch.randn(batch, length, channels, generator=generator)

    return {"a": sequence().sigmoid_(), "x": sequence(), "grad_out": sequence()}


def _recurrence_ours(inputs: Tensors) -> Work:
    leaves: Any = _leaves(inputs)
    return Work(lambda: ops.linear_scan(**leaves), leaves, inputs["grad_out"])


def _recurrence_loop(inputs: Tensors, dtype: torch.dtype | None = None) -> Work:
    leaves: Any = _leaves(inputs, dtype)
    return Work(lambda: reference.ssm.linear_scan(**leaves), leaves, inputs["grad_out"].to(dtype))


def _recurrence_cost(shape: Shape, inputs: Tensors, backward: bool) -> Cost:
    """A multiply-add forward; backward the recurrence again and a product, from a, h and the gradient."""
    steps, a, x = shape["B"] * shape["D"] * shape["L"], inputs["a"].nbytes, inputs["x"].nbytes
    if not backward:
        return Cost(read=a + x, written=x, flops=2 * steps)
    return Cost(read=2 * a + 3 * x, written=a + 2 * x, flops=5 * steps)


# ---- transformers' Mamba block ----


def _block_inputs(shape: Shape) -> dict[str, Any]:
    transformers, modeling = _transformers(), import_module("transformers.models.mamba.modeling_mamba")
    torch.manual_seed(0)
    config = transformers.MambaConfig(hidden_size=shape["H"], state_size=shape["N"], num_hidden_layers=1)
    x, grad_out = torch.randn(2, shape["B"], shape["L"], shape["H"])
    return {"mixer": modeling.MambaMixer(config, layer_idx=0), "x": x, "grad_out": grad_out}


def _block_work(module: nn.Module, inputs: dict[str, Any]) -> Work:
    x = inputs["x"].detach().requires_grad_()
    return Work(lambda: module(x), {"x": x, **dict(module.named_parameters())}, inputs["grad_out"])


def _block_host(inputs: dict[str, Any]) -> Work:
    return _block_work(inputs["mixer"], inputs)


def _block_accelerated(inputs: dict[str, Any]) -> Work:
    return _block_work(_accelerated(inputs["mixer"]), inputs)


def _block_host_mambapy(inputs: dict[str, Any], pscan: object) -> Work:
    """With the option that falls back to the loop, without a word, where mambapy is not installed."""
    mixer = copy.deepcopy(inputs["mixer"])
    mixer.use_mambapy = True
    return _block_work(mixer, inputs)


def _block_mambapy(inputs: dict[str, Any], mambapy: Any) -> Work:
    mixer = inputs["mixer"]
    block = mambapy.MambaBlock(mambapy.MambaConfig(mixer.hidden_size, n_layers=1, d_state=mixer.ssm_state_size))
    block.load_state_dict(mixer.state_dict())
    return _block_work(block, inputs)


def _accelerated(module: nn.Module) -> nn.Module:
    from layerzoo.hosts.surgery import accelerate

    module = copy.deepcopy(module)
    accelerate(module, strict=True)
    return module


# ---- a whole model ----


def _model_inputs(shape: Shape) -> dict[str, Any]:
    transformers = _transformers()
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=shape["V"], hidden_size=shape["H"], num_hidden_layers=shape["layers"], state_size=shape["N"]
    )
    ids = torch.randint(shape["V"], (shape["B"], shape["L"]), generator=torch.Generator().manual_seed(0))
    return {"model": transformers.MambaForCausalLM(config).eval(), "ids": ids}


def _prefill(inputs: dict[str, Any], accelerated: bool = False) -> Work:
    """Of the logits only the last row, as `generate` asks for."""
    model: Any = _accelerated(inputs["model"]) if accelerated else inputs["model"]
    return Work(lambda: model(inputs["ids"], use_cache=True, logits_to_keep=1).logits)


def _decode(inputs: dict[str, Any], accelerated: bool = False) -> Work:
    """Token by token, going on from the cache: each call starts where the one before ended."""
    from layerzoo.hosts.transformers import CACHE

    model: Any = _accelerated(inputs["model"]) if accelerated else inputs["model"]
    with torch.no_grad():
        cache = {CACHE: model(inputs["ids"], use_cache=True)[CACHE]}

    def call() -> Tensor:
        return torch.cat(
            [model(token, **cache, use_cache=True).logits for token in inputs["ids"].split(1, dim=1)], dim=1
        )

    return Work(call)


def _mixer_cost(mixer: Any, tokens: int, calls: int, backward: bool) -> Cost:
    """Of one mixer for `tokens` in all: products with its weights, which each call reads once, and the scan."""
    weights = [module.weight for module in mixer.modules() if isinstance(module, nn.Linear)]
    size = mixer.in_proj.weight.element_size()
    states = tokens * mixer.intermediate_size * mixer.ssm_state_size
    passes = 3 if backward else 1  # gradients of the input and of the weight are a product each
    return Cost(
        read=passes * calls * sum(parameter.nbytes for parameter in mixer.parameters())
        + passes * tokens * mixer.hidden_size * size,
        written=passes * tokens * mixer.hidden_size * size,
        products=passes * 2 * tokens * sum(weight.numel() for weight in weights),
        flops=(25 if backward else 6) * states,
        exps=states,
    )


def _block_cost(shape: Shape, inputs: dict[str, Any], backward: bool) -> Cost:
    return _mixer_cost(inputs["mixer"], shape["B"] * shape["L"], 1, backward)


def _model_cost(shape: Shape, inputs: dict[str, Any], decode: bool) -> Cost:
    """Its mixers, and the head for each token of decoding, or the last one; a call of decoding is one token."""
    model = inputs["model"]
    tokens, calls = shape["B"] * shape["L"], shape["L"] if decode else 1
    mixers = [_mixer_cost(block.mixer, tokens, calls, backward=False) for block in model.backbone.layers]
    head, logits = model.lm_head.weight, tokens if decode else shape["B"]
    return Cost(
        read=sum(cost.read for cost in mixers) + calls * head.nbytes,
        products=sum(cost.products for cost in mixers) + 2 * logits * head.numel(),
        flops=sum(cost.flops for cost in mixers),
        exps=sum(cost.exps for cost in mixers),
    )


# ---- the cases ----

LAYOUTS = ("time-last", "channel-last")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LOOP = Candidate("transformers", _block_host)
MODEL = {"B": 1, "V": 50280, "H": 768, "layers": 24, "N": 16}
TINY_MODEL = {"B": 1, "V": 97, "H": 32, "layers": 2, "N": 16, "L": 9}
ACCELERATED = "layerzoo.accelerate"


def _scan_case(layout: str, backward: bool) -> Case:
    loop = Candidate(
        "transformers", _scan_transformers, "transformers.models.mamba.modeling_mamba:mamba_selective_scan"
    )
    mambapy = Candidate("mambapy", _scan_mambapy, "mambapy.mamba:MambaBlock.selective_scan")
    targets = (Target("ns/element", at_most=0.55 if backward else 0.20),)
    return Case(
        "ssm.selective_scan",
        layout,
        "forward+backward" if backward else "forward",
        shape={"B": 2, "D": 1536, "L": 2048, "N": 16},
        check={"B": 2, "D": 24, "L": 70, "N": 16},
        inputs=partial(_scan_inputs, channel_last=layout == "channel-last"),
        ours=Candidate("layerzoo", _scan_ours),
        reference=Candidate("reference", _scan_reference),
        peers=(mambapy,) if backward else (loop, mambapy),  # backward of the loop would take a quarter of an hour
        dtypes=DTYPES,
        wide=("A", "D", "delta_bias"),
        elements=("B", "D", "L", "N"),
        cost=partial(_scan_cost, backward=backward),
        targets=(*targets, Target("memory / inputs", at_most=3)) if backward else targets,
    )


def _conv_case(layout: str, backward: bool) -> Case:
    return Case(
        "ssm.causal_conv1d",
        layout,
        "forward+backward" if backward else "forward",
        shape={"B": 2, "D": 1536, "L": 2048, "W": 4},
        check={"B": 2, "D": 24, "L": 70, "W": 4},
        inputs=partial(_conv_inputs, channel_last=layout == "channel-last"),
        ours=Candidate("layerzoo", _conv_ours),
        reference=Candidate("reference", _conv_reference),
        peers=(Candidate("torch", _conv_plain),),
        dtypes=DTYPES,
        devices=("cpu", "cuda"),
        elements=("B", "D", "L"),
        cost=partial(_conv_cost, backward=backward),
    )


def _recurrence_case(layout: str, backward: bool) -> Case:
    return Case(
        "ssm.linear_scan",
        layout,
        "forward+backward" if backward else "forward",
        shape={"B": 4, "L": 4096, "D": 1024},
        check={"B": 2, "L": 70, "D": 24},
        inputs=partial(_recurrence_inputs, time_last=layout == "time-last"),
        ours=Candidate("layerzoo", _recurrence_ours),
        reference=Candidate("reference", partial(_recurrence_loop, dtype=torch.float64)),
        peers=(Candidate("torch loop", _recurrence_loop, full=backward),),
        dtypes=DTYPES,
        elements=("B", "L", "D"),
        cost=partial(_recurrence_cost, backward=backward),
    )


def _block_case(length: int, backward: bool, loop: Candidate, targets: tuple[Target, ...] = ()) -> Case:
    return Case(
        "ssm.mamba_block",
        f"L{length}",
        "forward+backward" if backward else "forward",
        shape={"B": 2, "L": length, "H": 768, "N": 16},
        check={"B": 2, "L": 21, "H": 32, "N": 16},
        inputs=_block_inputs,
        ours=Candidate(ACCELERATED, _block_accelerated),
        reference=LOOP,
        peers=(
            Candidate("mambapy", _block_mambapy, "mambapy.mamba"),
            loop,
            Candidate("transformers+mambapy", _block_host_mambapy, "mambapy.pscan"),
        ),
        tokens=("B", "L"),
        cost=partial(_block_cost, backward=backward),
        targets=targets,
    )


def _model_case(length: int, decode: bool, targets: tuple[Target, ...] = ()) -> Case:
    build = _decode if decode else _prefill
    return Case(
        "ssm.mamba_130m",
        f"L{length}",
        "decode" if decode else "prefill",
        shape={**MODEL, "L": length},
        check=TINY_MODEL,
        inputs=_model_inputs,
        ours=Candidate(ACCELERATED, partial(build, accelerated=True)),
        reference=Candidate("transformers", build),
        peers=(Candidate("transformers", build),),
        tolerance=1e-3,
        tokens=("B", "L"),
        cost=partial(_model_cost, decode=decode),
        targets=targets,
    )


CASES = (
    *(_scan_case(layout, backward) for layout in LAYOUTS for backward in (False, True)),
    *(_conv_case(layout, backward) for layout in LAYOUTS for backward in (False, True)),
    *(_recurrence_case(layout, backward) for layout in LAYOUTS for backward in (False, True)),
    _block_case(1024, False, LOOP, (Target("x transformers", at_least=6), Target("x mambapy", at_least=6))),
    _block_case(128, True, LOOP),
    _block_case(
        1024,
        True,
        Candidate("transformers", _block_host, full=True),  # three minutes
        (Target("x transformers", at_least=250), Target("x mambapy", at_least=6)),
    ),
    _model_case(128, decode=False),
    _model_case(512, decode=False, targets=(Target("x transformers", at_least=6),)),
    _model_case(16, decode=True, targets=(Target("x transformers", at_least=3),)),
)
