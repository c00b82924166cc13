"""Print as Markdown tables whether accelerated transformers models equal untouched ones, and how much faster they are.

A row for each mixer that the installed transformers has of those with a recipe, in a small random model, in float32;
then one for each family with sparse experts, without speeds: experts as small as these say nothing about real ones.
The exit code is 1 where something is not equal.

Usage: python tools/hosts_table.py [FAMILY ...] [--seconds S]
"""

import argparse
import copy
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import moe_models
import torch
import transformers
from torch import Tensor, nn

from layerzoo.bench.markdown import times
from layerzoo.bench.noise import ratio
from layerzoo.bench.runner import interleave
from layerzoo.hosts.recipe import MIXERS, Accelerated
from layerzoo.hosts.surgery import accelerate

PREFILL, DECODE, TRAIN, TEXT = 256, 16, 128, 24  # tokens
COMMON = {"vocab_size": 512, "hidden_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TWO = {"num_hidden_layers": 2}
SHARED = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}  # attention, twice
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 512}
SSD = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 64}
EXPERTS = {"num_experts_per_tok": 1}
# What a small model of a family needs to be told, one mixer at least; a family without an entry is an error.
OPTIONS: Mapping[str, dict[str, Any]] = {
    "mamba": TWO,
    "falcon_mamba": TWO,
    "jamba": TWO | HEADS | EXPERTS | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "zamba": SHARED | HEADS | {"n_mamba_heads": 2},
    "mamba2": TWO | {"num_heads": 8, "head_dim": 64, "n_groups": 1, "state_size": 64},
    "bamba": TWO | HEADS | SSD | {"attn_layer_indices": [1]},
    "granitemoehybrid": TWO
    | HEADS
    | SSD
    | EXPERTS
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "shared_intermediate_size": 512},
    "nemotron_h": HEADS
    | {"layers_block_type": ["mamba", "mlp", "mamba", "attention"], "head_dim": 64, "mamba_num_heads": 8}
    | {"mamba_head_dim": 64, "n_groups": 1, "ssm_state_size": 64},
    "zamba2": SHARED
    | HEADS
    | {"n_mamba_heads": 8, "mamba_headdim": 64, "mamba_ngroups": 1, "mamba_d_state": 64}
    | {"num_mem_blocks": 1, "adapter_rank": 8},
    "falcon_h1": TWO | HEADS | SSD | {"mamba_d_ssm": 512, "head_dim": 64},
}
COLUMNS = ("family", "mixer", "logits", "gradients", "greedy text", "cache", "prefill", "decode", "training")
EXPERTS_COLUMNS = ("family", "model", "experts", "served", "output", "gradients", "greedy text")


def model_of(family: str) -> nn.Module:
    """A small model with random weights. ImportError where the installed transformers does not have the family."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    [kind] = [
        kind
        for name, kind in vars(modeling).items()
        if name.endswith("ForCausalLM") and kind.__module__ == modeling.__name__
    ]
    torch.manual_seed(0)
    return kind(kind.config_class(**COMMON, **OPTIONS[family])).eval()


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, COMMON["vocab_size"], (1, length), generator=torch.Generator().manual_seed(seed))


def cached(output: Any) -> dict[str, Any]:
    """The argument that hands the cache of an output on to the next call."""
    [key] = {"cache", "cache_params", "past_key_values"} & output.keys()
    return {key: output[key]}


def states(output: Any) -> dict[str, Tensor]:
    """Those of the mixers in an output's cache."""
    [cache] = cached(output).values()
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    kinds = ("conv_states", "recurrent_states")
    return {f"{kind} {index}": getattr(layer, kind)[0] for index, layer in enumerate(layers) for kind in kinds}


def prefill(model: Any) -> Any:
    with torch.no_grad():
        return model(tokens(PREFILL), use_cache=True)


def decoder(model: Any) -> Callable[[], Any]:
    """Goes on from the cache: each call starts where the one before ended."""
    cache = cached(prefill(model))

    def call() -> Any:
        with torch.no_grad():
            for token in tokens(DECODE, seed=1).split(1, dim=1):
                output = model(token, **cache, use_cache=True)
        return output

    return call


def trainer(model: Any) -> Callable[[], dict[str, Tensor]]:
    """The gradients of a training step."""
    model, ids = copy.deepcopy(model).train(), tokens(TRAIN, seed=2)
    parameters = dict(model.named_parameters())

    def call() -> dict[str, Tensor]:
        loss = model(ids, labels=ids, use_cache=False).loss
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}

    return call


