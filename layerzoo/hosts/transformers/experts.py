"""Sparse experts of transformers on `moe_experts`: the implementation "layerzoo", and the recipes for `accelerate`.

transformers (from 5.0 on) keeps the experts of a layer in one module and looks up by a name in the model's config which
function computes them. Importing this module adds ours to the functions that can be named, for the whole process, and
changes no model: it runs where somebody asks for it, with

    import layerzoo.hosts.transformers.experts
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="layerzoo")

or `model.set_experts_implementation("layerzoo")`. The name then stands in the config, which other models may share, and
the host's rules hold. `layerzoo.accelerate(model)` needs no name and writes to no config: it gives each module of
experts in this one model another class, and `restore` undoes that.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from layerzoo.hosts.recipe import Accelerated, has_kernel, is_recipe, qualified
from layerzoo.ops import moe_experts
from layerzoo.ops._checks import FLOATING
from layerzoo.ops.moe.experts import Activation

NAME = "layerzoo"


class Gate(NamedTuple):
    """What stands between the two matrices, in the words of `moe_experts`."""

    activation: Activation
    interleaved: bool = False
    alpha: float | None = None
    limit: float | None = None


class OwnGate(NamedTuple):
    """A gate that is not the host's default: which attributes hold its numbers. Without an `act_fn` it is of silu."""

    alpha: str = ""
    limit: str = ""
    interleaved: bool = False


# By the class that defines the gate. Each was read, and the tests compare each with the host's.
OWN_GATES = {
    "transformers.models.beam.modeling_beam.BeamExperts": OwnGate(),  # the default in float32, as ours always is
    "transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts": OwnGate(limit="limit"),
    "transformers.models.glm5_next.modeling_glm5_next.Glm5NextTextExperts": OwnGate(limit="swiglu_limit"),
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts": OwnGate("alpha", "limit", True),
    "transformers.models.hy_v4.modeling_hy_v4.HYV4Experts": OwnGate(limit="swiglu_limit"),
    "transformers.models.hy_v4_vl.modeling_hy_v4_vl.HYV4VLExperts": OwnGate(limit="swiglu_limit"),
    "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts": OwnGate(
        "swiglu_alpha", "swiglu_limit"
    ),
    "transformers.models.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts": OwnGate(
        "alpha", "limit"
    ),
}
# The host's names of what we have. By the class that stands behind the name, since that is what a module holds.
NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
ACTIVATIONS: dict[Any, Activation] = {type(ACT2FN[name]): ours for name, ours in NAMES.items() if name in ACT2FN}
ACTIVATIONS |= {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}


def has_gate(experts: Any) -> bool:
    return bool(getattr(experts, "has_gate", True))  # transformers 5.0 knows no experts without one


