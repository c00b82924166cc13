"""The recipe for transformers' Mamba, on tiny random models, against the untouched host."""

import copy
import inspect
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from layerzoo import _native
from layerzoo.hosts.surgery import accelerate, accelerated, restore
from layerzoo.ops import linear as ops_linear

transformers = pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
modeling_mamba = pytest.importorskip("transformers.models.mamba.modeling_mamba")

from layerzoo.hosts.transformers.mamba import CACHE, MambaMixer  # noqa: E402  after the skip

VARIANTS = {
    "default": {},
    "bias": {"use_bias": True, "use_conv_bias": False},
    "swish": {"hidden_act": "swish", "conv_kernel": 3, "state_size": 3, "time_step_rank": 1},
    "kernel2": {"conv_kernel": 2, "expand": 1, "residual_in_fp32": False},
}


def tiny(seed: int = 0, **config) -> nn.Module:
    """Three layers; no parameter at its initial value, so that each of them counts."""
    torch.manual_seed(seed)
    defaults = {"vocab_size": 61, "hidden_size": 24, "state_size": 5, "num_hidden_layers": 3, "time_step_rank": 4}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**defaults | config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def mixers(report) -> int:
    return sum(entry.new.endswith("MambaMixer") for entry in report)


def pair(**config) -> tuple[nn.Module, nn.Module]:
    """The host, and the same model accelerated."""
    host = tiny(**config)
    ours = copy.deepcopy(host)
    assert mixers(accelerate(ours, strict=True)) == 3
    return host, ours


def cached(output) -> dict:
    """The argument that hands the cache of an output on to the next call."""
    return {CACHE: output[CACHE]}


def tokens(batch: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected, tolerance: float = 1e-5, what: str = "") -> None:
    error = float((actual - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))
    assert error <= tolerance, f"{what}: {error:.1e} relative, allowed {tolerance:.0e}"


def assert_same_cache(ours, host, tolerance: float = 1e-5) -> None:
    for index, (mine, theirs) in enumerate(zip(ours.layers, host.layers, strict=True)):
        for kind in ("conv_states", "recurrent_states"):
            actual, expected = getattr(mine, kind)[0], getattr(theirs, kind)[0]
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            assert_close(actual, expected, tolerance, f"layer {index} {kind}")


