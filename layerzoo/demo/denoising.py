"""A UNet of diffusers whose middle is layerzoo.nn.UShapeMamba learns to take noise off the digits, and draws some."""

from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from layerzoo import swap
from layerzoo.bench.plots import svg
from layerzoo.demo.digits import digits
from layerzoo.demo.report import Section
from layerzoo.demo.training import Batch, train

WIDTHS = (16, 32)
TIMES = 100  # steps of noise
DRAWN = 64


def denoise_digits(quick: bool, progress: Progress) -> Section:
    """Trains on some of the digits, then makes new ones from noise."""
    import diffusers

    steps, goal, moments = (40, 0.6, 10) if quick else (600, 0.2, 50)
    (images, _), (held_out, _) = digits()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    unet: Any = diffusers.UNet2DModel(  # type: ignore[no-untyped-call]
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=WIDTHS,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
    )
    swap(unet, "mid_block", "ssm/u_shape_mamba", channels=WIDTHS[-1], temb_channels=4 * WIDTHS[0], d_state=8)
    scheduler: Any = diffusers.DDPMScheduler(TIMES, beta_schedule="squaredcos_cap_v2")  # type: ignore[no-untyped-call]

    def noisy(images: Tensor) -> Batch:
        noise = torch.randn(images.shape, generator=generator)
        times = torch.randint(TIMES, (len(images),), generator=generator)
        return scheduler.add_noise(images, noise, times), noise, times

    def measure(x: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.mse_loss(unet(x, times).sample, noise)
        return loss, loss

    row, plot = train(
        unet,
        measure,
        lambda: noisy(images[torch.randint(len(images), (32,), generator=generator)]),
        noisy(held_out),
        progress,
        what="squared error of the noise",
        form=".2f",
        goal=goal,
        steps=steps,
        rate=4e-3,
        yscale="log",
        yticks=[0.1, 0.2, 0.5, 1],
        yticklabels=["0.1", "0.2", "0.5", "1"],
    )
    samples = noise = torch.randn(DRAWN, *images.shape[1:], generator=generator)
    scheduler.set_timesteps(moments)
    with torch.no_grad():
        for time in progress.track(scheduler.timesteps, description="drawing digits from noise"):
            samples = scheduler.step(unet(samples, time).sample, time, samples, generator=generator).prev_sample
    far, near, real = (
        torch.cdist(some.flatten(1), images.flatten(1)).amin(1).mean().item() for some in (noise, samples, held_out)
    )
    parameters, ours = (
        sum(parameter.numel() for parameter in module.parameters()) / 1e3 for module in (unet, unet.mid_block)
    )
    words = (
        f"diffusers' UNet2DModel ({parameters:.0f} thousand parameters, {ours:.0f} of them in the block that "
        f"layerzoo.swap put there) learns from {len(images)} of scikit-learn's digits to tell the noise in an image, "
        f"which has variance 1; on the other {len(held_out)} its squared error has to be at most {goal}. Then it makes "
        f"{DRAWN} digits from noise in {moments} steps. The last row has the mean distance to the nearest digit it "
        "learned from, of that noise and of what it made; digits it never saw say how near is near enough."
    )
    distance = ("distance to the nearest digit", f"{far:.2f}", f"{near:.2f}", f"held-out digits: {real:.2f}")
    return Section(words, [row, distance], [plot, _grids({"drawn": samples, "real, held-out": held_out[:DRAWN]})])


def _grids(images: dict[str, Tensor]) -> str:
    figure = Figure(figsize=(7, 3.7), layout="constrained")
    for axes, (title, some) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        tiles = F.pad(some.clamp(-1, 1), (1, 1, 1, 1), value=-1).view(8, 8, 10, 10)
        axes.imshow(tiles.transpose(1, 2).reshape(80, 80).numpy(), cmap="gray_r", interpolation="none")
        axes.set_title(title)
        axes.axis("off")
    return svg(figure, "digits")
