"""Mixture-of-experts cases: the experts of three models' shapes, and a dense MLP that does as much for each token."""

from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo import ops, reference
from layerzoo.bench.case import Candidate, Case, Cost, Shape, Target, Work

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """How a family of models lays out its experts, and its class in transformers: sizes by the config's names."""

    model: str
    experts: str
    config: str
    sizes: dict[str, str]
    packed: bool = False  # transposed and interleaved, with biases
    options: dict[str, float] = field(default_factory=dict)


QWEN = Kind(
    "qwen3_moe",
    "Qwen3MoeExperts",
    "Qwen3MoeConfig",
    {"hidden_size": "H", "moe_intermediate_size": "I", "num_experts": "E", "num_experts_per_tok": "K"},
)
MIXTRAL = Kind(
    "mixtral",
    "MixtralExperts",
    "MixtralConfig",
    {"hidden_size": "H", "intermediate_size": "I", "num_local_experts": "E", "num_experts_per_tok": "K"},
)
GPT_OSS = Kind(
    "gpt_oss",
    "GptOssExperts",
    "GptOssConfig",
    {"hidden_size": "H", "intermediate_size": "I", "num_local_experts": "E", "num_experts_per_tok": "K"},
    packed=True,
    options={"alpha": 1.702, "limit": 7.0},
)
# Of the parameters of transformers' experts.
NAMES = {"w13": "gate_up_proj", "w2": "down_proj", "b13": "gate_up_proj_bias", "b2": "down_proj_bias"}


def _inputs(shape: Shape, kind: Kind) -> Tensors:
    """Each token's experts are drawn without a preference, its weights add up to 1."""
    generator = torch.Generator().manual_seed(0)
    tokens, k, outer, inner, experts = (shape[size] for size in "TKHIE")

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator).mul_(scale)

    weights, ids = normal(tokens, experts).topk(k)
    up, down = outer**-0.5, inner**-0.5
    given = {
        "x": normal(tokens, outer),
        "ids": ids,
        "weights": weights.softmax(1),
        "w13": normal(*(experts, outer, 2 * inner) if kind.packed else (experts, 2 * inner, outer), scale=up),
        "w2": normal(*(experts, inner, outer) if kind.packed else (experts, outer, inner), scale=down),
        "grad_out": normal(tokens, outer),
    }
    if kind.packed:
        given |= {"b13": normal(experts, 2 * inner, scale=0.1), "b2": normal(experts, outer, scale=0.1)}
    return given


def _parts(inputs: Tensors, frozen: bool, dtype: torch.dtype | None = None) -> tuple[Tensors, Tensors, Tensor]:
    """All arguments, those of them that get a gradient, and the gradient of the output; `frozen` experts get none."""
    leaves = {
        name: x.detach().to(dtype).requires_grad_(not frozen or name in ("x", "weights"))
        for name, x in inputs.items()
        if name not in ("ids", "grad_out")
    }
    trained = {name: x for name, x in leaves.items() if x.requires_grad}
    return leaves | {"ids": inputs["ids"]}, trained, inputs["grad_out"].to(dtype)


def _ours(inputs: Tensors, kind: Kind, frozen: bool) -> Work:
    arguments, trained, grad_out = _parts(inputs, frozen)
    given: Any = arguments | kind.options | {"transposed": kind.packed, "interleaved": kind.packed}
    return Work(lambda: ops.moe_experts(**given), trained, grad_out)


def _reference(inputs: Tensors, kind: Kind, frozen: bool) -> Work:
    arguments, trained, grad_out = _parts(inputs, frozen, torch.float64)
    given = (arguments.get(name) for name in ("x", "ids", "weights", "offsets", "w13", "w2", "b13", "b2"))
    alpha, limit = kind.options.get("alpha"), kind.options.get("limit", torch.inf)
    gate = (0, True, kind.packed, kind.packed, alpha or 1.0, 1.0 if alpha else 0.0, limit)
    call = partial(reference.moe.moe_experts, *given, *gate, -1, False)
    return Work(lambda: call()[0], trained, grad_out)


def _host(inputs: Tensors, experts: Any, kind: Kind, frozen: bool, implementation: str) -> Work:
    """transformers' own class with these parameters."""
    arguments, trained, grad_out = _parts(inputs, frozen)
    count, outer = arguments["w13"].shape[0], arguments["x"].shape[1]
    inner = arguments["w2"].shape[1 if kind.packed else 2]
    sizes = {"H": outer, "I": inner, "E": count, "K": arguments["ids"].shape[1]}
    config = getattr(import_module("transformers"), kind.config)(**{n: sizes[size] for n, size in kind.sizes.items()})
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = experts(config)
    for ours, theirs in NAMES.items():
        if ours in arguments:
            delattr(module, theirs)
            setattr(module, theirs, arguments[ours])
    return Work(lambda: module(arguments["x"], arguments["ids"], arguments["weights"]), trained, grad_out)


def _dense(inputs: Tensors, dtype: torch.dtype | None = None) -> Work:
    """The one expert that there is, in torch's own operations."""
    arguments, trained, grad_out = _parts(inputs, False, dtype)
    x, w13, w2 = (arguments[name] for name in ("x", "w13", "w2"))

    def call() -> Tensor:
        g, u = F.linear(x, w13[0]).chunk(2, dim=1)
        return F.linear(F.silu(g) * u, w2[0]) * arguments["weights"]

    return Work(call, trained, grad_out)


