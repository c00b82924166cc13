"""swap, accelerate, restore on toy models."""

import contextlib
import copy
import pickle
import re

import pytest
import torch
from torch import nn

from layerzoo.hosts import recipe
from layerzoo.hosts.recipe import Accelerated, qualified
from layerzoo.hosts.surgery import SWAPPED, accelerate, accelerated, restore, swap


class Scale(nn.Module):
    """The toy host."""

    def __init__(self, dim: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim))

    def forward(self, x, gain=1.0):
        return x * self.weight * gain


class FastScale(Accelerated, Scale):
    host = Scale
    error = 0.0

    @classmethod
    def refusal(cls, module):
        return "its weight must have an even size" if module.weight.numel() % 2 else ""

    @classmethod
    def probe(cls, module):
        return (torch.ones_like(module.weight),)

    def forward(self, x, gain=1.0):
        return torch.mul(x, self.weight) * gain + FastScale.error


class OtherScale(Scale):
    pass


class Block(nn.Module):
    def __init__(self, dim: int = 4):
        super().__init__()
        self.scale = Scale(dim)
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x):
        return self.norm(self.linear(self.scale(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 11):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Around(nn.Module):
    """An adapter that keeps the old module inside."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.base(x) * self.weight


@pytest.fixture(autouse=True)
def toy_recipe(monkeypatch):
    monkeypatch.setitem(recipe.RECIPES, qualified(Scale), f"{__name__}:FastScale")
    torch.manual_seed(0)


@pytest.fixture
def net():
    return Net().eval()


def fingerprint(model):
    """Everything that restore promises: objects, classes, tensors, modes, and what was hidden beside them."""
    modules = [(name, id(m), type(m), m.training, set(vars(m))) for name, m in model.named_modules()]
    state = model.state_dict(keep_vars=True)
    tensors = [(name, id(t), t.requires_grad, t.detach().clone()) for name, t in state.items()]
    return modules, tensors


def assert_same(model, before):
    modules, tensors = fingerprint(model)
    assert modules == before[0]
    for (name, *identity, value), (old_name, *old_identity, old_value) in zip(tensors, before[1], strict=True):
        assert (name, identity) == (old_name, old_identity)
        assert torch.equal(value, old_value), name


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class TestTargets:
    @pytest.mark.parametrize(
        ("target", "count"),
        [
            ("layers.1.linear", 1),
            ("layers.1*", 2),  # layers.1 and layers.10, as asked
            ("layers.1", 1),
            ("layers.*.linear", 11),
            ("layers.*", 11),
            ("*.linear", None),  # one segment too few
            ("**.linear", 11),
            ("**.head", 1),  # the empty prefix
            ("layers.**", 11),  # what lies inside the matches is skipped
            (nn.Linear, 12),
            (lambda name, module: name.endswith("norm"), 11),
            (["head", nn.BatchNorm1d], 12),
        ],
    )
    def test_matches(self, net, target, count):
        if count is None:
            with pytest.raises(ValueError, match=r"closest names: .*linear"):
                swap(net, target, nn.Identity)
        else:
            report = swap(net, target, nn.Identity)
            assert sum(entry.action == "swapped" for entry in report) == count

    def test_one_is_not_ten(self, net):
        swap(net, "layers.1", nn.Identity)
        assert isinstance(net.layers[1], nn.Identity)
        assert isinstance(net.layers[10], Block)

    def test_exact_class(self, net):
        net.layers[3].scale = OtherScale()
        assert len(swap(net, Scale, nn.Identity)) == 10

    def test_accelerated_module_is_still_of_its_class(self, net):
        accelerate(net)
        assert len(swap(net, Scale, nn.Identity)) == 11

    @pytest.mark.parametrize(
        ("target", "error", "message"),
        [
            ("layers.99", ValueError, r"'layers\.99' matches no module; closest names: layers\.9"),
            (nn.Conv2d, ValueError, "Conv2d matches no module; classes in the model: ModuleList, Block, Scale, Linear"),
            (Net, ValueError, "no parent in which to replace it"),
            (lambda name, module: False, ValueError, "holds for none of the model's 46 modules"),
            (["head", "haed"], ValueError, "'haed' matches no module; closest names: head"),
            (7, TypeError, "target must be a glob, class, predicate"),
            (nn.Identity(), TypeError, "target must be a glob, class, predicate"),
        ],
    )
    def test_nothing_matched(self, net, target, error, message):
        before = fingerprint(net)
        with pytest.raises(error, match=message):
            swap(net, target, nn.Identity)
        assert_same(net, before)


class TestSwap:
    def test_weights_of_same_name_and_shape_move(self, net):
        old = net.layers[0].linear
        [entry] = swap(net, "layers.0.linear", nn.Linear, in_features=4, out_features=4, bias=False)
        assert net.layers[0].linear is not old
        assert net.layers[0].linear.weight is old.weight
        assert (entry.copied, entry.fresh, entry.dropped) == (("weight",), (), ("bias",))

    def test_other_shape_is_fresh(self, net):
        [entry] = swap(net, "head", nn.Linear, in_features=4, out_features=5)
        assert (entry.copied, entry.fresh, entry.dropped) == ((), ("weight", "bias"), ("weight",))
        assert net(X).shape == (3, 5)

    def test_buffers_are_copied(self, net):
        net.train()
        before = copy.deepcopy(net.state_dict())
        [entry] = swap(net, "layers.0.norm", nn.BatchNorm1d, num_features=4)
        assert set(entry.copied) == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
        with torch.no_grad():
            net.layers[0](X)  # writes the running statistics of the new one
        restore(net)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_callable(self, net):
        swap(net, "layers.*.scale", lambda old, power: nn.Linear(4, 4 * power), power=1)
        assert all(isinstance(layer.scale, nn.Linear) for layer in net.layers)

    def test_around_the_old_module(self, net):
        old, before = net.head, fingerprint(net)
        fired = []
        handle = old.register_forward_hook(lambda *_: fired.append(1))
        [entry] = swap(net, "head", lambda old: Around(old))
        assert net.head.base is old
        assert (entry.copied, entry.fresh) == (("base.weight",), ("weight",))
        net(X)
        assert len(fired) == 1  # not twice, though the old one still runs inside
        handle.remove()
        restore(net)
        assert_same(net, before)

    def test_card_by_name(self, net, monkeypatch):
        built = []

        def create(name, **config):
            built.append((name, config))
            return nn.Linear(4, 4)

        monkeypatch.setattr("layerzoo.zoo.registry.create", create)
        swap(net, "head", "memory/some-layer", size=3)
        assert built == [("memory/some-layer", {"size": 3})]

    @pytest.mark.parametrize("train", [True, False])
    def test_mode_dtype_device(self, net, train):
        net.to(torch.bfloat16).train(train)
        swap(net, "layers.0", lambda old: nn.Sequential(nn.Linear(4, 4), nn.Dropout()))
        swap(net, "layers.1.norm", nn.Identity)
        swap(net, "layers.1.norm", nn.Linear, in_features=4, out_features=4)  # Identity has no dtype: the model's
        for new in (net.layers[0], net.layers[1].norm):
            assert all(module.training is train for module in new.modules())
            assert {p.dtype for p in new.parameters()} == {torch.bfloat16}

    def test_meta_device(self):
        with torch.device("meta"):
            net = Net()
        swap(net, "head", nn.Linear, in_features=4, out_features=4)
        assert all(p.is_meta for p in net.parameters())

    def test_moved_weight_keeps_its_own_dtype(self, net):
        net.layers[0].linear.bfloat16().weight.data = torch.randn(4, 4)  # weight fp32 beside a bf16 bias
        swap(net, "layers.0.linear", nn.Linear, in_features=4, out_features=4)
        assert [p.dtype for p in net.layers[0].linear.parameters()] == [torch.float32, torch.bfloat16]

    @pytest.mark.parametrize("frozen", [True, False])
    def test_requires_grad(self, net, frozen):
        net.head.requires_grad_(not frozen)
        [entry] = swap(net, "head", nn.Linear, in_features=4, out_features=5)
        assert all(p.requires_grad is not frozen for p in net.head.parameters())
        assert ("frozen" in entry.reason) is frozen

    def test_hooks(self, net):
        fired = []
        handle = net.head.register_forward_hook(lambda *_: fired.append("forward"))
        net.head.register_full_backward_hook(lambda *_: fired.append("backward"))
        swap(net, "head", nn.Linear, in_features=4, out_features=4)
        net(X).sum().backward()
        assert fired == ["forward", "backward"]
        handle.remove()  # a handle from before the swap still works
        net(X)
        assert len(fired) == 2
        net.layers[0].linear.register_forward_hook(lambda *_: None)
        [entry] = swap(net, "layers.0", nn.Identity)
        assert "hooks on linear are not carried over" in entry.reason

    def test_shared_module_is_replaced_once_for_all(self, net):
        net.layers[3].linear = net.layers[7].linear
        before = fingerprint(net)
        report = swap(net, "layers.7.linear", lambda old: nn.Linear(4, 4))
        assert len(report) == 1
        assert net.layers[3].linear is net.layers[7].linear
        assert "shared with layers.7.linear" in report.entries[0].reason
        restore(net)
        assert_same(net, before)

    def test_shared_parent(self, net):
        net.layers[3] = net.layers[7]
        before = fingerprint(net)
        swap(net, "layers.7.linear", nn.Identity)
        assert isinstance(net.layers[3].linear, nn.Identity)
        restore(net)
        assert_same(net, before)

    def test_tied_weight(self, net):
        net.head.weight = net.layers[0].linear.weight
        swap(net, "head", nn.Linear, in_features=4, out_features=4, bias=False)
        assert net.head.weight is net.layers[0].linear.weight
        [entry] = swap(net, "head", nn.Linear, in_features=4, out_features=5, bias=False)
        assert entry.dropped == ("weight (tied to layers.0.linear.weight)",)

    def test_every_layer_is_built_before_the_model_is_touched(self, net):
        before = fingerprint(net)
        built = []

        def fails_at_the_third(old):
            if len(built) == 2:
                raise RuntimeError("no")
            built.append(nn.Linear(4, 4))
            return built[-1]

        with pytest.raises(RuntimeError, match="no"):
            swap(net, "layers.*.linear", fails_at_the_third)
        assert len(built) == 2
        assert_same(net, before)

    @pytest.mark.parametrize("layer", [nn.Identity(), 3, lambda old: None, lambda old: old])
    def test_bad_layer(self, net, layer):
        before = fingerprint(net)
        with pytest.raises(TypeError, match="layer must"):
            swap(net, "head", layer)
        assert_same(net, before)


class TestAccelerate:
    def test_only_the_class_changes(self, net):
        expected, before = net(X), fingerprint(net)
        report = accelerate(net)
        assert report
        assert len(report) == 11
        assert {type(layer.scale) for layer in net.layers} == {FastScale}
        assert [(n, i) for n, i, *_ in fingerprint(net)[0]] == [(n, i) for n, i, *_ in before[0]]
        torch.testing.assert_close(net(X), expected)
        assert "layerzoo" in repr(net.layers[0].scale)
        assert {entry.action for entry in accelerate(net)} == {"already"}
        assert not accelerate(net)
        assert restore(net)
        assert_same(net, before)
        assert not restore(net)

    def test_dry_run(self, net):
        before = fingerprint(net)
        report = accelerate(net, dry_run=True, verify=True)
        assert_same(net, before)
        assert report
        assert report.dry_run
        assert {entry.action for entry in report} == {"accelerated"}

    def test_the_model_itself(self):
        scale = Scale()
        assert accelerate(scale).entries[0].name == "(model)"
        assert type(scale) is FastScale
        restore(scale)
        assert type(scale) is Scale

    @pytest.mark.parametrize(
        ("module", "reason"),
        [
            (Scale(5), "must have an even size"),
            (OtherScale(), "a subclass of .*Scale"),
            (nn.utils.parametrize.register_parametrization(Scale(), "weight", nn.Identity()), "a subclass of"),
        ],
    )
    def test_refused(self, net, module, reason):
        net.layers[2].scale = module
        kind = type(module)
        report = accelerate(net)
        [refused] = [entry for entry in report if entry.action == "refused"]
        assert refused.name == "layers.2.scale"
        assert re.search(reason, refused.reason)
        assert type(module) is kind
        restore(net)
        before = fingerprint(net)
        with pytest.raises(ValueError, match=r"strict, but layers\.2\.scale"):
            accelerate(net, strict=True)
        assert_same(net, before)

    def test_patched_forward_is_refused(self):
        scale = Scale()
        scale.forward = lambda x: x
        assert "patched on the instance" in accelerate(scale).entries[0].reason

    def test_changed_host_is_refused(self, monkeypatch):
        def forward(self, x, gain=1.0, bias=0.0):
            return x * self.weight * gain + bias

        monkeypatch.setattr(Scale, "forward", forward)
        [entry] = accelerate(Scale())
        assert entry.action == "refused"
        assert entry.reason == (
            "written for Scale.forward(self, x, gain), the installed one is forward(self, x, gain, bias)"
        )

    def test_missing_recipe_is_refused(self, monkeypatch):
        monkeypatch.setitem(recipe.RECIPES, qualified(Scale), f"{__name__}:Gone")
        assert "the installed host lacks" in accelerate(Scale()).entries[0].reason

    def test_verify(self, net, monkeypatch):
        assert accelerate(net, verify=True)
        restore(net)
        monkeypatch.setattr(FastScale, "error", 0.1)
        before = fingerprint(net)
        report = accelerate(net, verify=True)
        assert not report
        assert all("on a probe its output differs by" in entry.reason for entry in report)
        assert_same(net, before)

    def test_strict_and_nothing_to_do(self):
        assert not accelerate(nn.Linear(1, 1))
        with pytest.raises(ValueError, match="no module of the model has a recipe"):
            accelerate(nn.Linear(1, 1), strict=True)

    def test_context(self, net):
        accelerate(net.layers[0])
        swap(net, "head", nn.Linear, in_features=4, out_features=4)
        before = fingerprint(net)
        with contextlib.suppress(KeyError), accelerated(net) as report:
            assert len([entry for entry in report if entry.action == "accelerated"]) == 10
            assert type(net.layers[5].scale) is FastScale
            raise KeyError("an error inside the block")
        assert_same(net, before)  # the first layer is still accelerated, the head still swapped


class TestRestore:
    def test_stacked(self, net):
        net.layers[3] = net.layers[7]
        net.layers[1].linear = net.layers[2].linear
        before, expected = fingerprint(net), net(X)
        accelerate(net)
        swap(net, "layers.0.linear", lambda old: Around(old))
        swap(net, "layers.0.linear", nn.Linear, in_features=4, out_features=4)  # over the adapter
        swap(net, "layers.2.linear", lambda old: Around(old))
        swap(net, "layers.2.linear.base", nn.Identity)  # inside the adapter
        swap(net, "layers.5.scale", nn.Identity)  # an accelerated one
        swap(net, "layers.5", lambda old: nn.Sequential(Scale(), nn.Linear(4, 4)))  # and all around it
        accelerate(net)
        swap(net, "layers.7", nn.Identity)
        report = restore(net)
        assert {entry.action for entry in report} == {"restored"}
        assert_same(net, before)
        assert torch.equal(net(X), expected)
        assert not any(SWAPPED in vars(module) for module in net.modules())

    def test_part_of_the_model(self, net):
        before = fingerprint(net)
        swap(net, "**.linear", nn.Identity)
        assert len(restore(net.layers[4])) == 1
        assert isinstance(net.layers[4].linear, nn.Linear)
        assert isinstance(net.layers[5].linear, nn.Identity)
        restore(net)
        assert_same(net, before)

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, net, again):
        expected, keys = net(X), list(net.state_dict())
        accelerate(net)
        swap(net, "layers.*.linear", nn.Linear, in_features=4, out_features=4)
        swap(net, "head", nn.Linear, in_features=4, out_features=4)
        assert not any(SWAPPED in key for key in net.state_dict())
        twin = again(net)
        assert type(twin.layers[0].scale) is FastScale
        assert len(restore(twin)) == 23
        assert torch.equal(twin(X), expected)
        assert list(twin.state_dict()) == keys
        assert len(restore(net)) == 23  # the copy had its own
        assert torch.equal(net(X), expected)

    def test_follows_the_mode(self, net):
        swap(net, "head", nn.Linear, in_features=4, out_features=4)
        net.train()
        restore(net)
        assert net.head.training

    def test_follows_the_device(self, net):
        head = net.head
        swap(net, "head", nn.Linear, in_features=4, out_features=5)
        net.to("meta")
        restore(net)
        assert net.head is head
        assert head.weight.is_meta

    def test_slot_that_somebody_else_changed(self, net):
        swap(net, "head", nn.Linear, in_features=4, out_features=4)
        ours = net.head
        net.head = nn.Identity()
        [entry] = restore(net)
        assert entry.action == "refused"
        assert isinstance(net.head, nn.Identity)
        net.head = ours
        assert restore(net)

    def test_class_that_somebody_else_changed(self, net):
        accelerate(net)
        nn.utils.parametrize.register_parametrization(net.layers[0].scale, "weight", nn.Identity())
        refused = [entry for entry in restore(net) if entry.action == "refused"]
        assert [entry.name for entry in refused] == ["layers.0.scale"]
        nn.utils.parametrize.remove_parametrizations(net.layers[0].scale, "weight")
        assert restore(net)
        assert type(net.layers[0].scale) is Scale


class TestModels:
    @pytest.mark.parametrize("verb", [accelerate, restore, lambda model: swap(model, "**.head", nn.Identity)])
    def test_wrapped_and_wrong(self, net, verb):
        class FullyShardedDataParallel(nn.Module):
            """Stands in for torch's, which needs a process group."""

            def __init__(self, module):
                super().__init__()
                self.module = module

        with pytest.raises(TypeError, match="model must not be wrapped, but it is a FullyShardedDataParallel"):
            verb(FullyShardedDataParallel(net))
        net.layers[0] = FullyShardedDataParallel(net.layers[0])
        with pytest.raises(TypeError, match=r"its module 'layers\.0' is a FullyShardedDataParallel"):
            verb(net)
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
            verb(3)

    @pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
    def test_ddp(self, net):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(net)
            with pytest.raises(TypeError, match="DistributedDataParallel; accelerate before wrapping"):
                accelerate(wrapped)
        finally:
            torch.distributed.destroy_process_group()

    def test_compiled(self, net):
        compiled = torch.compile(net, backend="eager")
        expected = compiled(X)
        assert len(swap(compiled, "head", nn.Linear, in_features=4, out_features=5)) == 1
        assert accelerate(compiled)
        assert compiled(X).shape == (3, 5)  # it traced again
        restore(compiled)
        torch.testing.assert_close(compiled(X), expected)


class TestReport:
    def test_words_and_data(self, net):
        net.layers[2].scale = Scale(5)
        report = accelerate(net, dry_run=True)
        text = str(report)
        assert "accelerate: 10 accelerated, 1 refused (dry run, nothing was touched)" in text
        assert "layers.*.scale (10 times)" in text
        assert "layers.2.scale" in text
        assert "must have an even" in text  # the table folds the rest
        data = report.to_dict()
        assert data["changed"] is True
        assert data["entries"][2] | {"reason": ""} == {
            "name": "layers.2.scale",
            "old": qualified(Scale),
            "new": qualified(Scale),
            "action": "refused",
            "reason": "",
            "copied": (),
            "fresh": (),
            "dropped": (),
        }

    def test_names_the_weights(self, net):
        text = str(swap(net, "layers.0.linear", nn.Linear, in_features=4, out_features=4, bias=False))
        assert "copied: weight; dropped: bias" in " ".join(text.split())

    def test_nothing(self):
        assert "nothing to do" in str(accelerate(nn.Linear(1, 1)))
