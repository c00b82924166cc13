"""A classifier of timm whose attention is layerzoo.nn.VisionMamba learns the digits."""

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from layerzoo import swap
from layerzoo.demo.digits import digits
from layerzoo.demo.report import Section
from layerzoo.demo.training import Batch, train
from layerzoo.hosts.timm import TokenMixer

WIDTH = 48


def classify_digits(quick: bool, progress: Progress) -> Section:
    """Trains on some of the digits and answers for the others."""
    import timm

    depth, steps, goal = (1, 40, 0.5) if quick else (2, 200, 0.95)
    (images, answers), held_out = digits()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        global_pool="avg",
        embed_dim=WIDTH,
        depth=depth,
        num_heads=3,
    )
    prefix = model.num_prefix_tokens
    swap(model, "blocks.*.attn", TokenMixer, mixer="ssm/vision_mamba", prefix_tokens=prefix, d_model=WIDTH)

    def draw() -> Batch:
        chosen = torch.randint(len(images), (64,), generator=generator)
        return images[chosen], answers[chosen]

    def measure(images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        return F.cross_entropy(logits, answers), (logits.argmax(1) == answers).float().mean()

    row, plot = train(
        model,
        measure,
        draw,
        held_out,
        progress,
        what="right answers",
        form=".1%",
        goal=goal,
        steps=steps,
        rate=5e-3,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    words = (
        f"timm's VisionTransformer ({depth} blocks of width {WIDTH}, {parameters / 1e3:.0f} thousand parameters), its "
        f"attention replaced by layerzoo.swap, learns {len(images)} of scikit-learn's digits, images of 8 x 8 pixels, "
        f"and names the other {len(held_out[0])}. At least {goal:.0%} of these answers have to be right."
    )
    return Section(words, [row], [plot])
