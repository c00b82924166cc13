"""State-space cases: the ops, transformers' Mamba block, and models of the shapes of mamba-130m and mamba2-130m."""

import copy
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo import ops, reference
from layerzoo.bench.case import Candidate, Case, Cost, Direction, Shape, Target, Work
from layerzoo.bench.cases.ssm_layers import CASES as LAYERS
from layerzoo.reference.ssm import CHUNK

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


def _scan_function(inputs: Tensors, scan: Any) -> Work:
    """A function with mamba-ssm's arguments."""
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


# ---- ssd_chunk_scan ----


def _ssd_inputs(shape: Shape) -> Tensors:
    """Step sizes and decays as Mamba-2 has them at its start; x, B, C and dt are columns of one projection there."""
    generator = torch.Generator().manual_seed(0)
    batch, length, heads, width = shape["B"], shape["L"], shape["H"], shape["P"]
    groups, state = shape["G"], shape["N"]
    sizes = (heads * width, groups * state, groups * state, heads)
    x, B, C, dt = torch.randn(batch, length, sum(sizes), generator=generator).split(sizes, 2)
    return {
        "x": x.unflatten(2, (heads, width)),
        "dt": dt * 0.5,
        "A": -torch.empty(heads).uniform_(1, 16, generator=generator),
        "B": B.unflatten(2, (groups, state)),
        "C": C.unflatten(2, (groups, state)),
        "D": torch.ones(heads),
        "dt_bias": torch.empty(heads).uniform_(-6.9, -2.3, generator=generator),
        "grad_out": torch.randn(batch, length, heads, width, generator=generator),
    }


def _ssd_ours(inputs: Tensors) -> Work:
    leaves: Any = _leaves(inputs)
    scan: Any = ops.ssd_chunk_scan
    return Work(lambda: scan(**leaves, chunk_size=256, dt_softplus=True), leaves, inputs["grad_out"])


def _ssd_reference(inputs: Tensors) -> Work:
    leaves: Any = _leaves(inputs, torch.float64)
    scan = reference.ssm.ssd_chunk_scan
    return Work(lambda: scan(**leaves, dt_softplus=True)[0], leaves, inputs["grad_out"].double())


def _ssd_transformers(inputs: Tensors, scan: Any) -> Work:
    leaves: Any = _leaves(inputs)
    rest = {name: leaves[name] for name in ("dt", "A", "B", "C", "D", "dt_bias")}

    def call() -> Tensor:
        out: Tensor = scan(leaves["x"], **rest, chunk_size=256, dt_softplus=True)  # float32, whatever the inputs
        return out.to(leaves["x"].dtype)

    return Work(call, leaves, inputs["grad_out"])