def gate_of(experts: Any) -> Gate | None:
    """What `moe_experts` calls the gate of a module of experts; None where it has no name for it."""
    own = OwnGate()
    if has_gate(experts):
        function = type(experts)._apply_gate
        if function is not _default_apply_gate:
            name = f"{function.__module__}.{function.__qualname__}".removesuffix("._apply_gate")
            if name not in OWN_GATES:
                return None
            own = OWN_GATES[name]
        if own.interleaved == getattr(experts, "is_concatenated", not own.interleaved):
            return None
    act_fn = getattr(experts, "act_fn", F.silu)
    activation = ACTIVATIONS.get(type(act_fn) if isinstance(act_fn, nn.Module) else act_fn)
    if activation is None:
        return None
    alpha, limit = (float(getattr(experts, name)) if name else None for name in (own.alpha, own.limit))
    return Gate(activation, own.interleaved, alpha, limit)


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Computes a module of experts of transformers with `moe_experts`: what the name "layerzoo" stands for.

    An id equal to `num_experts` drops its pair: with experts on several machines these are the ones elsewhere. The
    parameters are read from the module on every call. Sums are in float32 whatever the dtypes, under autocast too. A
    gate or an activation that `moe_experts` does not have runs as the host's "grouped_mm".

    Args:
        self: a module of a class decorated with the host's `use_experts_implementation`.
        hidden_states: (tokens, H). top_k_index: (tokens, k). top_k_weights: (tokens, k), any floating dtype.

    Returns:
        (tokens, H) in the dtype of hidden_states. Differentiable by hidden_states, top_k_weights and the parameters.

    Raises:
        TypeError, ValueError: what `moe_experts` raises, e.g. for quantised weights.
    """
    out: Tensor
    gate = gate_of(self)
    if gate is None:
        # The host would read beside its weights for dropped ids, and leave garbage in their place.
        dropped = top_k_index >= self.num_experts
        ids, weights = top_k_index.masked_fill(dropped, 0), top_k_weights.masked_fill(dropped, 0)
        out = ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, ids, weights)
        return out
    gated = has_gate(self)
    experts: Callable[..., Tensor] = functools.partial(
        moe_experts,
        w13=self.gate_up_proj if gated else self.up_proj,
        w2=self.down_proj,
        b13=(self.gate_up_proj_bias if gated else self.up_proj_bias) if self.has_bias else None,
        b2=self.down_proj_bias if self.has_bias else None,
        gated=gated,
        transposed=self.is_transposed,
        **gate._asdict(),
    )
    if not getattr(self, "has_post_expert_norm", False):
        return experts(hidden_states, top_k_index, top_k_weights)
    # Each pair as a token of its own, since what one expert gives is normalised before it is weighted.
    (tokens, k), width = top_k_index.shape, hidden_states.shape[1]
    one_each = torch.ones_like(top_k_weights).view(-1, 1)
    y = experts(hidden_states.repeat_interleave(k, 0), top_k_index.reshape(-1, 1), one_each)
    weights = top_k_weights.masked_fill(top_k_index >= self.num_experts, 0)
    y = self.post_expert_norm(y).view(tokens, k, width) * weights.unsqueeze(-1)
    out = y.sum(1).to(hidden_states.dtype)
    return out


class Experts(Accelerated):
    """Experts of transformers on our kernels, whatever implementation the config names: see `experts_forward`.

    Refused where the host would run in part anyway: a gate or an activation that `moe_experts` does not have.
    """

    @classmethod
    def refusal(cls, module: Any) -> str:
        if parametrize.is_parametrized(module):
            return "it has parametrizations; accelerate before they are registered"
        if gate_of(module) is None:
            gate = type(module)._apply_gate
            return f"moe_experts has no such gate: {gate.__qualname__} of {getattr(module, 'act_fn', None)}"
        for name in ("gate_up_proj" if has_gate(module) else "up_proj", "down_proj"):
            if type(weight := module.get_parameter(name)) is not nn.Parameter or weight.dtype not in FLOATING:
                return f"{name} must be a plain floating-point parameter, got {type(weight).__name__} of {weight.dtype}"
        device = weight.device.type
        if device not in ("cpu", "meta") and not has_kernel("moe_experts", device):
            return f"layerzoo has no kernel of moe_experts for {device} here, so the host is faster"
        return ""

    @classmethod
    def probe(cls, module: Any) -> tuple[Tensor, ...]:
        down, generator = module.down_proj, torch.Generator().manual_seed(0)
        experts, k = down.shape[0], min(2, down.shape[0])
        x = torch.randn(5, down.shape[2 if module.is_transposed else 1], generator=generator)
        scores = torch.rand(5, experts, generator=generator)
        weights, ids = (t.to(down.device) for t in scores.topk(k))
        return x.to(down.device, down.dtype), ids, weights.to(down.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the host's class, since the recipe is made for it and stands in no module under its name."""
        reduced: Any = super().__reduce_ex__(protocol)
        if not is_recipe(type(self)):
            return reduced
        return _empty, (type(self).host,), *reduced[2:]


@functools.cache
def recipe_for(host: type[nn.Module]) -> type[Experts]:
    """The recipe for a class of experts, which is one and the same for all models."""
    names = list(inspect.signature(host.forward).parameters)[1:]

    @functools.wraps(host.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return experts_forward(self, *args, *(kwargs[name] for name in names[len(args) :]))

    contents = {"__module__": __name__, "__doc__": f"{qualified(host)} on layerzoo.", "host": host, "forward": forward}
    return type(host.__name__, (Experts, host), contents)


def _empty(host: Any) -> nn.Module:
    recipe = recipe_for(host)
    return recipe.__new__(recipe)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
