"""The linear layer inside our layers."""

from torch import Tensor, nn

from layerzoo.ops.linear import linear


class Linear(nn.Linear):
    """torch's linear layer, by the fastest way on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
