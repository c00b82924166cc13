"""UShapeMamba in a UNet of diffusers, put there by swap: it trains, it samples, and restore takes it out again."""

import pytest
import torch
from torch.nn import functional as F

from layerzoo import restore, swap
from layerzoo.nn import UShapeMamba

diffusers = pytest.importorskip("diffusers", reason="the extra [diffusion] is not installed")
datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")

WIDTHS = (16, 32)
TEMB = 4 * WIDTHS[0]  # of diffusers' time embedding


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=WIDTHS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def digits() -> torch.Tensor:
    """scikit-learn's 1797 images, (1797, 1, 8, 8) in [-1, 1]."""
    images = torch.as_tensor(datasets.load_digits().images, dtype=torch.float32)
    return images.unsqueeze(1) / 8 - 1


def state(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, value.clone()) for name, value in model.state_dict().items()]


def same(one: list[tuple[str, torch.Tensor]], other: list[tuple[str, torch.Tensor]]) -> bool:
    return [name for name, _ in one] == [name for name, _ in other] and all(
        torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True)
    )


PLACES = {
    "mid_block": ("mid_block", {"channels": 32, "temb_channels": TEMB}),
    "attention of the mid block": ("mid_block.attentions.0", {"channels": 32, "temb_channels": TEMB}),
    "attention of a down block": ("down_blocks.1.attentions.0", {"channels": 32}),
}


@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_swap_and_restore(place):
    target, config = PLACES[place]
    unet = tiny().eval()
    x, before, modules = torch.randn(2, 1, 8, 8), state(unet), dict(unet.named_modules())
    expected = unet(x, 7).sample
    [entry] = swap(unet, target, "ssm/u_shape_mamba", **config)
    assert entry.action == "swapped"
    block = unet.get_submodule(target)
    assert isinstance(block, UShapeMamba)
    for parameter in block.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    calls = []
    block.register_forward_hook(lambda *_: calls.append(1))
    swapped = unet(x, 7).sample
    assert calls == [1]
    assert swapped.shape == x.shape
    assert (swapped - expected).norm() > 0.01 * expected.norm()
    if "temb_channels" in config:
        assert not torch.equal(unet(x, 7).sample, unet(x, 90).sample)
    assert restore(unet)
    assert dict(unet.named_modules()) == modules
    assert same(state(unet), before)
    assert torch.equal(unet(x, 7).sample, expected)


@pytest.mark.slow
def test_a_tiny_unet_with_a_u_shape_mamba_trains_and_samples():
    unet, data = tiny(), digits()
    outside = [entry for entry in state(unet) if not entry[0].startswith("mid_block.")]
    middle = unet.mid_block
    untouched = state(middle)
    swap(unet, "mid_block", "ssm/u_shape_mamba", channels=32, temb_channels=TEMB, d_state=8)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    start = unet.mid_block.bottleneck[0].mixer.in_proj.weight.clone()
    losses = []
    for _ in range(250):
        images = data[torch.randint(len(data), (32,))]
        noise, times = torch.randn_like(images), torch.randint(100, (32,))
        loss = F.mse_loss(unet(scheduler.add_noise(images, noise, times), times).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    trained = sum(losses[-50:]) / 50
    assert trained < 0.26, trained
    assert not torch.equal(start, unet.mid_block.bottleneck[0].mixer.in_proj.weight)

    unet.eval()
    samples = noise = torch.randn(64, 1, 8, 8)
    scheduler.set_timesteps(25)
    with torch.no_grad():
        for time in scheduler.timesteps:
            samples = scheduler.step(unet(samples, time).sample, time, samples).prev_sample
    assert samples.shape == (64, 1, 8, 8)
    assert samples.isfinite().all()
    for figure in (torch.mean, torch.std):
        ours, real, random = (float(figure(x)) for x in (samples, data, noise))
        assert abs(ours - real) < abs(random - real), f"{figure.__name__}: {ours}, data {real}, noise {random}"
    nearest, far = (float(torch.cdist(x.flatten(1), data.flatten(1)).amin(1).mean()) for x in (samples, noise))
    assert nearest < 0.6 * far, f"distance to the nearest digit: {nearest}, of noise {far}"

    assert restore(unet)
    assert unet.mid_block is middle
    assert same(state(middle), untouched)
    assert [name for name, _ in state(unet) if not name.startswith("mid_block.")] == [name for name, _ in outside]