def text(model: Any) -> Tensor:
    ids = tokens(8, seed=3)
    length = {"max_new_tokens": TEXT, "min_new_tokens": TEXT}
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)


def verdict(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: float, least: float = 0.0) -> str:
    """Whether all are equal, relative in norm, with the worst error. What is smaller than `least` times the largest is
    held to that: routers have gradients that are nothing but rounding.
    """
    if actual.keys() != expected.keys():
        return "not equal (others)"
    floor = max(least * max(float(want.norm()) for want in expected.values()), 1e-30)
    errors = [float((actual[name] - want).norm() / want.norm().clamp_min(floor)) for name, want in expected.items()]
    return f"{'equal' if max(errors) <= allowed else 'not equal'} ({max(errors):.0e})"


def row_of(family: str, seconds: float) -> tuple[str, ...]:
    """The cells of one family; those of speed say how many times as long the untouched model takes."""
    try:
        host = model_of(family)
    except ImportError:
        return (family, MIXERS[family], f"not in transformers {transformers.__version__}", *[""] * (len(COLUMNS) - 3))
    ours = copy.deepcopy(host)
    accelerate(ours, strict=True)
    assert any(isinstance(module, Accelerated) and type(module).__name__ == MIXERS[family] for module in ours.modules())
    models = (ours, host)
    decoders, trainers = ([make(model) for model in models] for make in (decoder, trainer))
    outputs = [(prefill(model), call()) for model, call in zip(models, decoders, strict=True)]
    logits = [{"prefill": first.logits, "decode": last.logits} for first, last in outputs]
    caches = [states(last) for _, last in outputs]
    verdicts = [
        verdict(*logits, 1e-5),
        verdict(*(call() for call in trainers), 5e-5),
        "equal" if torch.equal(*map(text, models)) else "not equal",
        verdict(*caches, 1e-5),  # before the timing, which moves them on
    ]
    speeds = []
    for calls in ([lambda model=model: prefill(model) for model in models], decoders, trainers):
        samples: list[list[float]] = [[], []]
        interleave(calls, samples, seconds=seconds, rounds=(3, 20))
        speeds.append(times(ratio(samples[1], samples[0]).median))
    return (family, MIXERS[family], *verdicts, *speeds)


def experts_row_of(family: str) -> tuple[str, ...]:
    """The cells of one family with sparse experts: by `accelerate` where that serves any, else by name."""
    host = moe_models.model_of(family)
    ours, kinds = copy.deepcopy(host), moe_models.classes(family)
    accelerate(ours, verify=True)
    served = sum(isinstance(module, Accelerated) and type(module).host in kinds for module in ours.modules())
    if not served:
        ours.set_experts_implementation("layerzoo")
    models = (ours, host)
    outputs = [{"output": moe_models.output_of(model).detach()} for model in models]
    texts = [moe_models.text_of(model) for model in models]
    return (
        family,
        type(host).__name__,
        ", ".join(dict.fromkeys(type(module).__name__ for module in host.modules() if type(module) in kinds)),
        f"accelerated ({served})" if served else "by name, as grouped_mm",
        verdict(*outputs, 1e-5),
        verdict(*map(moe_models.gradients_of, models), 5e-5, least=1e-3),
        "" if None in texts else "equal" if torch.equal(*texts) else "not equal",
    )


def show(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> int:
    """Prints a table row by row; how many rows have something that is not equal."""
    wrong = 0
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        wrong += any(cell.startswith("not equal") for cell in row)
        print(f"| {' | '.join(row)} |", flush=True)
    print()
    return wrong


def main(families: list[str], seconds: float) -> int:
    transformers.logging.set_verbosity_error()  # it warns about each kernel that it does not have
    wrong = 0
    if mixers := [family for family in families or MIXERS if family in MIXERS]:
        wrong += show(COLUMNS, (row_of(family, seconds) for family in mixers))
        print(f"Batch 1, hidden 256; {PREFILL} tokens of prefill, {DECODE} decoded, {TRAIN} of training.\n")
    if experts := [family for family in families or moe_models.families() if family in moe_models.families()]:
        wrong += show(EXPERTS_COLUMNS, map(experts_row_of, experts))
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, float32.")
    return int(wrong > 0)


if __name__ == "__main__":
    known = sorted({*MIXERS, *moe_models.families()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(known))
    parser.add_argument("--seconds", type=float, default=3.0, help="for each speed-up")
    arguments = parser.parse_args()
    if unknown := set(arguments.families).difference(known):
        parser.error(f"FAMILY must be one of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    sys.exit(main(arguments.families, arguments.seconds))
