"""transformers' experts on moe_experts: every class that asks the config, and whole models, against eager."""

import copy
import functools
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from layerzoo import _native
from layerzoo.hosts.recipe import find_recipe
from layerzoo.hosts.surgery import accelerate, accelerated, restore

transformers = pytest.importorskip("transformers", reason="the extra [transformers] is not installed")
pytest.importorskip("transformers.integrations.moe", reason="this transformers has no experts by name")

import moe_models  # noqa: E402  after the skip
from transformers.activations import ACT2FN  # noqa: E402

from layerzoo.hosts.transformers import experts as ours  # noqa: E402

KINDS = [kind for family in moe_models.families() for kind in moe_models.classes(family)]
# A softcap on both halves, which no argument of moe_experts says.
UNFUSED = {"Inkling2Experts", "Inkling2LoopExperts"}
# One of each sort: the default, every switch of the decorator, clamps, and what runs as the host's.
SORTS = {"Mixtral", "GptOss", "OpenAIPrivacyFilter", "Aria", "NemotronH", "MuseSpark", "DeepseekV4", "Beam", "Inkling2"}
SOME = [kind for kind in KINDS if kind.__name__.removesuffix("Experts") in SORTS]
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "nemotron_h", "jamba", "muse_spark"]

every_class = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
some_classes = pytest.mark.parametrize("kind", SOME, ids=lambda kind: kind.__name__)
some_families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def compiled():
    """torch.compile without a graph break, in a fresh state: all classes share the code of one forward."""
    torch._dynamo.reset()
    yield functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def call_arguments(experts, tokens: int = 11, k: int = 2, dtype: torch.dtype = torch.float32):
    """x, ids and weights; one token goes to the same expert twice."""
    generator = torch.Generator().manual_seed(1)
    count, width = experts.down_proj.shape[0], experts.down_proj.shape[2 if experts.is_transposed else 1]
    x = torch.randn(tokens, width, generator=generator)
    ids = torch.rand(tokens, count, generator=generator).topk(k)[1]
    ids[3, 1] = ids[3, 0]
    return x.to(dtype), ids, torch.rand(tokens, k, generator=generator).to(dtype)


def host_forward(experts, *arguments):
    """What the class computed before it was decorated."""
    return type(experts).forward.__wrapped__(experts, *arguments)


