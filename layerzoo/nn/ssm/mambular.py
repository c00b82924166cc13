"""Mambular: a table's features as a sequence for Mamba.

Thielmann, Kumar, Weisser, Reuter, Säfken and Samiee, "Mambular: A Sequential Model for Tabular Deep Learning" (2024),
arXiv 2408.06291, with the periodic features of Gorishniy, Rubachev and Babenko, "On Embeddings for Numerical Features
in Tabular Deep Learning" (2022), arXiv 2203.05556.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn.ssm.mamba import Mamba


class _Numeric(nn.Module):
    """One token for each number: W_j e(x_j) + b_j, with e(x) = x, or sines and cosines of learned frequencies of x."""

    def __init__(self, features: int, d_model: int, frequencies: int, like: dict[str, Any]) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.empty(features, frequencies, **like)) if frequencies else None
        self.weight = nn.Parameter(torch.empty(features, 2 * frequencies or 1, d_model, **like))
        self.bias = nn.Parameter(torch.empty(features, d_model, **like))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.frequency is not None:
            self.frequency.normal_()
        bound = self.weight.shape[1] ** -0.5
        self.weight.uniform_(-bound, bound)
        self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features) -> (batch, features, d_model)."""
        encoded = x.unsqueeze(2)
        if self.frequency is not None:
            angle = 2 * math.pi * self.frequency * encoded
            encoded = torch.cat([angle.sin(), angle.cos()], dim=2)
        tokens = (encoded.unsqueeze(2) @ self.weight).squeeze(2) + self.bias
        return tokens if self.frequency is None else F.relu(tokens)


class _Block(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, d_model: int, options: dict[str, Any], like: dict[str, Any]) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, **like)
        self.mixer = Mamba(d_model, **options, **like)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.mixer(self.norm(x))
        return y


class Mambular(nn.Module):
    """Maps the rows of a table to (batch, out_features): logits, or values of a regression.

    Every feature is a token: numbers by an encoding, categories by a table each; the numbers come first. Mamba blocks,
    `x + Mamba(RMSNorm(x))`, go over the features from the first to the last; then come a norm, the mean over the
    features, and an MLP. A feature knows those before it, so the order of the columns is a part of the model: the
    prediction of permuted columns is another one, even if their tokens are permuted along.

    Args:
        numeric: number of numeric features. categories: number of values of each categorical feature.
        out_features: width of the output. d_model: width of a token. num_layers: Mamba blocks. head: hidden width of
        the MLP; None is d_model.
        encoding: of numbers: "linear", or "periodic" with `frequencies` sines and cosines, a linear layer and ReLU.
        frequencies: of each numeric feature, with "periodic".
        d_state, d_conv, expand: of the blocks, as in `Mamba`.

    Raises:
        ValueError: a size out of range, no feature at all, an unknown encoding; inputs of other shapes or none where
            there must be one. IndexError: an id that is no category of its feature.
    """

    def __init__(
        self,
        numeric: int,
        categories: Sequence[int] = (),
        out_features: int = 1,
        d_model: int = 64,
        num_layers: int = 4,
        head: int | None = None,
        encoding: Literal["linear", "periodic"] = "periodic",
        frequencies: int = 16,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = d_model if head is None else head
        sizes = {"out_features": out_features, "d_model": d_model, "num_layers": num_layers, "head": hidden}
        for name, size in (sizes | {"frequencies": frequencies}).items():
            if size < 1:
                raise ValueError(f"Mambular: {name} must be at least 1, got {size}")
        if numeric < 0 or any(size < 1 for size in categories):
            raise ValueError(
                f"Mambular: numeric must be at least 0 and each of categories at least 1, got {numeric} and "
                f"{list(categories)}"
            )
        if not numeric and not categories:
            raise ValueError("Mambular: there must be a feature, but numeric is 0 and categories is empty")
        if encoding not in ("linear", "periodic"):
            raise ValueError(f"Mambular: encoding must be 'linear' or 'periodic', got {encoding!r}")
        self.numeric, self.categories, self.encoding = numeric, tuple(categories), encoding
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        waves = frequencies if encoding == "periodic" else 0
        self.numeric_embedding = _Numeric(numeric, d_model, waves, like) if numeric else None
        self.category_embeddings = nn.ModuleList(nn.Embedding(size, d_model, **like) for size in categories)
        options: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.layers = nn.ModuleList(_Block(d_model, options, like) for _ in range(num_layers))
        self.norm = nn.RMSNorm(d_model, **like)
        self.head = nn.Sequential(
            nn.Linear(d_model, hidden, **like), nn.SiLU(), nn.Linear(hidden, out_features, **like)
        )

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for module in (*self.children(), *self.category_embeddings, *self.head, *self.layers):
            if isinstance(module, _Block):
                module.norm.reset_parameters()
                module.mixer.reset_parameters()
            elif isinstance(module, _Numeric | nn.Embedding | nn.RMSNorm | nn.Linear):
                module.reset_parameters()

    def extra_repr(self) -> str:
        return f"numeric={self.numeric}, categories={list(self.categories)}, encoding={self.encoding}"

    def forward(self, numbers: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """numbers (batch, numeric), floating; ids (batch, len(categories)), integer -> (batch, out_features).

        Of the two, what the table does not have is None. Numbers should be scaled to about unit variance.
        """
        x = self.tokens(numbers, ids)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(self.norm(x).mean(1))
        return y

    def tokens(self, numbers: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """The embedded features, (batch, numeric + len(categories), d_model)."""
        for name, x, width in (("numbers", numbers, self.numeric), ("ids", ids, len(self.categories))):
            got = None if x is None else tuple(x.shape)
            if width and (x is None or x.dim() != 2 or x.shape[1] != width):
                raise ValueError(f"Mambular: {name} must have shape (batch, {width}), got {got}")
            if not width and x is not None:
                raise ValueError(f"Mambular: {name} must be None, since there are no such features, got {got}")
        parts = []
        if self.numeric_embedding is not None:
            parts.append(self.numeric_embedding(numbers))
        if ids is not None:
            parts += [table(ids[:, i]).unsqueeze(1) for i, table in enumerate(self.category_embeddings)]
        return torch.cat(parts, dim=1)
