"""The feed-forward layer of Switch Transformers: each token through one expert.

Fedus, Zoph and Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity"
(2021), arXiv 2101.03961.
"""

import torch

from layerzoo.nn.moe.sparse_moe import SparseMoE
from layerzoo.ops.moe.experts import Activation


class SwitchFFN(SparseMoE):
    """Maps (..., hidden_size) to the same shape by the most probable of `num_experts` plain feed-forward layers.

    What the expert gives is scaled by its probability. An expert takes at most ceil(capacity_factor T / E) of T tokens,
    the first ones; for the others the layer gives zeros, so put a residual connection around it.

    Args:
        hidden_size, intermediate_size, num_experts: as in `SparseMoE`.
        capacity_factor: while training; eval_capacity_factor: in eval mode. None: any number of tokens.
        jitter: while training the router sees x times uniform numbers in [1 - jitter, 1 + jitter].
        activation: between the matrices. bias: whether experts have biases.

    Raises:
        ValueError: as `SparseMoE`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = 2.0,
        jitter: float = 0.01,
        activation: Activation = "relu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            intermediate_size,
            num_experts,
            1,
            normalize=False,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            jitter=jitter,
            activation=activation,
            gated=False,
            bias=bias,
            device=device,
            dtype=dtype,
        )