def results(call, experts, x, ids, weights) -> dict[str, torch.Tensor]:
    """The output, and the gradients of everything that has one."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = call(x, ids, weights)
    named = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    grads = torch.autograd.grad(out.float().square().sum() * 1e-2, list(named.values()))
    return {"out": out.detach(), **dict(zip(named, grads, strict=True))}


def assert_equal(actual, expected, tolerance: float = 1e-5) -> None:
    """Relative in norm; what is small beside the largest need not be as exact."""
    assert actual.keys() == expected.keys()
    largest = max(float(want.detach().norm()) for want in expected.values())
    for name, want in expected.items():
        got = actual[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        got, want = got.detach().float(), want.detach().float()
        error = float((got - want).norm() / want.norm().clamp_min(1e-3 * largest))
        assert error <= tolerance, f"{name}: {error:.1e} relative, allowed {tolerance:.0e}"


class TestEveryClass:
    def test_there_are_many(self):
        assert len(KINDS) >= len(moe_models.families()) > len(FAMILIES)
        assert len(SOME) == len(SORTS)

    @every_class
    def test_output_and_gradients_equal_eager(self, kind):
        experts = moe_models.experts_of(kind)
        arguments = call_arguments(experts)
        expected = results(functools.partial(host_forward, experts), experts, *arguments)
        experts.config._experts_implementation = "layerzoo"
        assert_equal(results(experts, experts, *arguments), expected)

    @every_class
    def test_accelerate_takes_all_but_those_with_a_gate_of_another_kind(self, kind):
        experts = moe_models.experts_of(kind)
        recipe, reason = find_recipe(experts, verify=True)
        if kind.__name__ in UNFUSED:
            assert recipe is None
            assert reason.startswith(f"moe_experts has no such gate: {kind.__name__}._apply_gate of Inkling2")
            return
        assert (recipe.host, reason) == (kind, "")
        arguments = call_arguments(experts)
        expected = results(functools.partial(host_forward, experts), experts, *arguments)
        experts.__class__ = recipe
        before = _native.calls("moe_experts")
        assert_equal(results(experts, experts, *arguments), expected)
        assert not _native.status().loaded or _native.calls("moe_experts") == before + 1

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
    @every_class
    def test_low_precision(self, kind, dtype, tolerance):
        experts = moe_models.experts_of(kind).to(dtype)
        arguments = call_arguments(experts, dtype=dtype)
        twin = copy.deepcopy(experts).float()
        x, ids, weights = arguments
        exact = results(functools.partial(host_forward, twin), twin, x.float(), ids, weights.float())
        experts.config._experts_implementation = "layerzoo"
        actual = results(experts, experts, *arguments)
        assert {t.dtype for t in actual.values()} == {dtype}
        assert_equal({name: t.float() for name, t in actual.items()}, exact, tolerance)


class TestOneClass:
    @some_classes
    def test_compile(self, compiled, kind):
        experts = moe_models.experts_of(kind)
        experts.config._experts_implementation = "layerzoo"
        arguments = call_arguments(experts)
        assert_equal(results(compiled(experts), experts, *arguments), results(experts, experts, *arguments))

    @some_classes
    def test_compile_accelerated(self, compiled, kind):
        experts = moe_models.experts_of(kind)
        if not accelerate(experts):
            assert kind.__name__ in UNFUSED
            return
        arguments = call_arguments(experts)
        assert_equal(results(compiled(experts), experts, *arguments), results(experts, experts, *arguments))

    @pytest.mark.parametrize("parallel", [False, True])
    @some_classes
    def test_ids_of_no_expert_add_nothing(self, kind, parallel):
        experts = moe_models.experts_of(kind)
        experts.config._experts_implementation = "layerzoo"
        x, ids, weights = call_arguments(experts)
        dropped = torch.zeros_like(ids, dtype=torch.bool)
        dropped[1], dropped[2, 0] = True, True
        expected = results(functools.partial(host_forward, experts), experts, x, ids, weights.masked_fill(dropped, 0))
        expected["weights"] = expected["weights"].masked_fill(dropped, 0)
        experts._is_expert_parallel = parallel
        outside = ids.masked_fill(dropped, experts.num_experts)
        assert_equal(results(experts, experts, x, outside, weights), expected)

    @some_classes
    def test_autocast(self, kind):
        experts = moe_models.experts_of(kind)
        x, ids, weights = call_arguments(experts)
        exact = results(functools.partial(host_forward, experts), experts, x, ids, weights)
        experts.config._experts_implementation = "layerzoo"
        with torch.autocast("cpu", torch.bfloat16):
            actual = results(experts, experts, x, ids, weights.bfloat16())
        assert actual["weights"].dtype == torch.bfloat16
        actual["weights"] = actual["weights"].float()
        assert_equal(actual, exact, 3e-2)

    @some_classes
    def test_routing_weights_in_float32_beside_bfloat16(self, kind):
        experts = moe_models.experts_of(kind).bfloat16()
        x, ids, weights = call_arguments(experts, dtype=torch.bfloat16)
        experts.config._experts_implementation = "layerzoo"
        actual = experts(x, ids, weights.float())
        assert actual.dtype == torch.bfloat16
        assert_equal({"out": actual}, {"out": experts(x, ids, weights)}, 3e-2)

    @some_classes
    def test_checkpointing(self, kind):
        experts = moe_models.experts_of(kind)
        experts.config._experts_implementation = "layerzoo"
        arguments = call_arguments(experts)
        again = functools.partial(checkpoint, experts, use_reentrant=False)
        assert_equal(results(again, experts, *arguments), results(experts, experts, *arguments), 0)

    @some_classes
    def test_no_tokens(self, kind):
        experts = moe_models.experts_of(kind)
        experts.config._experts_implementation = "layerzoo"
        x, ids, weights = call_arguments(experts)
        actual = results(experts, experts, x[:0], ids[:0], weights[:0])
        assert actual["out"].shape == (0, x.shape[1])
        assert not any(grad.any() for grad in actual.values())

    @some_classes
    def test_arguments_are_left_as_they_are(self, kind):
        experts = moe_models.experts_of(kind)
        experts.config._experts_implementation = "layerzoo"
        arguments = call_arguments(experts)
        arguments[1][0] = experts.num_experts
        before = copy.deepcopy(arguments)
        with torch.no_grad():
            experts(*arguments)
        assert all(torch.equal(one, other) for one, other in zip(arguments, before, strict=True))


def mixtral(**config) -> nn.Module:
    config = {"hidden_size": 24, "intermediate_size": 20, "num_local_experts": 4} | config
    experts = transformers.models.mixtral.modeling_mixtral.MixtralExperts(transformers.MixtralConfig(**config))
    torch.manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


class TestGates:
    @pytest.mark.parametrize("name", ours.NAMES)
    def test_activations_that_we_have(self, name):
        experts = mixtral(hidden_act=name)
        arguments = call_arguments(experts)
        expected = results(functools.partial(host_forward, experts), experts, *arguments)
        assert accelerate(experts, strict=True)
        assert_equal(results(experts, experts, *arguments), expected)

    @pytest.mark.parametrize("name", sorted(ACT2FN.keys() - ours.NAMES.keys() - {"xielu"}))
    def test_activations_that_we_do_not_have_run_as_the_hosts(self, name):
        experts = mixtral()
        experts.act_fn = ACT2FN[name]
        arguments = call_arguments(experts)
        expected = results(functools.partial(host_forward, experts), experts, *arguments)
        experts.config._experts_implementation = "layerzoo"
        assert_equal(results(experts, experts, *arguments), expected)

    def test_a_gate_of_ones_own_is_not_mistaken_for_the_default(self):
        class Mine(transformers.models.mixtral.modeling_mixtral.MixtralExperts):
            def _apply_gate(self, gate_up):
                gate, up = gate_up.chunk(2, dim=-1)
                return torch.tanh(gate) * up

        experts = mixtral()
        experts.__class__ = Mine
        [refused] = accelerate(experts)
        assert refused.action == "refused"
        assert "Mine._apply_gate" in refused.reason
        experts.config._experts_implementation = "grouped_mm"
        expected = results(experts, experts, *call_arguments(experts))
        experts.config._experts_implementation = "layerzoo"
        assert_equal(results(experts, experts, *call_arguments(experts)), expected, 0)

    @pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
    def test_what_transformers_5_0_does_not_say(self, family):
        [kind] = moe_models.classes(family)
        experts = moe_models.experts_of(kind)
        arguments = call_arguments(experts)
        expected = host_forward(experts, *arguments)
        for name in ("has_gate", "is_concatenated", "has_post_expert_norm", "_is_expert_parallel"):
            delattr(experts, name)
        accelerate(experts, strict=True)
        assert_equal({"out": experts(*arguments)}, {"out": expected})

    def test_limits_are_read_on_every_call(self):
        [kind] = moe_models.classes("gpt_oss")
        experts = moe_models.experts_of(kind)
        accelerate(experts, strict=True)
        before = experts(*call_arguments(experts))
        experts.limit, experts.alpha = 0.5, 3.0
        expected = host_forward(experts, *call_arguments(experts))
        assert not torch.allclose(before, expected)
        assert_equal({"out": experts(*call_arguments(experts))}, {"out": expected})


def accelerated_experts(report) -> int:
    return sum(entry.action == "accelerated" and entry.old.endswith("Experts") for entry in report)


def assert_same_model(actual, expected, tolerance: float = 1e-4) -> None:
    assert_equal({"out": moe_models.output_of(actual)}, {"out": moe_models.output_of(expected)}, tolerance / 10)
    assert_equal(moe_models.gradients_of(actual), moe_models.gradients_of(expected), tolerance)


class TestModels:
    @some_families
    def test_accelerate_and_restore(self, family):
        host = moe_models.model_of(family)
        model = copy.deepcopy(host)
        kinds = [type(module) for module in model.modules()]
        report = accelerate(model, strict=True, verify=True)
        assert accelerated_experts(report) == sum(type(m) in moe_models.classes(family) for m in host.modules()) > 0
        before = _native.calls("moe_experts")
        assert_same_model(model, host)
        assert not _native.status().loaded or _native.calls("moe_experts") > before
        written = moe_models.text_of(host)
        assert written is None or torch.equal(moe_models.text_of(model), written)
        state = host.state_dict()
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        restore(model)
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(moe_models.output_of(model), moe_models.output_of(host))

    @pytest.mark.slow
    @pytest.mark.parametrize("family", sorted(set(moe_models.families()) - set(FAMILIES)))
    def test_all_families(self, family):
        host = moe_models.model_of(family)
        model = copy.deepcopy(host)
        model.set_experts_implementation("layerzoo")
        assert_same_model(model, host)
        model.set_experts_implementation("eager")
        report = accelerate(model)
        served = accelerated_experts(report)
        kinds = [type(m) for m in host.modules() if type(m) in moe_models.classes(family)]
        assert served == sum(kind.__name__ not in UNFUSED for kind in kinds)
        assert kinds
        if served:
            assert_same_model(model, host)

    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
    def test_bfloat16(self, family):
        host = moe_models.model_of(family)
        exact = moe_models.output_of(host)
        model = copy.deepcopy(host).bfloat16()
        accelerate(model, strict=True)
        out = moe_models.output_of(model)
        assert out.dtype == torch.bfloat16
        assert_equal({"out": out.float()}, {"out": exact}, 5e-2)

    @pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
    def test_autocast(self, family):
        host = moe_models.model_of(family)
        model = copy.deepcopy(host)
        accelerate(model, strict=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = moe_models.output_of(model)
        assert_equal({"out": out.float()}, {"out": moe_models.output_of(host)}, 5e-2)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant):
        host = moe_models.model_of("qwen3_moe").train()
        model = copy.deepcopy(host)
        accelerate(model, strict=True)
        # the older name warns from transformers 5.2x on
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": reentrant})
        for one in (model, host):
            one.enable_input_require_grads()
            one(moe_models.tokens(), labels=moe_models.tokens()).loss.backward()
        grads = [{name: p.grad for name, p in one.named_parameters()} for one in (model, host)]
        assert_equal(*grads, 1e-4)

    @torch.no_grad()
    def test_compile(self, compiled):
        model = moe_models.model_of("qwen3_moe")
        expected = moe_models.output_of(model)
        accelerate(model, strict=True)
        actual = compiled(model)(moe_models.tokens(), use_cache=False).logits
        assert_equal({"out": actual}, {"out": expected})


class TestReach:
    def test_two_models_with_one_config(self):
        config = moe_models.config_of("qwen3_moe")
        one, other = (transformers.Qwen3MoeForCausalLM(config).eval() for _ in range(2))
        assert one.config is other.config
        before = config.to_dict(), config._experts_implementation
        accelerate(one, strict=True)
        assert (one.config is other.config is config) and (config.to_dict(), config._experts_implementation) == before
        calls = [_native.calls("moe_experts")]
        for model in (other, one):
            moe_models.output_of(model)
            calls.append(_native.calls("moe_experts"))
        assert calls[1] == calls[0]
        assert not _native.status().loaded or calls[2] == calls[1] + 2
        [kind] = moe_models.classes("qwen3_moe")
        assert {type(layer.mlp.experts) for layer in other.model.layers} == {kind}

    def test_only_this_class_of_this_model(self):
        [kind] = moe_models.classes("qwen3_moe")
        members = dict(vars(kind))
        model = moe_models.model_of("qwen3_moe")
        with accelerated(model, strict=True):
            assert isinstance(model.model.layers[0].mlp.experts, kind)
            assert ours.recipe_for(kind) is type(model.model.layers[0].mlp.experts) is not kind
        assert type(model.model.layers[0].mlp.experts) is kind
        assert dict(vars(kind)) == members

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, again):
        model = moe_models.model_of("qwen3_moe")
        accelerate(model, strict=True)
        twin = again(model)
        experts = twin.model.layers[0].mlp.experts
        assert type(experts) is type(model.model.layers[0].mlp.experts)
        assert torch.equal(moe_models.output_of(twin), moe_models.output_of(model))
        assert restore(twin)
        assert isinstance(model.model.layers[0].mlp.experts, ours.Experts)

    def test_a_pickled_model_wakes_up_where_nothing_was_imported(self, tmp_path, python):
        model = moe_models.model_of("qwen3_moe")
        accelerate(model, strict=True)
        torch.save(model, tmp_path / "model.pt")
        code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
assert type(model.model.layers[0].mlp.experts).__module__ == "layerzoo.hosts.transformers.experts"
print(model(torch.tensor([[3, 4, 5]])).logits.tolist())
"""
        run = python("-c", code)
        assert run.returncode == 0, run.stderr
        logits = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
        assert_equal({"out": logits}, {"out": model(torch.tensor([[3, 4, 5]])).logits})

    def test_save_and_load_by_name(self, tmp_path):
        model = moe_models.model_of("qwen3_moe")
        expected = moe_models.output_of(model)
        accelerate(model, strict=True)
        model.save_pretrained(tmp_path)
        assert "layerzoo" not in (tmp_path / "config.json").read_text()
        before = _native.calls("moe_experts")
        loaded = type(model).from_pretrained(tmp_path, experts_implementation="layerzoo")
        assert loaded.config._experts_implementation == "layerzoo"
        assert_equal({"out": moe_models.output_of(loaded)}, {"out": expected})
        assert not _native.status().loaded or _native.calls("moe_experts") == before + 2

    def test_by_the_names_of_the_hosts_arguments(self):
        [kind] = moe_models.classes("gpt_oss")
        experts = moe_models.experts_of(kind)
        x, ids, weights = call_arguments(experts)
        accelerate(experts, strict=True)
        named = experts(x, routing_weights=weights, router_indices=ids)
        assert torch.equal(named, experts(x, ids, weights))

    def test_parametrized(self):
        model = moe_models.model_of("qwen3_moe")
        experts = model.model.layers[0].mlp.experts
        parametrize.register_parametrization(experts, "gate_up_proj", nn.Identity())
        [first, second] = accelerate(model)
        assert (first.action, second.action) == ("refused", "accelerated")
        assert first.reason == "it has parametrizations; accelerate before they are registered"
        restore(model)
        parametrize.remove_parametrizations(experts, "gate_up_proj")

        class Doubled(nn.Module):
            def forward(self, weight):
                return 2 * weight

        expected = moe_models.output_of(model)
        accelerate(model, strict=True)
        parametrize.register_parametrization(experts, "down_proj", Doubled())
        assert not torch.allclose(moe_models.output_of(model), expected)
        experts.parametrizations.down_proj.original.data.div_(2)
        assert_equal({"out": moe_models.output_of(model)}, {"out": expected})
        parametrize.remove_parametrizations(experts, "down_proj")
        assert isinstance(experts, ours.Experts)

    def test_quantised(self):
        experts = mixtral()
        experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
        [refused] = accelerate(experts)
        assert (
            refused.reason == "down_proj must be a plain floating-point parameter, got Parameter of torch.float8_e4m3fn"
        )

    def test_device_without_a_kernel(self, monkeypatch):
        monkeypatch.setattr(ours, "has_kernel", lambda op, device: False)
        experts = mixtral()
        assert accelerate(experts.to("meta"))
        restore(experts)
        monkeypatch.setattr(torch.Tensor, "device", torch.device("mps"))
        assert ours.Experts.refusal(experts) == (
            "layerzoo has no kernel of moe_experts for mps here, so the host is faster"
        )
