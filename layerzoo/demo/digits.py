"""scikit-learn's handwritten digits, which need no download."""

import torch
from torch import Tensor

HELD_OUT = 450  # of 1797


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (n, 1, 8, 8) in [-1, 1] and what they show, shuffled: those to train on, and those held out."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().unsqueeze(1)[order] / 8 - 1
    answers = torch.from_numpy(data.target)[order]
    return (images[HELD_OUT:], answers[HELD_OUT:]), (images[:HELD_OUT], answers[:HELD_OUT])
