"""transformers' experts on moe_experts: every class that asks the config, and whole models, against the host's eager."""

import copy
import functools
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
    grads = torch.autograd.grad(out.float().square().sum(), list(named.values()))
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
        exact = results(functools.partial(host_forward, twin), twin, *(t.float() if t.is_floating_point() else t for t in arguments))
        experts.config._experts_implementation = "layerzoo"
        actual = results(experts, experts, *arguments)
        assert {t.dtype for t in actual.values()} == {dtype}
        assert_equal({name: t.float() for name, t in actual.items()}, exact, tolerance)


class TestOneClass:
    @some_classes
    def test_compile(self, kind):
        experts = moe_models.experts_of(kind)
        experts.config._experts_implementation = "layerzoo"
        arguments = call_arguments(experts)
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        assert_equal(results(compiled, experts, *arguments), results(experts, experts, *arguments))

    @some_classes
    def test_compile_accelerated(self, kind):
        experts = moe_models.experts_of(kind)
        if not accelerate(experts):
            assert kind.__name__ in UNFUSED
            return
        arguments = call_arguments(experts)
        compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
        assert_equal(results(compiled, experts, *arguments), results(experts, experts, *arguments))

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
        # two of the host's names stand for one function that it rounds differently
        assert_equal(results(experts, experts, *arguments), expected, 1e-4 if name == "gelu_fast" else 1e-5)

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

    def test_limits_are_read_on_every_call(self):
        [kind] = moe_models.classes("gpt_oss")
        experts = moe_models.experts_of(kind)
        accelerate(experts, strict=True)
        before = experts(*call_arguments(experts))
        experts.limit, experts.alpha = 0.5, 3.0
        expected = host_forward(experts, *call_arguments(experts))
        assert not torch.allclose(before, expected)
        assert_equal({"out": experts(*call_arguments(experts))}, {"out": expected})
