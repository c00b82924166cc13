"""DenseSSM for Mamba: the states of earlier layers join that of a layer before its read-out.

He, Han, Tang, Wang, Yang, Guo and Wang, "DenseMamba: State Space Models with Dense Hidden Connection for Efficient
Large Language Models" (2024), arXiv 2403.00818.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn.ssm.cache import Cache, move_on
from layerzoo.nn.ssm.mamba import Mamba
from layerzoo.ops import causal_conv1d, selective_scan


class _Connection(nn.Module):
    """From an earlier layer's state: a projection of its channels through `rank`, times a gate made from the input."""

    def __init__(self, d_model: int, channels: int, rank: int, like: dict[str, Any]) -> None:
        super().__init__()
        self.down, self.up = (nn.Linear(*size, bias=False, **like) for size in ((channels, rank), (rank, channels)))
        self.gate_down, self.gate_up = nn.Linear(d_model, rank, **like), nn.Linear(rank, channels, **like)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The projection begins at zero."""
        for layer in (self.down, self.gate_down, self.gate_up):
            layer.reset_parameters()
        self.up.weight.zero_()

    def forward(self, read: Tensor, x: Tensor) -> Tensor:
        """read (batch, length, channels), x (batch, length, d_model) -> the shape of read."""
        gate = torch.sigmoid(self.gate_up(F.silu(self.gate_down(x))))
        y: Tensor = gate * self.up(self.down(read))
        return y


class DenseMamba(nn.Module):
    """A stack of Mamba layers, (batch, length, d_model) to the same shape, with dense connections of their states.

    Layer k has x_k = RMSNorm(input), and `input + Mamba_k(x_k)` as its output, where before y = C h its state h_k
    (d_inner, d_state) at each step becomes

    `h_k + sum over i = 1 ... min(m, k) of gate_i(x_k) * P_i h_{k-i}`,    gate_i(x) = sigmoid(W' SiLU(W x + b) + b')

    with m = `dense_layers`; P_i (d_inner, d_inner) of rank `rank` works on the channels of each state, gate_i gives a
    factor for each channel. What the recurrence carries on is h_k as Mamba has it, so the scan stays parallel. Since
    C P_i h = P_i (C h), no state is stored: the scan of layer k - i runs again, with the C of layer k.

    P begins at zero: the stack as without connections.

    Args:
        d_model: width of input and output. num_layers: layers. dense_layers: m. rank: of the connections; "auto" is
        d_model / 16, rounded up. d_state, d_conv, expand: of the layers, as in `Mamba`.

    Raises:
        ValueError: a size out of range, an input of another shape.
    """

    def __init__(
        self,
        d_model: int,
        num_layers: int = 4,
        dense_layers: int = 2,
        rank: int | Literal["auto"] = "auto",
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"DenseMamba: num_layers must be at least 1, got {num_layers}")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        mixers = [Mamba(d_model, d_state, d_conv, expand, **like) for _ in range(num_layers)]
        self._connect(mixers, [nn.RMSNorm(d_model, **like) for _ in mixers], dense_layers, rank)

    @classmethod
    def around(
        cls,
        mixers: Sequence[Mamba],
        norms: Sequence[nn.Module] | None = None,
        dense_layers: int = 2,
        rank: int | Literal["auto"] = "auto",
    ) -> "DenseMamba":
        """The connections around layers that exist, which become part of this one; `norms` are what stands before
        them, fresh RMSNorms if None.

        Raises:
            ValueError: no layer, layers of different sizes, another number of norms. TypeError: a layer that is no
                `Mamba`.
        """
        for mixer in mixers:
            if not isinstance(mixer, Mamba):
                raise TypeError(f"DenseMamba: mixers must be layers of layerzoo.nn.Mamba, got {type(mixer).__name__}")
        sizes = {(mixer.d_model, mixer.d_inner, mixer.d_state) for mixer in mixers}
        if len(sizes) != 1:
            raise ValueError(
                f"DenseMamba: mixers must be layers of one (d_model, d_inner, d_state), got {sorted(sizes)}"
            )
        weight = mixers[0].out_proj.weight
        if norms is None:
            norms = [nn.RMSNorm(mixer.d_model, device=weight.device, dtype=weight.dtype) for mixer in mixers]
        if len(norms) != len(mixers):
            raise ValueError(f"DenseMamba: norms must be as many as mixers, {len(mixers)}, got {len(norms)}")
        stack = cls.__new__(cls)
        nn.Module.__init__(stack)
        stack._connect(mixers, norms, dense_layers, rank)
        return stack

    def _connect(
        self, mixers: Sequence[Mamba], norms: Sequence[nn.Module], dense_layers: int, rank: int | Literal["auto"]
    ) -> None:
        first = mixers[0]
        width = math.ceil(first.d_model / 16) if rank == "auto" else rank
        if dense_layers < 0 or width < 1:
            raise ValueError(
                f"DenseMamba: dense_layers must be at least 0 and rank at least 1, got {dense_layers} and {width}"
            )
        self.d_model, self.dense_layers, self.rank = first.d_model, dense_layers, width
        like = {"device": first.out_proj.weight.device, "dtype": first.out_proj.weight.dtype}
        self.mixers, self.norms = nn.ModuleList(mixers), nn.ModuleList(norms)
        # connections[k][i - 1] leads from layer k - i to layer k
        self.connections = nn.ModuleList(
            nn.ModuleList(
                _Connection(first.d_model, first.d_inner, width, like) for _ in range(min(dense_layers, layer))
            )
            for layer in range(len(mixers))
        )

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        for module in self.modules():
            if isinstance(module, _Connection | nn.RMSNorm | Mamba):
                module.reset_parameters()

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, dense_layers={self.dense_layers}, rank={self.rank}"

    def forward(self, hidden_states: Tensor, cache: Sequence[Cache] | None = None) -> Tensor:
        """hidden_states (batch, length, d_model) -> the same shape.

        `cache`, of `allocate_inference_cache`: read, and moved on in place: the next steps of a sequence, one or more.
        It needs `torch.no_grad()`.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.d_model:
            raise ValueError(
                f"DenseMamba: hidden_states must have shape (batch, length, d_model = {self.d_model}), "
                f"got {tuple(hidden_states.shape)}"
            )
        scans: list[dict[str, Any]] = []  # of the layers so far
        moves: list[tuple[Cache, Tensor, Tensor]] = []  # at the end, since later layers start from the same states
        for index, (mixer, norm) in enumerate(zip(self.mixers, self.norms, strict=True)):
            assert isinstance(mixer, Mamba)
            x = norm(hidden_states)
            own = None if cache is None else cache[index]
            inner, z = mixer.in_proj(x).chunk(2, dim=2)  # b l d each
            left = None if own is None else own[0][:, :, 1:]
            weight = mixer.conv1d.weight.squeeze(1)
            u = causal_conv1d(inner.mT, weight, mixer.conv1d.bias, None, left, activation="silu")
            scan = mixer._scan_arguments(u, z) | {"initial_state": None if own is None else own[1]}
            y, state = selective_scan(**scan, return_last_state=True)
            y, gate = y.mT, F.silu(z)
            connections = self.connections[index]
            assert isinstance(connections, nn.ModuleList)
            for earlier, connection in zip(reversed(scans), connections, strict=False):
                read = selective_scan(**earlier | {"C": scan["C"], "D": None, "z": None})
                y = y + gate * connection(read.mT, x)
            hidden_states = hidden_states + mixer.out_proj(y)
            scans.append(scan)
            if own is not None:
                moves.append((own, inner, state))
        for move in moves:
            move_on(*move)
        return hidden_states

    def allocate_inference_cache(self, batch_size: int) -> list[Cache]:
        """Zero states of every layer, as `Mamba.allocate_inference_cache` has them."""
        return [mixer.allocate_inference_cache(batch_size) for mixer in self.mixers if isinstance(mixer, Mamba)]