class TestSameAsTheHost:
    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("length", [1, 2, 11])
    @torch.no_grad()
    def test_prefill_and_decode(self, variant, length):
        host, ours = pair(**VARIANTS[variant])
        ids = tokens(length=length)
        expected, actual = host(ids), ours(ids)
        assert_close(actual.logits, expected.logits)
        assert_same_cache(actual[CACHE], expected[CACHE])
        states = [layer.conv_states[0] for layer in actual[CACHE].layers]
        states += [layer.recurrent_states[0] for layer in actual[CACHE].layers]
        for step in range(3):
            token = tokens(length=1, seed=step)
            expected = host(token, **cached(expected))
            actual = ours(token, **cached(actual))
            assert_close(actual.logits, expected.logits)
            assert_same_cache(actual[CACHE], expected[CACHE])
        after = [layer.conv_states[0] for layer in actual[CACHE].layers]
        after += [layer.recurrent_states[0] for layer in actual[CACHE].layers]
        assert all(one is other for one, other in zip(states, after, strict=True)), "states must be written in place"

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_training(self, variant, checkpointing):
        host, ours = pair(**VARIANTS[variant])
        ids = tokens()
        losses = []
        for model in (host, ours):
            model.train()
            if checkpointing:
                # the older name warns from transformers 5.2x on
                enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
            loss = model(ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
        assert_close(losses[1], losses[0])
        for (name, mine), theirs in zip(ours.named_parameters(), host.parameters(), strict=True):
            assert_close(mine.grad, theirs.grad, 3e-5, name)

    @pytest.mark.parametrize("arguments", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
    def test_generate(self, arguments):
        host, ours = pair()
        ids = tokens(length=6)
        mask = torch.ones_like(ids)
        mask[1, :2] = 0  # left padding
        arguments |= {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(ours.generate(ids, **arguments), host.generate(ids, **arguments))

    @torch.no_grad()
    def test_left_padding(self):
        host, ours = pair(use_bias=True)
        ids = tokens()
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        expected, actual = host(ids, attention_mask=mask), ours(ids, attention_mask=mask)
        assert_close(actual.logits, expected.logits)
        assert_same_cache(actual[CACHE], expected[CACHE])
        one = torch.ones(2, 1)
        expected = host(ids[:, :1], attention_mask=one, **cached(expected))
        actual = ours(ids[:, :1], attention_mask=torch.cat([mask, one], 1), **cached(actual))
        assert_close(actual.logits, expected.logits)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
    @torch.no_grad()
    def test_low_precision(self, dtype, tolerance):
        host, ours = pair()
        exact = host(tokens())
        host.to(dtype), ours.to(dtype)
        theirs, mine = host(tokens()), ours(tokens())
        assert mine.logits.dtype == theirs.logits.dtype
        assert_close(mine.logits, exact.logits, tolerance)
        assert_same_cache(mine[CACHE], theirs[CACHE], 2 * tolerance)
        token = tokens(length=1)
        mine, theirs = ours(token, **cached(mine)), host(token, **cached(theirs))
        assert_close(mine.logits, theirs.logits, 2 * tolerance)

    def test_autocast(self):
        host, ours = pair()
        exact = host(tokens()).logits
        with torch.autocast("cpu", torch.bfloat16):
            actual = ours(tokens(), use_cache=False).logits
            with torch.no_grad():
                output = ours(tokens())
                output = ours(tokens(length=1), **cached(output))
                expected = host(tokens())
                expected = host(tokens(length=1), **cached(expected))
        actual.sum().backward()
        assert_close(actual.float(), exact, 3e-2)
        assert_close(output.logits, expected.logits, 5e-2)
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())

    @torch.no_grad()
    def test_a_cache_that_the_host_began(self):
        host, ours = pair()
        cache, token = host(tokens())[CACHE], tokens(length=1)
        expected = host(token, **{CACHE: copy.deepcopy(cache)}).logits
        assert_close(ours(token, **{CACHE: cache}).logits, expected)

    @torch.no_grad()
    def test_recorded_past(self):
        host, ours = pair()
        caches = []
        for model in (host, ours):
            cache = transformers.DynamicCache(config=model.config)
            model(tokens(), **{CACHE: cache})
            for layer in cache.layers:
                layer.activate_past_recording()
            for step in range(2):
                logits = model(tokens(length=1, seed=step), **{CACHE: cache}).logits
            caches.append((cache, logits))
        (expected, logits), (actual, ours_logits) = caches
        assert actual.layers[0].conv_states[0].shape[-1] == 4 + 2
        assert_same_cache(actual, expected)
        assert_close(ours_logits, logits)


class TestBeyondTheHost:
    @pytest.mark.parametrize("cuts", [(4,), (1, 9), (5, 6, 8)])
    @torch.no_grad()
    def test_chunked_prefill_is_one_shot(self, cuts):
        host, ours = pair()
        ids = tokens()
        expected = host(ids)
        cache, logits = None, []
        for part in ids.tensor_split(cuts, dim=1):
            output = ours(part, **{CACHE: cache}, use_cache=True)
            cache = output[CACHE]
            logits.append(output.logits)
        assert_close(torch.cat(logits, 1), expected.logits)
        assert_same_cache(cache, expected[CACHE])

    @pytest.mark.parametrize("cut", [10, 6])
    def test_gradients_through_the_cache(self, cut):
        host, ours = pair()
        ids = tokens()
        host(ids).logits.square().sum().backward()
        first = ours(ids[:, :cut])
        second = ours(ids[:, cut:], **cached(first))
        torch.cat([first.logits, second.logits], 1).square().sum().backward()
        for (name, mine), theirs in zip(ours.named_parameters(), host.parameters(), strict=True):
            assert_close(mine.grad, theirs.grad, 3e-5, name)

    @torch.no_grad()
    def test_rows_padded_on_the_left_equal_those_without_padding(self):
        ours, sizes, ids = pair()[1], (11, 7, 2), tokens(batch=3)
        mask = torch.stack([torch.arange(11) >= 11 - size for size in sizes]).long()
        output = ours(ids, attention_mask=mask)
        alone = [ours(ids[row : row + 1, 11 - size :]) for row, size in enumerate(sizes)]
        for row, size in enumerate(sizes):
            assert_close(output.logits[row, 11 - size :], alone[row].logits[0])
        for step in range(3):
            token = tokens(batch=3, length=1, seed=step)
            output = ours(token, **cached(output))
            alone = [ours(token[row : row + 1], **cached(one)) for row, one in enumerate(alone)]
            assert_close(output.logits, torch.cat([one.logits for one in alone]))

    def test_packed_sequences(self):
        mixer = pair()[1].backbone.layers[0].mixer
        states = torch.randn(1, 10, 24)
        packed = mixer(states, seq_idx=torch.tensor([[0] * 3 + [1] * 7], dtype=torch.int32))
        apart = torch.cat([mixer(states[:, :3]), mixer(states[:, 3:])], 1)
        assert_close(packed, apart)
        with pytest.raises(ValueError, match="cu_seqlens must be None"):
            mixer(states, cu_seqlens=torch.tensor([0, 3, 10]))


class TestReach:
    def test_only_this_model(self):
        model, other = tiny(), tiny()
        functions = {name: value for name, value in vars(modeling_mamba).items() if not name.startswith("__")}
        members = dict(vars(modeling_mamba.MambaMixer))
        config = model.config.to_dict()
        accelerate(model, strict=True)
        model(tokens())
        assert all(vars(modeling_mamba)[name] is value for name, value in functions.items())
        assert vars(modeling_mamba.MambaMixer) == members
        assert model.config.to_dict() == config
        assert {type(block.mixer) for block in other.backbone.layers} == {modeling_mamba.MambaMixer}

    def test_restore(self):
        model = tiny()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        expected = model(tokens()).logits
        report = accelerate(model, strict=True, verify=True)
        assert {entry.new for entry in report} == {
            "layerzoo.hosts.transformers.mamba.MambaMixer",
            "layerzoo.hosts.torch.Linear",
        }
        assert isinstance(model.backbone.layers[0].mixer, modeling_mamba.MambaMixer)
        assert list(model.state_dict()) == list(before)
        restore(model)
        assert {type(block.mixer) for block in model.backbone.layers} == {modeling_mamba.MambaMixer}
        assert type(model.lm_head) is type(model.backbone.layers[0].mixer.dt_proj) is nn.Linear
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(tokens()).logits, expected)

    def test_dry_run_and_context(self):
        model = tiny()
        assert accelerate(model, dry_run=True)
        assert type(model.backbone.layers[0].mixer) is modeling_mamba.MambaMixer
        with accelerated(model, strict=True):
            assert type(model.backbone.layers[0].mixer) is MambaMixer
        assert type(model.backbone.layers[0].mixer) is modeling_mamba.MambaMixer

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, again):
        model = pair()[1]
        twin = again(model)
        assert type(twin.backbone.layers[0].mixer) is MambaMixer
        assert torch.equal(twin(tokens()).logits, model(tokens()).logits)
        restore(twin)
        assert type(model.backbone.layers[0].mixer) is MambaMixer

    def test_save_and_load(self, tmp_path):
        host, ours = pair()
        ours.save_pretrained(tmp_path)
        loaded = transformers.MambaForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens()).logits, host(tokens()).logits)
        assert "layerzoo" not in (tmp_path / "config.json").read_text()

    @torch.no_grad()
    def test_the_kernels_ran(self):
        if not _native.status().loaded:
            pytest.skip(f"no native library: {_native.status().reason}")
        ops = ("selective_scan", "causal_conv1d", "selective_state_update", "causal_conv1d_update")
        model = pair()[1]
        before = [_native.calls(op) for op in ops]
        cache = model(tokens())[CACHE]
        model(tokens(length=1), **{CACHE: cache})
        assert [_native.calls(op) - count for op, count in zip(ops, before, strict=True)] == [3, 3, 3, 3]

    @torch.no_grad()
    def test_linear_layers_run_on_the_kernel_for_few_rows(self, monkeypatch):
        if not _native.status().loaded:
            pytest.skip(f"no native library: {_native.status().reason}")
        monkeypatch.setattr(ops_linear, "LEAST_WEIGHTS", 0)
        host, ours = pair(use_bias=True)
        caches = [model(tokens())[CACHE] for model in (host, ours)]
        before = _native.calls("skinny_linear")
        token = tokens(length=1)
        logits = [model(token, **{CACHE: cache}).logits for model, cache in zip((host, ours), caches, strict=True)]
        assert_close(logits[1], logits[0])
        assert _native.calls("skinny_linear") - before == 3 * 4 + 1  # in, x, dt and out of each layer, and the head
        ours(tokens(length=11))
        assert _native.calls("skinny_linear") - before == 3 * 4 + 1

    def test_linear_layers_that_are_not_plain_are_left_alone(self):
        model = tiny()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.complex64))
        model.backbone.layers[0].mixer.out_proj.forward = lambda x: x
        skipped = {entry.name: entry.reason for entry in accelerate(model, strict=True) if entry.action == "skipped"}
        assert list(skipped) == ["backbone.layers.0.mixer.out_proj", "lm_head"]
        assert "its weight must be a plain parameter, got Parameter of torch.complex64" in skipped["lm_head"]
        assert not accelerate(nn.Sequential(nn.Linear(2, 2)))

    def test_linear_layers_put_in_later_are_taken_along(self):
        model = pair()[1]
        model.lm_head = nn.Linear(24, 61, bias=False)
        [changed] = [entry for entry in accelerate(model) if entry.action == "accelerated"]
        assert changed.name == "lm_head"

    @pytest.mark.parametrize("train", [False, True])
    def test_compile(self, train):
        mixer = pair()[1].backbone.layers[0].mixer.train(train)
        states = torch.randn(2, 7, 24)
        expected = mixer(states)
        actual = torch.compile(mixer, fullgraph=True, backend="aot_eager")(states)
        assert_close(actual, expected)
        names = [name for name, _ in mixer.named_parameters()]
        for name, mine, theirs in zip(
            names,
            torch.autograd.grad(actual.square().sum(), list(mixer.parameters())),
            torch.autograd.grad(expected.square().sum(), list(mixer.parameters())),
            strict=True,
        ):
            assert_close(mine, theirs, what=name)

    @torch.no_grad()
    def test_compile_decode(self):
        model = pair()[1]
        ids = tokens()
        eager, traced = model(ids)[CACHE], model(ids)[CACHE]
        mixer = model.backbone.layers[0].mixer
        step = torch.compile(mixer, fullgraph=True, backend="aot_eager")
        state = torch.randn(2, 1, 24)
        assert_close(step(state, **{CACHE: traced}), mixer(state, **{CACHE: eager}))
        assert_same_cache(traced, eager)

    def test_importing_surgery_does_not_import_the_host(self):
        code = "import sys, layerzoo.hosts.surgery; sys.exit('transformers' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)