def _cost(shape: Shape, inputs: Tensors, backward: bool, frozen: bool) -> Cost:
    """Three products for each pair of a token and an expert, whose matrices are read where anybody chose it.

    Backward: two products for each of these, one where the matrices are frozen; gradients of all experts are written.
    """
    x, ids = inputs["x"], inputs["ids"]
    pairs, inner = ids.numel(), shape["I"]
    product = 6 * pairs * shape["H"] * inner
    parameters = sum(inputs[name].nbytes for name in NAMES if name in inputs)
    touched = parameters * ids.unique().numel() / shape["E"]
    routing = ids.nbytes + inputs["weights"].nbytes
    between, last = 6 * pairs * inner, 2 * pairs * shape["H"]  # the gates, the sums
    if not backward:
        return Cost(
            read=x.nbytes + routing + touched,
            written=x.nbytes,
            products=product,
            flops=between + last,
            exps=pairs * inner,
        )
    return Cost(
        read=3 * x.nbytes + 2 * (routing + touched),
        written=2 * x.nbytes + inputs["weights"].nbytes + (0 if frozen else parameters),
        products=(2 if frozen else 3) * product,
        flops=3 * (between + last),
        exps=2 * pairs * inner,
    )


def _case(
    variant: str,
    kind: Kind,
    tokens: int,
    sizes: dict[str, int],
    *targets: Target,
    dtype: str = "float32",
    backward: bool = False,
    frozen: bool = False,
) -> Case:
    peers = ["eager", "grouped_mm", *(["batched_mm"] if tokens <= 4 else [])]  # the last copies each pair's matrices
    needs = f"transformers.models.{kind.model}.modeling_{kind.model}:{kind.experts}"
    return Case(
        "moe.experts",
        variant,
        "forward+backward" if backward else "forward",
        shape={"T": tokens, **sizes},
        check={"T": min(tokens, 21), "H": 32, "I": 16, "E": 4, "K": 2},
        inputs=partial(_inputs, kind=kind),
        ours=Candidate("layerzoo", partial(_ours, kind=kind, frozen=frozen)),
        reference=Candidate("reference", partial(_reference, kind=kind, frozen=frozen)),
        peers=tuple(
            Candidate(f"transformers {name}", partial(_host, kind=kind, frozen=frozen, implementation=name), needs)
            for name in peers
        ),
        dtypes=(dtype,),
        tokens=("T",),
        cost=partial(_cost, backward=backward, frozen=frozen),
        targets=targets,
    )


def _dense_case(inner: int, backward: bool) -> Case:
    return Case(
        "moe.experts",
        "dense",
        "forward+backward" if backward else "forward",
        shape={"T": 512, "H": 1024, "I": inner, "E": 1, "K": 1},
        check={"T": 21, "H": 32, "I": 16, "E": 1, "K": 1},
        inputs=partial(_inputs, kind=QWEN),
        ours=Candidate("layerzoo", partial(_ours, kind=QWEN, frozen=False)),
        reference=Candidate("reference", partial(_dense, dtype=torch.float64)),
        peers=(Candidate("torch", _dense),),
        dtypes=("float32", "bfloat16"),
        tokens=("T",),
        cost=partial(_cost, backward=backward, frozen=False),
    )


def _at_least(eager: float, grouped: float, batched: float | None = None) -> tuple[Target, ...]:
    figures = {"eager": eager, "grouped_mm": grouped, "batched_mm": batched}
    return tuple(Target(f"x transformers {name}", at_least=figure) for name, figure in figures.items() if figure)


SMALL = {"H": 1024, "I": 512, "E": 64, "K": 8}
FEW = {"H": 1024, "I": 3584, "E": 8, "K": 2}
CASES = (
    _case("fp32-T1", QWEN, 1, SMALL, *_at_least(2.5, 2.5, 2.5)),
    _case("fp32-T32", QWEN, 32, SMALL, *_at_least(4, 4)),
    _case("fp32-T512", QWEN, 512, SMALL, *_at_least(1.9, 1.9)),
    _case("fp32-T512", QWEN, 512, SMALL, *_at_least(50, 2.3), backward=True),
    _case("frozen-T512", QWEN, 512, SMALL, backward=True, frozen=True),
    _case("bf16-T1", QWEN, 1, SMALL, *_at_least(2, 2, 2), dtype="bfloat16"),
    _case("bf16-T32", QWEN, 32, SMALL, *_at_least(4, 4), dtype="bfloat16"),
    _case("bf16-T512", QWEN, 512, SMALL, *_at_least(7, 7), dtype="bfloat16"),
    *(_case(f"gpt-oss-T{tokens}", GPT_OSS, tokens, SMALL | {"E": 32, "K": 4, "I": 1024}) for tokens in (1, 512)),
    _case("gpt-oss-T512", GPT_OSS, 512, SMALL | {"E": 32, "K": 4, "I": 1024}, backward=True),
    *(_case(f"mixtral-T{tokens}", MIXTRAL, tokens, FEW) for tokens in (1, 512)),
    *(_dense_case(SMALL["K"] * SMALL["I"], backward) for backward in (False, True)),
)
