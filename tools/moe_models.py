"""Small random models of every family of the installed transformers with sparse experts, for tests and `make hosts`."""

import functools
import importlib
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from layerzoo.hosts.recipe import DISPATCH

# What a config is told of these, where it has them.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "unpadded_vocab_size": 64,
    "hidden_size": 32,
    "moe_hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What else a family needs to be told.
OPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": LINEAR,
    "beam": {"num_hidden_layers": 4},
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse"]},
    "ernie4_5_vl_moe": {"moe_intermediate_size": [20, 12], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}},
    "flint": {"num_hidden_layers": 4},
    "glm5_next": {"num_hidden_layers": 4, "qk_rope_head_dim": 0},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "hy_v4_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "kimi_linear": LINEAR,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "qwen3_5_moe": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp": LINEAR
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
    | {"indexer_compress_ratio": 4},
    "zaya": {"num_experts_per_tok": 1},
}
KINDS = ("ForCausalLM", "TextModel", "ForTokenClassification")  # which model of a family, the first that there is


@functools.cache
def families() -> tuple[str, ...]:
    """Those of the installed transformers whose experts ask the config for their implementation."""
    root = Path(transformers.__file__).parent / "models"
    files = sorted(root.glob("*/modeling_*.py"))
    return tuple(file.parent.name for file in files if "\n@use_experts_implementation" in file.read_text())


def modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def classes(family: str) -> list[type[nn.Module]]:
    """The classes of experts of a family."""
    return [
        kind
        for kind in _own(family)
        if issubclass(kind, nn.Module) and kind.forward.__globals__.get("__name__") == DISPATCH
    ]


def config_of(family: str) -> Any:
    return _configured(_model_class(family).config_class, OPTIONS.get(family, {}))


def experts_of(kind: type[nn.Module], seed: int = 0) -> Any:
    """A module of experts alone. Its clamps, where there are any, are near enough to be met."""
    config = config_of(kind.__module__.split(".")[2])
    torch.manual_seed(seed)
    sizes = getattr(config, "moe_intermediate_size", None)  # a list is of several modules, one for text, one for images
    experts = kind(config, sizes[0]) if isinstance(sizes, list) else kind(config)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    for name in ("limit", "swiglu_limit"):
        if hasattr(experts, name):
            setattr(experts, name, 2.0)
    return experts.eval()


def model_of(family: str, seed: int = 0) -> Any:
    """With random weights, none at its initial value, so that each counts and no two experts tie."""
    kind = _model_class(family)
    torch.manual_seed(seed)
    model = kind(config_of(family)).eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(3, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def output_of(model: Any) -> Tensor:
    """The logits, or what the model has in their place."""
    out: Tensor = model(tokens())[0]
    return out


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Of a loss that weighs all outputs alike, by the parameters that it depends on."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad(output_of(model).square().mean(), list(named.values()), allow_unused=True)
    return {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def text_of(model: Any) -> Tensor | None:
    """Greedily; None where the model writes none."""
    if not type(model).__name__.endswith("ForCausalLM"):
        return None
    ids = tokens(length=5, seed=2)
    length = {"max_new_tokens": 8, "min_new_tokens": 8}
    text: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
    return text


def _own(family: str) -> list[type]:
    module = modeling(family)
    return [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]


def _model_class(family: str) -> Any:
    models = [kind for kind in _own(family) if issubclass(kind, transformers.PreTrainedModel)]
    return next(kind for end in KINDS for kind in models if kind.__name__.endswith(end))


def _configured(kind: Any, options: dict[str, Any]) -> Any:
    names = kind().to_dict().keys() | kind.attribute_map.keys()
    return kind(**{name: value for name, value in SMALL.items() if name in names} | options)
