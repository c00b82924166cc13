"""The recipes for transformers' other Mamba mixers, on tiny random models, against the untouched host."""

import ast
import copy
import importlib
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from layerzoo import _native
from layerzoo.hosts.recipe import MIXERS, RECIPES, Accelerated, qualified
from layerzoo.hosts.surgery import accelerate, restore

transformers = pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h", reason="an older transformers is installed")

from test_transformers import assert_close, tokens  # noqa: E402  after the skip

HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16, "num_hidden_layers": 3}
SSD = {"mamba_n_heads": 6, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 5, "mamba_chunk_size": 4}
MAMBA2 = {"state_size": 5, "num_heads": 6, "head_dim": 8, "chunk_size": 4, "num_hidden_layers": 3}
FALCON_H1 = {"head_dim": 12, "mamba_d_ssm": 48, "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9], "ssm_in_multiplier": 1.3}
ONE_HEAD = {"mamba_d_state": 5, "mamba_dt_rank": 4}
EXPERTS = {"num_experts_per_tok": 1}
ZAMBA_LAYERS = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}
# the family, its prefix of class names, how many mixers, and the options of a tiny model in which each part counts
MODELS = {
    "mamba2": ("mamba2", "Mamba2", 3, MAMBA2 | {"n_groups": 2}),
    "mamba2-limit": (
        "mamba2",
        "Mamba2",
        3,
        MAMBA2 | {"n_groups": 1, "use_bias": True, "use_conv_bias": False, "time_step_limit": [0.4, 0.9]},
    ),
    "bamba": ("bamba", "Bamba", 2, HEADS | SSD | {"attn_layer_indices": [1], "mamba_proj_bias": True}),
    "zamba2": (
        "zamba2",
        "Zamba2",
        4,
        HEADS
        | ZAMBA_LAYERS
        | {"n_mamba_heads": 6, "mamba_headdim": 8, "mamba_ngroups": 2, "mamba_d_state": 5, "chunk_size": 4}
        | {"time_step_min": 0.6, "num_mem_blocks": 1, "adapter_rank": 4},
    ),
    "nemotron_h": (
        "nemotron_h",
        "NemotronH",
        3,
        {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16, "head_dim": 12}
        | {"layers_block_type": ["mamba", "mlp", "mamba", "attention", "mamba"], "mamba_num_heads": 6}
        | {"mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 5, "chunk_size": 4, "time_step_min": 0.6},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        "GraniteMoeHybrid",
        2,
        HEADS
        | SSD
        | EXPERTS
        | {"shared_intermediate_size": 16, "num_local_experts": 2, "layer_types": ["mamba", "attention", "mamba"]},
    ),
    "falcon_h1": ("falcon_h1", "FalconH1", 3, HEADS | SSD | FALCON_H1),
    "falcon_h1-norm": ("falcon_h1", "FalconH1", 3, HEADS | SSD | FALCON_H1 | {"mamba_rms_norm": True}),
    "falcon_h1-norm-last": (
        "falcon_h1",
        "FalconH1",
        3,
        HEADS | SSD | FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "falcon_mamba": ("falcon_mamba", "FalconMamba", 3, {"state_size": 5, "num_hidden_layers": 3, "time_step_rank": 4}),
    "jamba": (
        "jamba",
        "Jamba",
        2,
        HEADS
        | ONE_HEAD
        | EXPERTS
        | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 2, "mamba_proj_bias": True},
    ),
    "zamba": ("zamba", "Zamba", 4, HEADS | ZAMBA_LAYERS | ONE_HEAD | {"n_mamba_heads": 2}),
}
ONE_OF_A_KIND = ["mamba2", "zamba"]
NEW = [family for family in MIXERS if family != "mamba"]


def tiny(name: str) -> nn.Module:
    """No parameter at its initial value, so that each of them counts."""
    _, prefix, _, options = MODELS[name]
    torch.manual_seed(0)
    common = {"vocab_size": 61, "hidden_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{prefix}Config")(**common, **options)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def mixers(model: nn.Module) -> list[nn.Module]:
    """The Mamba mixers of a model, accelerated or not."""
    return [module for module in model.modules() if RECIPES.keys() & set(map(qualified, type(module).__mro__))]


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The host, and the same model accelerated."""
    host = tiny(name)
    ours = copy.deepcopy(host)
    accelerate(ours, strict=True)
    assert len(mixers(ours)) == MODELS[name][2]
    assert all(isinstance(mixer, Accelerated) for mixer in mixers(ours))
    return host, ours


def cached(output) -> dict:
    """The argument that hands the cache of an output on to the next call."""
    [key] = [key for key in output if key in ("cache", "cache_params", "past_key_values")]
    return {key: output[key]}


def states(output) -> list[torch.Tensor]:
    """The states of the mixers in an output's cache."""
    [cache] = cached(output).values()
    layers = [layer for layer in cache.layers if hasattr(layer, "recurrent_states")]
    return [kind[0] for layer in layers for kind in (layer.conv_states, layer.recurrent_states)]


def assert_same_cache(ours, host, tolerance: float = 1e-5) -> None:
    for index, (mine, theirs) in enumerate(zip(states(ours), states(host), strict=True)):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert_close(mine, theirs, tolerance, f"state {index}")


SCANS = {"selective_scan_fn", "mamba_chunk_scan_combined", "selective_state_update"}


def names(node: ast.AST) -> set[str]:
    """Every identifier and every string constant inside."""
    inside = (getattr(leaf, kind, None) for leaf in ast.walk(node) for kind in ("id", "attr", "value"))
    return {name for name in inside if isinstance(name, str)}


def callers_of_scans(path: Path) -> set[str]:
    """The classes of a modelling file that call a scan, by its name or by that of the function which it decorates."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    scans = SCANS | {node.name for node in functions if any(names(mark) & SCANS for mark in node.decorator_list)}
    return {node.name for node in tree.body if isinstance(node, ast.ClassDef) and names(node) & scans}


def test_every_mixer_of_the_host_is_served():
    """Whatever in the installed transformers calls a scan of Mamba's or Mamba-2's kind has a recipe."""
    named = re.compile("|".join([*SCANS, "selective_scan", "chunk_scan"]))
    found = {
        f"transformers.models.{path.parent.name}.{path.stem}.{name}"
        for path in Path(transformers.__file__).parent.rglob("modeling_*.py")
        if named.search(path.read_text(encoding="utf-8"))
        for name in callers_of_scans(path)
    }
    assert found == set(RECIPES)


def test_there_is_a_model_of_every_family():
    assert {family for family, *_ in MODELS.values()} == set(NEW)


class TestSameAsTheHost:
    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("length", [1, 3, 11])
    @torch.no_grad()
    def test_prefill_and_decode(self, name, length):
        host, ours = pair(name)
        ids = tokens(length=length)
        expected, actual = host(ids, use_cache=True), ours(ids, use_cache=True)
        assert_close(actual.logits, expected.logits)
        assert_same_cache(actual, expected)
        before = states(actual)
        for step in range(3):
            token = tokens(length=1, seed=step)
            expected = host(token, **cached(expected))
            actual = ours(token, **cached(actual))
            assert_close(actual.logits, expected.logits)
            assert_same_cache(actual, expected)
        after = states(actual)
        assert all(one is other for one, other in zip(before, after, strict=True)), "states must be written in place"

    @pytest.mark.parametrize("name", MODELS)
    def test_training(self, name):
        host, ours = pair(name)
        ids = tokens()
        losses = []
        for model in (host, ours):
            model.train()
            loss = model(ids, labels=ids, use_cache=False).loss
            loss.backward()
            losses.append(loss.detach())
        assert_close(losses[1], losses[0])
        for (key, mine), theirs in zip(ours.named_parameters(), host.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), key
            if mine.grad is not None:
                assert_close(mine.grad, theirs.grad, 5e-5, key)
        for mixer in mixers(ours):
            assert all(parameter.grad is not None for parameter in mixer.parameters())

    @pytest.mark.parametrize("name", ONE_OF_A_KIND)
    def test_gradient_checkpointing(self, name):
        host, ours = pair(name)
        for model in (host, ours):
            model.train()
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            model(tokens(), labels=tokens(), use_cache=False).loss.backward()
        for (key, mine), theirs in zip(ours.named_parameters(), host.named_parameters(), strict=True):
            assert_close(mine.grad, theirs[1].grad, 5e-5, key)

    @pytest.mark.parametrize("name", NEW)
    def test_generate(self, name):
        host, ours = pair(name)
        ids = tokens(length=6)
        mask = torch.ones_like(ids)
        mask[1, :2] = 0  # left padding
        arguments = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        assert torch.equal(ours.generate(ids, **arguments), host.generate(ids, **arguments))

    @pytest.mark.parametrize("name", NEW)
    @torch.no_grad()
    def test_left_padding(self, name):
        host, ours = pair(name)
        ids = tokens()
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        expected, actual = (model(ids, attention_mask=mask, use_cache=True) for model in (host, ours))
        seen = mask.bool()
        assert_close(actual.logits[seen], expected.logits[seen])
        assert_same_cache(actual, expected)
        longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        theirs = longer[:, -1:] if name == "falcon_mamba" else longer  # which does not cut it
        expected = host(ids[:, :1], attention_mask=theirs, **cached(expected))
        actual = ours(ids[:, :1], attention_mask=longer, **cached(actual))
        assert_close(actual.logits, expected.logits)

    @pytest.mark.parametrize("name", MODELS)
    @torch.no_grad()
    def test_low_precision(self, name):
        """Of the mixer itself: what else is in the models rounds more than it does."""
        host, ours = (mixers(model)[1] for model in pair(name))
        hidden = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(2))
        exact = host(hidden)
        low = ours.to(torch.bfloat16)(hidden.bfloat16())
        assert low.dtype == torch.bfloat16
        assert_close(low.float(), exact, 3e-2)

    @pytest.mark.parametrize("name", NEW)
    @torch.no_grad()
    def test_low_precision_with_a_cache(self, name):
        host, ours = (model.bfloat16() for model in pair(name))
        theirs, mine = host(tokens(), use_cache=True), ours(tokens(), use_cache=True)
        assert mine.logits.dtype == theirs.logits.dtype
        assert_close(mine.logits, theirs.logits, 6e-2)
        assert_same_cache(mine, theirs, 6e-2)
        token = tokens(length=1)
        mine, theirs = ours(token, **cached(mine)), host(token, **cached(theirs))
        assert_close(mine.logits, theirs.logits, 6e-2)

    @pytest.mark.parametrize("name", NEW)
    def test_autocast(self, name):
        host, ours = pair(name)
        exact = host(tokens(), use_cache=False).logits
        with torch.autocast("cpu", torch.bfloat16):
            actual = ours(tokens(), use_cache=False).logits
            with torch.no_grad():
                output = ours(tokens(), use_cache=True)
                ours(tokens(length=1), **cached(output))
        assert_close(actual.float(), exact, 5e-2)
        actual.float().sum().backward()
        for mixer in mixers(ours):
            assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters())

    @pytest.mark.parametrize("name", NEW)
    @torch.no_grad()
    def test_a_cache_that_the_host_began(self, name):
        host, ours = pair(name)
        output, token = host(tokens(), use_cache=True), tokens(length=1)
        expected = host(token, **copy.deepcopy(cached(output))).logits
        assert_close(ours(token, **cached(output)).logits, expected)

    @pytest.mark.parametrize("name", ONE_OF_A_KIND)
    @torch.no_grad()
    def test_recorded_past(self, name):
        caches = []
        for model in pair(name):
            output = model(tokens(), use_cache=True)
            [cache] = cached(output).values()
            for layer in cache.layers:
                if hasattr(layer, "recurrent_states"):
                    layer.activate_past_recording()
            for step in range(2):
                output = model(tokens(length=1, seed=step), **cached(output))
            caches.append(output)
        assert states(caches[1])[0].shape[-1] == 4 + 2
        assert_same_cache(caches[1], caches[0])
        assert_close(caches[1].logits, caches[0].logits)


class TestBeyondTheHost:
    @pytest.mark.parametrize("name", MODELS)
    @torch.no_grad()
    def test_chunked_prefill_is_one_shot(self, name):
        host, ours = pair(name)
        ids = tokens()
        expected = host(ids, use_cache=True)
        cache, logits = {}, []
        for part, places in zip(ids.tensor_split((5, 8), dim=1), torch.arange(11).tensor_split((5, 8)), strict=True):
            places = {"position_ids": places.unsqueeze(0)} if name == "bamba" else {}  # which would count from 0 again
            output = ours(part, **cache, **places, use_cache=True)
            cache = cached(output)
            logits.append(output.logits)
        assert_close(torch.cat(logits, 1), expected.logits)
        assert_same_cache(output, expected)

    @pytest.mark.parametrize("name", ["mamba2", "falcon_h1-norm", "falcon_mamba", "zamba"])
    @pytest.mark.parametrize("cut", [10, 6])
    def test_gradients_through_the_cache(self, name, cut):
        host, ours = pair(name)
        ids = tokens()
        host(ids).logits.square().sum().backward()
        first = ours(ids[:, :cut], use_cache=True)
        second = ours(ids[:, cut:], **cached(first))
        torch.cat([first.logits, second.logits], 1).square().sum().backward()
        for (key, mine), theirs in zip(ours.named_parameters(), host.parameters(), strict=True):
            assert_close(mine.grad, theirs.grad, 5e-5, key)

    @pytest.mark.parametrize("name", MODELS)
    @torch.no_grad()
    def test_rows_padded_on_the_left_equal_those_without_padding(self, name):
        """A bias of in_proj would reach the first tokens through the convolution, in the host too."""
        ours = pair(name)[1]
        for mixer in mixers(ours):
            if mixer.in_proj.bias is not None:
                mixer.in_proj.bias.zero_()
        sizes, ids = (11, 7, 2), tokens(batch=3)
        mask = torch.stack([torch.arange(11) >= 11 - size for size in sizes]).long()

        def run(ids, mask, cache):
            """With the places that `generate` would give."""
            arguments = {"attention_mask": mask, "use_cache": True, **cache}
            if "position_ids" in inspect.signature(ours.forward).parameters:
                places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
                arguments["position_ids"] = places
            return ours(ids, **arguments)

        output = run(ids, mask, {})
        parts = [(slice(row, row + 1), slice(11 - size, None)) for row, size in enumerate(sizes)]
        alone = [run(ids[part], mask[part], {}) for part in parts]
        for row, size in enumerate(sizes):
            assert_close(output.logits[row, 11 - size :], alone[row].logits[0], 2e-5, f"row of {size}")
        for step in range(3):
            token, mask = tokens(batch=3, length=1, seed=step), torch.cat([mask, torch.ones(3, 1).long()], 1)
            output = run(token, mask, cached(output))
            for row, size in enumerate(sizes):
                alone[row] = run(token[row : row + 1], mask[parts[row]], cached(alone[row]))
                assert_close(output.logits[row], alone[row].logits[0], 2e-5, f"row of {size}, step {step}")
        for index, state in enumerate(states(output)):
            assert_close(state, torch.cat([states(one)[index] for one in alone]), 2e-5, f"state {index}")

    @pytest.mark.parametrize("name", NEW)
    @torch.no_grad()
    def test_a_cache_of_another_batch_is_refused(self, name):
        ours = pair(name)[1]
        output = ours(tokens(), use_cache=True)
        mixer, hidden = mixers(ours)[0], torch.randn(3, 1, 24)
        [cache] = cached(output).values()
        before = [state.clone() for state in states(output)]
        for length in (1, 2):
            with pytest.raises(ValueError, match=r"(conv_state|initial_states) must have shape \(.*\) = \(3, "):
                mixer(hidden.expand(-1, length, -1), cache)
        assert all(map(torch.equal, states(output), before))

    @pytest.mark.parametrize("name", MODELS)
    def test_packed_sequences(self, name):
        mixer = mixers(pair(name)[1])[0]
        hidden = torch.randn(1, 10, 24)
        packed = mixer(hidden, seq_idx=torch.tensor([[0] * 3 + [1] * 7], dtype=torch.int32))
        assert_close(packed, torch.cat([mixer(hidden[:, :3]), mixer(hidden[:, 3:])], 1))
        with pytest.raises(ValueError, match=f"{type(mixer).__name__}: cu_seqlens must be None"):
            mixer(hidden, cu_seqlens=torch.tensor([0, 3, 10]))


class TestReach:
    @pytest.mark.parametrize("name", NEW)
    def test_restore(self, name):
        model = tiny(name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        classes = [type(module) for module in model.modules()]
        expected = model(tokens()).logits
        assert accelerate(model, strict=True, verify=True)
        assert list(model.state_dict()) == list(before)
        restore(model)
        assert [type(module) for module in model.modules()] == classes
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(model(tokens()).logits, expected)

    @pytest.mark.parametrize("name", NEW)
    def test_save_and_load(self, name, tmp_path):
        host, ours = pair(name)
        ours.save_pretrained(tmp_path)
        loaded = type(host).from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens()).logits, host(tokens()).logits)
        assert "layerzoo" not in (tmp_path / "config.json").read_text()

    @pytest.mark.parametrize("name", NEW)
    @torch.no_grad()
    def test_the_kernels_ran(self, name):
        if not _native.status().loaded:
            pytest.skip(f"no native library: {_native.status().reason}")
        model = pair(name)[1]
        [scan] = {type(mixer).op for mixer in mixers(model)}
        before = [_native.calls(op) for op in (scan, "causal_conv1d", "causal_conv1d_update")]
        output = model(tokens(), use_cache=True)
        model(tokens(length=1), **cached(output))
        after = [_native.calls(op) for op in (scan, "causal_conv1d", "causal_conv1d_update")]
        calls = MODELS[name][2]
        assert after[0] - before[0] >= calls
        assert [now - then for now, then in zip(after[1:], before[1:], strict=True)] == [calls, calls]

    @pytest.mark.parametrize("name", ONE_OF_A_KIND)
    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, name, again):
        model = pair(name)[1]
        twin = again(model)
        assert [type(mixer) for mixer in mixers(twin)] == [type(mixer) for mixer in mixers(model)]
        assert torch.equal(twin(tokens()).logits, model(tokens()).logits)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [*ONE_OF_A_KIND, "falcon_h1"])
    def test_compile(self, name):
        torch._dynamo.reset()
        mixer = mixers(pair(name)[1])[0]
        hidden = torch.randn(2, 7, 24)
        expected, actual = mixer(hidden), torch.compile(mixer, fullgraph=True, backend="aot_eager")(hidden)
        assert_close(actual, expected)
        results = (torch.autograd.grad(out.square().sum(), list(mixer.parameters())) for out in (actual, expected))
        for (key, _), mine, theirs in zip(mixer.named_parameters(), *results, strict=True):
            assert_close(mine, theirs, what=key)


class TestRefusals:
    @pytest.mark.parametrize("name", NEW)
    def test_activation(self, name):
        model = tiny(name)
        mixers(model)[0].activation = "gelu"
        [refused] = [entry.reason for entry in accelerate(model) if entry.action == "refused"]
        assert refused == "its activation must be silu or swish, got gelu"

    @pytest.mark.parametrize("name", NEW)
    def test_weights_that_are_not_plain(self, name):
        for path in type(mixers(pair(name)[1])[0]).parameters_used:
            model = tiny(name)
            owner, _, leaf = path.rpartition(".")
            module = mixers(model)[0].get_submodule(owner)
            setattr(module, leaf, nn.Parameter(getattr(module, leaf).to(torch.complex64)))
            [refused] = [entry.reason for entry in accelerate(model) if entry.action == "refused"]
            assert refused == f"{path} must be a plain floating-point parameter, got Parameter of torch.complex64"
        model = tiny(name)
        nn.utils.parametrize.register_parametrization(mixers(model)[0].conv1d, "weight", nn.Identity())
        [refused] = [entry.reason for entry in accelerate(model) if entry.action == "refused"]
        assert refused.startswith("conv1d must be a plain Conv1d")

    @pytest.mark.parametrize("name", NEW)
    def test_changed_host(self, name, monkeypatch):
        def forward(self, hidden_states, cache=None, another=None):
            raise NotImplementedError

        model = tiny(name)
        monkeypatch.setattr(type(mixers(model)[0]), "forward", forward)
        reasons = [entry.reason for entry in accelerate(model) if entry.action == "refused"]
        assert len(reasons) == MODELS[name][2]
        assert "the installed one is forward(self, hidden_states, cache, another)" in reasons[0]

    @pytest.mark.parametrize("name", ONE_OF_A_KIND)
    def test_another_result_on_the_probe(self, name, monkeypatch):
        model = tiny(name)
        host = type(mixers(model)[0])
        theirs = host.forward
        monkeypatch.setattr(host, "forward", lambda *args, **kwargs: 1.1 * theirs(*args, **kwargs))
        monkeypatch.setattr(importlib.import_module("layerzoo.hosts.recipe"), "_changed", lambda recipe: "")
        reasons = [entry.reason for entry in accelerate(model, verify=True) if entry.action == "refused"]
        assert len(reasons) == MODELS[name][2]
        assert all("on a probe its output differs by 9.1e-02" in reason for reason in reasons)
