"""A classifier of timm with layerzoo.nn.VisionMamba for attention and SparseMoE for its MLPs learns the digits."""

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional as F

from layerzoo import swap
from layerzoo.bench.plots import svg
from layerzoo.demo.digits import digits
from layerzoo.demo.report import Section
from layerzoo.demo.training import Batch, train
from layerzoo.hosts.timm import TokenMixer
from layerzoo.nn.moe import RouterStats

WIDTH, EXPERTS, CHOSEN = 48, 8, 2


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
    experts = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_experts": EXPERTS, "top_k": CHOSEN}
    swap(model, "blocks.*.mlp", "moe/sparse_moe", **experts)
    stats = RouterStats(model)

    def draw() -> Batch:
        chosen = torch.randint(len(images), (64,), generator=generator)
        return images[chosen], answers[chosen]

    def measure(images: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        loss = F.cross_entropy(logits, answers) + stats.loss(balance=0.01)
        return loss, (logits.argmax(1) == answers).float().mean()

    with stats:
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
        f"attention and MLPs replaced by layerzoo.swap, learns {len(images)} of scikit-learn's digits, images of 8 x 8 "
        f"pixels, and names the other {len(held_out[0])}. At least {goal:.0%} of these answers have to be right. Of "
        f"{EXPERTS} experts in a block each patch meets {CHOSEN}; the second plot is what RouterStats saw of that."
    )
    return Section(words, [row], [plot, svg(stats.figure(), "experts")])
