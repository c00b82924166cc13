"""scikit-learn's digits, shuffled, and training on them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

TRAIN = 1400


def digits() -> tuple[Tensor, Tensor]:
    """1797 images (n, 1, 8, 8) in [-1, 1] and what they show; the first `TRAIN` are for training."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    data = datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    return (images / 8 - 1)[order], torch.from_numpy(data.target).long()[order]


def train(loss: Callable[[], Tensor], parameters: list[torch.nn.Parameter], steps: int, rate: float) -> list[float]:
    """Minimises what `loss` draws, and returns what it was at each step."""
    optimizer, losses = torch.optim.AdamW(parameters, lr=rate), []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses
