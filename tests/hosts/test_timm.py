"""Layers of ours in models of timm: they learn scikit-learn's digits, and what a stand-in does with its tokens."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerzoo import _native
from layerzoo.hosts.surgery import restore, swap
from layerzoo.hosts.timm import ImageMixer, TokenMixer

timm = pytest.importorskip("timm", reason="the extra [vision] is not installed")
datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")

ATTENTION, CONVOLUTION = "blocks.*.attn", "stages.*.blocks.*.conv_dw"


def vit(**config) -> nn.Module:
    """Two blocks of width 48 on 16 patches, a class token in front of them."""
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 48, "depth": 2}
    return timm.models.VisionTransformer(num_heads=3, **sizes | config)


def convnext(width: int = 24) -> nn.Module:
    """Four stages of a block each, on 8 x 8, 4 x 4, 2 x 2 and one pixel."""
    torch.manual_seed(0)
    sizes = {"depths": (1,) * 4, "dims": (width,) * 4, "patch_size": 1}
    return timm.models.ConvNeXt(in_chans=1, num_classes=10, ls_init_value=None, **sizes)


def with_vision_mamba(prefix_tokens: int = 1, **config) -> nn.Module:
    model = vit(**config)
    torch.manual_seed(0)
    report = swap(model, ATTENTION, TokenMixer, mixer="ssm/vision_mamba", prefix_tokens=prefix_tokens, d_model=48)
    assert [entry.name for entry in report] == [f"blocks.{i}.attn" for i in range(len(model.blocks))]
    return model


def with_images(mixer: str, **config) -> nn.Module:
    model = convnext()
    torch.manual_seed(0)
    report = swap(model, CONVOLUTION, ImageMixer, mixer=mixer, d_model=24, **config)
    assert len(list(report)) == 4
    return model


def with_experts() -> nn.Module:
    model = vit(global_pool="avg")
    torch.manual_seed(0)
    config = {"hidden_size": 48, "intermediate_size": 48, "num_experts": 8, "top_k": 2}
    report = swap(model, "blocks.*.mlp", "moe/sparse_moe", **config)
    assert [entry.name for entry in report] == ["blocks.0.mlp", "blocks.1.mlp"]
    return model


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1797 images (n, 1, 8, 8), centred, and what they show, shuffled."""
    data = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    return ((images - 8) / 8)[order], torch.from_numpy(data.target).long()[order]


def accuracy(model: nn.Module, epochs: int, rate: float, batch: int = 64) -> float:
    """Of the last 450 images, after training on the others."""
    images, answers = digits()
    train, steps = len(images) - 450, (len(images) - 450) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * steps)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(train, generator=generator)[: steps * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), answers[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        return float((model(images[train:]).argmax(1) == answers[train:]).float().mean())


class TestDigits:
    @pytest.mark.parametrize(
        ("build", "epochs", "rate", "kernel"),
        [
            # a class token is there, the mean of the patches answers
            pytest.param(lambda: with_vision_mamba(global_pool="avg"), 8, 5e-3, "selective_scan", id="VisionMamba"),
            pytest.param(lambda: with_images("ssm/ss2d", d_state=8), 5, 3e-3, "selective_scan", id="SS2D"),
            pytest.param(with_experts, 12, 5e-3, "moe_experts", id="SparseMoE"),
        ],
    )
    def test_at_least_95_percent(self, build, epochs, rate, kernel):
        model = build()
        before = _native.calls(kernel) if _native.status().loaded else 0
        reached = accuracy(model, epochs, rate)
        assert reached >= 0.95, f"{reached:.1%}"
        if _native.status().loaded:
            assert _native.calls(kernel) > before


class TestTokens:
    def test_prefix_tokens_stand_in_the_middle_for_the_mixer(self):
        mixer, seen = TokenMixer("ssm/vision_mamba", prefix_tokens=2, d_model=4), []
        mixer.mixer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        mixer.mixer.register_forward_hook(lambda module, args, output: args[0])
        x = torch.arange(7.0).view(1, 7, 1).expand(1, 7, 4)
        assert torch.equal(mixer(x), x)
        assert seen[0][0, :, 0].tolist() == [2, 3, 0, 1, 4, 5, 6]

    def test_the_class_token_sees_patches_on_both_sides(self):
        model = with_vision_mamba()
        x = torch.randn(1, 1, 8, 8, requires_grad=True)
        tokens = model.forward_features(x)
        (grad,) = torch.autograd.grad(tokens[:, 0].sum(), x)
        assert (grad.abs() > 0).all()

    @pytest.mark.parametrize(
        "config",
        [{"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}, {"dynamic_img_size": True}],
        ids=lambda config: next(iter(config)),
    )
    def test_other_prefixes(self, config):
        model = vit(**config)
        swap(
            model,
            ATTENTION,
            TokenMixer,
            mixer="ssm/vision_mamba",
            prefix_tokens=model.num_prefix_tokens,
            d_model=48,
        )
        model(torch.randn(2, 1, 8, 8)).sum().backward()

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda: TokenMixer("ssm/vision_mamba", -1, d_model=4), "prefix_tokens must be at least 0, got -1"),
            (
                lambda: TokenMixer("ssm/vision_mamba", d_model=4)(torch.ones(1, 2, 4), attn_mask=torch.ones(2, 2)),
                "attn_mask must be None and is_causal False, got a mask",
            ),
            (
                lambda: TokenMixer("ssm/vision_mamba", d_model=4)(torch.ones(1, 2, 4), is_causal=True),
                "attn_mask must be None and is_causal False, got is_causal",
            ),
            (
                lambda: TokenMixer("ssm/vision_mamba", 3, d_model=4)(torch.ones(1, 2, 4)),
                "x must have at least prefix_tokens = 3 tokens, got 2",
            ),
            (lambda: TokenMixer("ssm/vision_mambo", d_model=4), "vision_mamba"),
        ],
    )
    def test_bad_input(self, call, words):
        with pytest.raises(ValueError) as caught:
            call()
        assert words in str(caught.value)


class TestSurgery:
    @pytest.mark.parametrize("build", [with_vision_mamba, lambda: with_images("ssm/local_mamba", d_state=2)])
    def test_restore_gives_the_model_back(self, build):
        model = build()
        x = torch.randn(2, 1, 8, 8)
        swapped = model.eval()(x)
        assert torch.equal(copy.deepcopy(model)(x), swapped)
        restore(model)
        untouched = (vit() if hasattr(model, "blocks") else convnext()).eval()
        assert model.state_dict().keys() == untouched.state_dict().keys()
        assert torch.equal(model(x), untouched(x))

    def test_compiled(self):
        torch._dynamo.reset()
        model, x = with_vision_mamba(depth=1).eval(), torch.randn(2, 1, 8, 8)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x))