class TestRefusals:
    def test_activation(self):
        [first, *_] = accelerate(tiny(hidden_act="gelu"))
        assert first.action == "refused"
        assert first.reason == "its activation must be silu or swish, got gelu"

    def test_device_without_a_kernel(self):
        elsewhere = SimpleNamespace(A_log=SimpleNamespace(device=torch.device("mps")))
        assert MambaMixer.refusal(elsewhere).startswith("layerzoo has no kernel of selective_scan for mps here")

    def test_projections_whose_weight_is_not_plain(self):
        class Packed(nn.Linear):
            pass

        model = tiny()
        model.backbone.layers[0].mixer.dt_proj.__class__ = Packed
        model.backbone.layers[1].mixer.in_proj.__class__ = Packed  # only called, so it may be anything
        nn.utils.parametrize.register_parametrization(model.backbone.layers[2].mixer.conv1d, "weight", nn.Identity())
        actions = [(entry.action, entry.reason[:30]) for entry in accelerate(model) if entry.name.endswith("mixer")]
        assert actions == [
            ("refused", "dt_proj must be a plain Linear"),
            ("accelerated", ""),
            ("refused", "conv1d must be a plain Conv1d,"),
        ]
        model = tiny()
        model.backbone.layers[0].mixer.conv1d._hf_hook = object()
        assert "conv1d has a device hook" in accelerate(model).entries[0].reason

    def test_subclass(self):
        model = tiny()
        mixer = model.backbone.layers[0].mixer
        mixer.__class__ = type("MyMixer", (modeling_mamba.MambaMixer,), {})
        [refused] = [entry for entry in accelerate(model) if entry.action == "refused"]
        assert "a subclass of transformers.models.mamba.modeling_mamba.MambaMixer" in refused.reason

    def test_changed_host(self, monkeypatch):
        def forward(self, hidden_states, cache_params=None, cache_position=None, attention_mask=None):
            raise NotImplementedError

        monkeypatch.setattr(modeling_mamba.MambaMixer, "forward", forward)
        report = accelerate(tiny())
        assert not report
        assert "the installed one is forward(self, hidden_states, cache, cache_position, attention_mask)" in str(
            report.entries[0].reason
        )

    def test_changed_cache(self, monkeypatch):
        monkeypatch.delattr(transformers.Cache, "is_recording_past")
        assert accelerate(tiny()).entries[0].reason == "the installed transformers.Cache lacks is_recording_past"

    def test_signature_is_the_hosts(self):
        theirs = inspect.signature(modeling_mamba.MambaMixer.forward).parameters
        assert [*inspect.signature(MambaMixer.forward).parameters] == [
            MambaMixer.renamed.get(name, name) for name in theirs
        ]

    @pytest.mark.parametrize("name", ["cache", "cache_params"])
    @torch.no_grad()
    def test_both_names_of_the_cache(self, monkeypatch, name):
        _, ours = pair()
        cache, token = ours(tokens())[CACHE], torch.randn(2, 1, 24)
        mixer = ours.backbone.layers[0].mixer
        expected = mixer(token, copy.deepcopy(cache))
        assert torch.equal(mixer(token, **{name: copy.deepcopy(cache)}), expected)
        assert not torch.equal(mixer(token), expected)

        signature = inspect.signature(modeling_mamba.MambaMixer.forward)
        arguments = [
            argument.replace(name=name) if argument.name in ("cache", "cache_params") else argument
            for argument in signature.parameters.values()
        ]
        monkeypatch.setattr(
            modeling_mamba.MambaMixer.forward, "__signature__", signature.replace(parameters=arguments), raising=False
        )
        assert mixers(accelerate(tiny(), strict=True)) == 3
