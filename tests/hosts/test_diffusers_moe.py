"""TimeSpaceMoE in place of the feed-forward layers of a diffusion transformer: it trains, samples, and goes again."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerzoo import restore, swap
from layerzoo.nn import TimeSpaceMoE

diffusers = pytest.importorskip("diffusers", reason="the extra [diffusion] is not installed")
datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")


def tiny():
    """PixArt's transformer: 16 patches of 2 x 2 pixels, two blocks, text of width 12."""
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        cross_attention_dim=48,
        sample_size=8,
        patch_size=2,
        caption_channels=12,
        use_additional_conditions=False,
        norm_num_groups=1,
    )


class RegionFeedForward(nn.Module):
    """What a block calls with its tokens alone: the rest comes from the calls around it."""

    def __init__(self, block, seen):
        super().__init__()
        self.layer = TimeSpaceMoE(48, 48, space_experts=4, time_experts=3, intermediate_size=96)
        self.seen = seen
        block.attn2.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, attention, args, kwargs):
        query, key = attention.to_q(args[0]), attention.to_k(kwargs["encoder_hidden_states"])
        query, key = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (query, key))
        scores = (query @ key.mT * attention.scale).softmax(3).mean(1)
        self.here = kwargs["encoder_hidden_states"], scores

    def forward(self, hidden_states):
        text, scores = self.here
        return self.layer(hidden_states, text, scores, self.seen["timestep"])


def with_experts(model):
    seen = {}
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(timestep=kwargs["timestep"]), with_kwargs=True)
    blocks = {block.ff: block for block in model.transformer_blocks}
    return swap(model, "transformer_blocks.*.ff", lambda old: RegionFeedForward(blocks[old], seen))


@pytest.mark.slow
def test_a_tiny_diffusion_transformer_trains_and_samples():
    model, data = tiny(), datasets.load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    classes = torch.as_tensor(data.target)
    words = torch.randn(10, 3, 12)  # three words that say which digit
    old = [block.ff for block in model.transformer_blocks]
    assert len(with_experts(model).entries) == 2
    layers = [block.ff.layer for block in model.transformer_blocks]
    start = [layer.space_experts.w13.clone() for layer in layers]
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses, steps_met = [], [set() for _ in layers]
    for met, layer in zip(steps_met, layers, strict=True):
        layer.time_gate.register_forward_hook(lambda _m, _i, logits, met=met: met.update(logits.argmax(1).tolist()))
    for _ in range(400):
        rows, times = torch.randint(len(images), (64,)), torch.randint(100, (64,))
        noise = torch.randn_like(images[rows])
        noisy = scheduler.add_noise(images[rows], noise, times)
        text = words[classes[rows]]
        loss = F.mse_loss(model(noisy, encoder_hidden_states=text, timestep=times).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    trained = sum(losses[-50:]) / 50
    assert trained < 0.35, trained
    assert not any(torch.equal(a, layer.space_experts.w13) for a, layer in zip(start, layers, strict=True))
    assert max(map(len, steps_met)) > 1  # steps take different ways

    model.eval()
    asked = torch.arange(10).repeat_interleave(8)
    samples = noise = torch.randn(80, 1, 8, 8)
    scheduler.set_timesteps(25)
    with torch.no_grad():
        for time in scheduler.timesteps:
            out = model(samples, encoder_hidden_states=words[asked], timestep=time.expand(80)).sample
            samples = scheduler.step(out, time, samples).prev_sample
    assert samples.isfinite().all()
    nearest, far = (float(torch.cdist(x.flatten(1), images.flatten(1)).amin(1).mean()) for x in (samples, noise))
    assert nearest < 0.7 * far, f"distance to the nearest digit: {nearest}, of noise {far}"
    got = classes[torch.cdist(samples.flatten(1), images.flatten(1)).argmin(1)]
    right = float((got == asked).float().mean())
    assert right > 0.3, right

    assert restore(model)
    assert [block.ff for block in model.transformer_blocks] == old
