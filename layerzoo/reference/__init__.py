"""The ops in plain PyTorch: the oracle of the tests, the fallback without kernels, and the maths written out."""

import torch
from torch import Tensor


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """The type computed in: float64 for float64 input, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