def _ssd_by_selective_scan(inputs: Tensors) -> Work:
    """The same through Mamba's scan, each channel of a head with a step size and decays of its own."""
    leaves = _leaves(inputs)
    x, dt, A, B, C, D, bias = (leaves[name] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias"))
    width, state = x.shape[3], B.shape[3]

    def call() -> Tensor:
        out = ops.selective_scan(
            x.flatten(2).mT,
            dt.repeat_interleave(width, 2).mT,
            A.repeat_interleave(width).unsqueeze(1).expand(-1, state),
            B.permute(0, 2, 3, 1),
            C.permute(0, 2, 3, 1),
            D.repeat_interleave(width),
            None,
            bias.repeat_interleave(width),
            True,
        )
        return out.mT.reshape(x.shape)

    return Work(call, leaves, inputs["grad_out"])


def _ssd_operations(tokens: int, heads: int, width: int, state: int, groups: int, backward: bool) -> Cost:
    """The products of the chunked form, over chunks of Q steps, where steps only look back.

    For a step of a head: C h and the new state, n p each, and Q / 2 inputs of p channels; for a step of a group, Q / 2
    products of C and B. Backward: n p each for the gradients of C, B, x and the state, Q p for those within the chunk;
    for a group C B again, and the gradients of B and C from it. Besides, for each pair of steps an exponential and a
    handful of operations.
    """
    size, within, shared = state * width, CHUNK * width / 2, groups * CHUNK * state / 2
    pairs = tokens * heads * CHUNK / 2
    products = 2 * tokens * (heads * (2 * size + within) + shared)
    if not backward:
        return Cost(products=products, flops=6 * pairs, exps=pairs)
    products += 2 * tokens * (heads * (4 * size + 2 * within) + 3 * shared)
    return Cost(products=products, flops=18 * pairs, exps=2 * pairs)


def _ssd_cost(shape: Shape, inputs: Tensors, backward: bool) -> Cost:
    given = sum(x.nbytes for name, x in inputs.items() if name != "grad_out")
    out = inputs["x"].nbytes
    tokens = shape["B"] * shape["L"]
    operations = _ssd_operations(tokens, shape["H"], shape["P"], shape["N"], shape["G"], backward)
    if not backward:
        return replace(operations, read=given, written=out)
    return replace(operations, read=2 * given + out, written=given + out)


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


def _conv_function(inputs: Tensors, conv: Any) -> Work:
    """A function with causal-conv1d's arguments."""
    leaves: Any = _leaves(inputs)
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


# ---- selective_state_update ----


def _update_inputs(shape: Shape, heads: bool) -> Tensors:
    """One step of decoding, in Mamba-2's heads with what a head has once expanded over it, or plain."""
    generator = torch.Generator().manual_seed(0)
    batch, state = shape["B"], shape["N"]
    front = (shape["H"], shape["P"]) if heads else (shape["D"],)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    def parameter(*size: int) -> Tensor:
        return normal(*size[:-1], 1).expand(size) if heads else normal(*size)

    A = -torch.arange(1.0, front[0] + 1).view(-1, 1, 1) / front[0] if heads else -torch.arange(1.0, state + 1)
    coefficients = (batch, shape["G"], state) if heads else (batch, state)
    return {
        "state": normal(batch, *front, state),
        "x": normal(batch, *front),
        "dt": parameter(batch, *front),
        "A": A.expand(*front, state) if heads else A.repeat(*front, 1),
        "B": normal(*coefficients),
        "C": normal(*coefficients),
        "D": parameter(*front),
        "z": normal(batch, *front),
        "dt_bias": parameter(*front),
    }


def _update_ours(inputs: Tensors) -> Work:
    """Each call goes on from the state that the one before left."""
    arguments: Any = inputs | {"state": inputs["state"].clone()}
    return Work(lambda: ops.selective_state_update(**arguments, dt_softplus=True))


def _update_reference(inputs: Tensors) -> Work:
    arguments: Any = {name: x.double() for name, x in inputs.items()}
    return Work(lambda: reference.ssm.selective_state_update(**arguments, dt_softplus=True))


def _update_plain(inputs: Tensors) -> Work:
    """In torch's own operations, as a model without kernels decodes."""
    state = inputs["state"].clone()
    x, dt, A, B, C, D, z, bias = (inputs[name] for name in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    if heads := x.dim() == 3:
        B, C = (t.repeat_interleave(x.shape[1] // t.shape[1], dim=1) for t in (B, C))
    B, C = B.unsqueeze(-2), C.unsqueeze(-2)

    def call() -> Tensor:
        step = F.softplus(dt + bias)
        decay = torch.exp(step[..., :1, None] * A[:, :1, :1]) if heads else torch.exp(step.unsqueeze(-1) * A)
        state.mul_(decay).addcmul_((step * x).unsqueeze(-1), B)
        out: Tensor = (torch.matmul(state, C.mT).squeeze(-1) + D * x) * F.silu(z)
        return out

    return Work(call)


def _update_cost(shape: Shape, inputs: Tensors, heads: bool) -> Cost:
    """Of one state: h = decay h + dt u B and y += C h, and, but for heads, the decay. Expanded views count once."""
    out, state = inputs["x"], inputs["state"]
    given = sum(x.untyped_storage().nbytes() for x in inputs.values())
    return Cost(
        read=given,
        written=state.nbytes + out.nbytes,
        flops=(5 if heads else 6) * state.numel() + 10 * out.numel(),
        exps=(2 * out.numel() if heads else state.numel() + 2 * out.numel()),
    )


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


# ---- whole models ----


def _model_inputs(shape: Shape, family: str) -> dict[str, Any]:
    """A model of a family, with random weights, and tokens."""
    transformers = _transformers()
    torch.manual_seed(0)
    sizes = {"V": "vocab_size", "H": "hidden_size", "layers": "num_hidden_layers", "N": "state_size"}
    sizes |= {"heads": "num_heads", "P": "head_dim", "G": "n_groups"}
    config = getattr(transformers, f"{family}Config")(**{sizes[name]: shape[name] for name in sizes if name in shape})
    ids = torch.randint(shape["V"], (shape["B"], shape["L"]), generator=torch.Generator().manual_seed(0))
    return {"model": getattr(transformers, f"{family}ForCausalLM")(config).eval(), "ids": ids}


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


def _train(inputs: dict[str, Any], accelerated: bool = False) -> Work:
    """The loss and the gradient of every parameter: a training step but for the optimizer, the same for all."""
    model: Any = (_accelerated(inputs["model"]) if accelerated else inputs["model"]).train()
    ids = inputs["ids"]
    return Work(lambda: model(ids, labels=ids, use_cache=False).loss, dict(model.named_parameters()))


BUILDS = {"prefill": _prefill, "decode": _decode, "forward+backward": _train}


def _mixer_cost(mixer: Any, tokens: int, calls: int, backward: bool) -> Cost:
    """Of one mixer for `tokens` in all: products with its weights, which each call reads once, and the scan.

    More than one call is decoding: each reads and writes the state.
    """
    weights = [module.weight for module in mixer.modules() if isinstance(module, nn.Linear)]
    size = mixer.in_proj.weight.element_size()
    states = mixer.intermediate_size * mixer.ssm_state_size
    heads = getattr(mixer, "num_heads", None)
    passes = 3 if backward else 1  # gradients of the input and of the weight are a product each
    moved = tokens * states * 4 if calls > 1 else 0  # in float32
    if heads is None:
        scan = Cost(flops=(25 if backward else 6) * tokens * states, exps=tokens * states)
    elif calls > 1:
        scan = Cost(flops=5 * tokens * states, exps=tokens * heads)
    else:
        scan = _ssd_operations(tokens, heads, mixer.head_dim, mixer.ssm_state_size, mixer.n_groups, backward)
    return replace(
        scan,
        read=passes * calls * sum(parameter.nbytes for parameter in mixer.parameters())
        + passes * tokens * mixer.hidden_size * size
        + moved,
        written=passes * tokens * mixer.hidden_size * size + moved,
        products=scan.products + passes * 2 * tokens * sum(weight.numel() for weight in weights),
    )


def _block_cost(shape: Shape, inputs: dict[str, Any], backward: bool) -> Cost:
    return _mixer_cost(inputs["mixer"], shape["B"] * shape["L"], 1, backward)


def _model_cost(shape: Shape, inputs: dict[str, Any], direction: Direction) -> Cost:
    """Its mixers, and the head for each token, of a prefill for the last one; a call of decoding is one token."""
    model, backward = inputs["model"], direction == "forward+backward"
    tokens, calls = shape["B"] * shape["L"], shape["L"] if direction == "decode" else 1
    mixers = [_mixer_cost(block.mixer, tokens, calls, backward) for block in model.backbone.layers]
    head, logits, passes = model.lm_head.weight, shape["B"] if direction == "prefill" else tokens, 3 if backward else 1
    return Cost(
        read=sum(cost.read for cost in mixers) + passes * calls * head.nbytes,
        written=sum(cost.written for cost in mixers),
        products=sum(cost.products for cost in mixers) + passes * 2 * logits * head.numel(),
        flops=sum(cost.flops for cost in mixers),
        exps=sum(cost.exps for cost in mixers),
    )


# ---- the cases ----

LAYOUTS = ("time-last", "channel-last")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LOOP = Candidate("transformers", _block_host)
# The families of transformers: the model's name and shape, and a tiny shape for the check.
MODELS: dict[str, tuple[str, Shape, Shape]] = {
    "Mamba": (
        "mamba_130m",
        {"B": 1, "V": 50280, "H": 768, "layers": 24, "N": 16},
        {"B": 1, "V": 97, "H": 32, "layers": 2, "N": 16, "L": 9},
    ),
    "Mamba2": (
        "mamba2_130m",
        {"B": 1, "V": 50288, "H": 768, "layers": 24, "heads": 24, "P": 64, "N": 128, "G": 1},
        {"B": 1, "V": 97, "H": 32, "layers": 2, "heads": 4, "P": 16, "N": 16, "G": 2, "L": 9},
    ),
}
ACCELERATED = "layerzoo.accelerate"


def _scan_case(layout: str, backward: bool) -> Case:
    loop = Candidate("transformers", _scan_function, "transformers.models.mamba.modeling_mamba:mamba_selective_scan")
    mambapy = Candidate("mambapy", _scan_mambapy, "mambapy.mamba:MambaBlock.selective_scan")
    cuda = Candidate("mamba-ssm", _scan_function, "mamba_ssm.ops.selective_scan_interface:selective_scan_fn")
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
        peers=(mambapy, cuda) if backward else (loop, mambapy, cuda),  # the loop takes a quarter of an hour
        dtypes=DTYPES,
        wide=("A", "D", "delta_bias"),
        elements=("B", "D", "L", "N"),
        cost=partial(_scan_cost, backward=backward),
        targets=(*targets, Target("memory / inputs", at_most=3)) if backward else targets,
    )


def _ssd_case(backward: bool) -> Case:
    transformers = Candidate(
        "transformers", _ssd_transformers, "transformers.models.mamba2.modeling_mamba2:mamba2_chunk_scan"
    )
    return Case(
        "ssm.ssd_chunk_scan",
        "mamba2",
        "forward+backward" if backward else "forward",
        shape={"B": 1, "L": 2048, "H": 24, "P": 64, "N": 128, "G": 1},
        check={"B": 2, "L": 70, "H": 4, "P": 16, "N": 16, "G": 2},
        inputs=_ssd_inputs,
        ours=Candidate("layerzoo", _ssd_ours),
        reference=Candidate("reference", _ssd_reference),
        peers=(transformers, Candidate("selective_scan", _ssd_by_selective_scan)),
        dtypes=DTYPES,
        wide=("A", "D", "dt_bias"),
        elements=("B", "L", "H", "P", "N"),
        cost=partial(_ssd_cost, backward=backward),
        targets=(Target("share of the limit", at_least=0.5), Target("x transformers", at_least=8)),
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
        peers=(
            Candidate("torch", _conv_plain),
            Candidate("causal-conv1d", _conv_function, "causal_conv1d:causal_conv1d_fn"),
        ),
        dtypes=DTYPES,
        devices=("cpu", "cuda"),
        elements=("B", "D", "L"),
        cost=partial(_conv_cost, backward=backward),
    )


def _update_case(heads: bool) -> Case:
    sizes = {"H": 24, "P": 64, "N": 128, "G": 1} if heads else {"D": 1536, "N": 16}
    small = {"H": 4, "P": 8, "N": 16, "G": 2} if heads else {"D": 24, "N": 16}
    return Case(
        "ssm.selective_state_update",
        "heads" if heads else "plain",
        "forward",
        shape={"B": 64 if heads else 704, **sizes},  # 50 and 69 MB of state
        check={"B": 2, **small},
        inputs=partial(_update_inputs, heads=heads),
        ours=Candidate("layerzoo", _update_ours),
        reference=Candidate("reference", _update_reference),
        peers=(Candidate("torch", _update_plain),),
        dtypes=DTYPES,
        wide=("state", "A", "D", "dt_bias"),
        elements=("B", "H", "P", "N") if heads else ("B", "D", "N"),
        cost=partial(_update_cost, heads=heads),
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


def _model_case(family: str, direction: Direction, length: int, *targets: Target) -> Case:
    name, shape, tiny = MODELS[family]
    build = BUILDS[direction]
    host = Candidate("transformers", build)
    return Case(
        f"ssm.{name}",
        f"L{length}",
        direction,
        shape={**shape, "L": length},
        check=tiny,
        inputs=partial(_model_inputs, family=family),
        ours=Candidate(ACCELERATED, partial(build, accelerated=True)),
        reference=host,
        peers=(host,),
        tolerance=1e-3,
        tokens=("B", "L"),
        cost=partial(_model_cost, direction=direction),
        targets=targets,
    )


CASES = (
    *(_scan_case(layout, backward) for layout in LAYOUTS for backward in (False, True)),
    *(_ssd_case(backward) for backward in (False, True)),
    *(_conv_case(layout, backward) for layout in LAYOUTS for backward in (False, True)),
    *(_recurrence_case(layout, backward) for layout in LAYOUTS for backward in (False, True)),
    _update_case(heads=True),
    _update_case(heads=False),
    _block_case(1024, False, LOOP, (Target("x transformers", at_least=6), Target("x mambapy", at_least=6))),
    _block_case(128, True, LOOP),
    _block_case(
        1024,
        True,
        Candidate("transformers", _block_host, full=True),  # three minutes
        (Target("x transformers", at_least=250), Target("x mambapy", at_least=6)),
    ),
    _model_case("Mamba", "prefill", 128),
    _model_case("Mamba", "prefill", 512, Target("x transformers", at_least=6)),
    _model_case("Mamba", "decode", 16, Target("x transformers", at_least=3)),
    _model_case("Mamba2", "prefill", 512, Target("x transformers", at_least=8)),
    _model_case("Mamba2", "decode", 16, Target("x transformers", at_least=4)),
    _model_case("Mamba2", "forward+backward", 512, Target("x transformers", at_least=10)),
    *LAYERS,
)
