"""U-Shape Mamba: Mamba blocks in a U over the tokens of an image, for denoising.

Ergasti, Botti, Fontanini, Ferrari, Bertozzi and Prati, "U-Shape Mamba: State Space Model for faster diffusion" (2025),
arXiv 2504.13499, with the paths of Hu et al., "ZigMa: A DiT-style Zigzag Mamba Diffusion Model" (2024), arXiv
2403.13802, and the adaptive norm of Peebles and Xie, "Scalable Diffusion Models with Transformers" (2022), arXiv
2212.09748.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.nn.ssm.mamba import Mamba

# Zigzags: along rows or, with True, along columns, after turning the grid round these axes (1 height, 2 width).
PATHS: tuple[tuple[bool, tuple[int, ...]], ...] = tuple(
    (columns, flipped) for flipped in ((), (1, 2), (1,), (2,)) for columns in (False, True)
)


def _zigzag(x: Tensor) -> Tensor:
    """Turns every second row of (batch, height, width, channels) round, so that neighbours on the path are neighbours
    in the image. Twice is nothing."""
    odd = torch.arange(x.shape[1], device=x.device) % 2 == 1
    return torch.where(odd.view(-1, 1, 1), x.flip(2), x)


class _Block(nn.Module):
    """x + gate mixer(norm(x) (1 + scale) + shift) over a grid of tokens, along one of the paths."""

    def __init__(
        self, channels: int, temb_channels: int | None, path: int, options: dict[str, Any], like: dict[str, Any]
    ) -> None:
        super().__init__()
        self.path = path % len(PATHS)
        adaptive = temb_channels is not None
        self.norm = nn.LayerNorm(channels, elementwise_affine=not adaptive, **like)
        self.modulation = nn.Linear(temb_channels, 3 * channels, **like) if temb_channels is not None else None
        self.mixer = Mamba(channels, **options, **like)

    def extra_repr(self) -> str:
        columns, flipped = PATHS[self.path]
        return f"path={self.path} ({'columns' if columns else 'rows'}, flipped={flipped})"

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """x (batch, height, width, channels), temb (batch, temb_channels) -> the shape of x."""
        if self.modulation is None or temb is None:
            plain: Tensor = x + self._mix(self.norm(x))
            return plain
        shift, scale, gate = self.modulation(F.silu(temb))[:, None, None].chunk(3, dim=3)
        y: Tensor = x + gate * self._mix(self.norm(x) * (1 + scale) + shift)
        return y

    def _mix(self, x: Tensor) -> Tensor:
        columns, flipped = PATHS[self.path]
        grid = x.flip(flipped) if flipped else x
        grid = _zigzag(grid.transpose(1, 2) if columns else grid)
        y = _zigzag(self.mixer(grid.flatten(1, 2)).view(grid.shape))
        y = y.transpose(1, 2) if columns else y
        return y.flip(flipped) if flipped else y


class _Merge(nn.Module):
    """Two neighbours along an axis of the grid (1 height, 2 width) become one token."""

    def __init__(self, channels: int, axis: int, like: dict[str, Any]) -> None:
        super().__init__()
        self.axis = axis
        self.proj = nn.Linear(2 * channels, channels, **like)

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(self.axis, (-1, 2)).movedim(self.axis + 1, 3)
        y: Tensor = self.proj(pairs.flatten(3))
        return y


class _Expand(nn.Module):
    """One token becomes two neighbours along an axis; what was there before the merge joins them."""

    def __init__(self, channels: int, axis: int, like: dict[str, Any]) -> None:
        super().__init__()
        self.axis = axis
        self.proj = nn.Linear(channels, 2 * channels, **like)
        self.join = nn.Linear(2 * channels, channels, **like)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        pairs = self.proj(x).unflatten(3, (2, -1)).movedim(3, self.axis + 1)
        y: Tensor = self.join(torch.cat([pairs.flatten(self.axis, self.axis + 1), skip], dim=3))
        return y


class UShapeMamba(nn.Module):
    """Maps feature maps (batch, channels, height, width) to the same shape: a residual block of a denoiser.

    Every pixel is a token. The encoder is `stages` times `depth` Mamba blocks and a merge of neighbours in pairs, along
    width, then height, and so on, which halves the tokens; then come `depth` blocks, the bottleneck; the decoder undoes
    the merges in turn, joins what the encoder had there, and has `depth` blocks too. Each block scans along the next of
    eight zigzags. The last projection and the gates of the adaptive norms begin at zero: the layer as the identity.

    Args:
        channels: of input, output and every token. temb_channels: width of the time embedding; None: there is none.
        stages: merges. depth: blocks of each stage, of the bottleneck and of each stage of the decoder.
        d_state, d_conv, expand: of the blocks, as in `Mamba`.

    Raises:
        ValueError: a size out of range; an input of another shape, or whose height or width the merges do not divide;
            a time embedding where there is to be none, or none where there is to be one.
    """

    def __init__(
        self,
        channels: int,
        temb_channels: int | None = None,
        stages: int = 2,
        depth: int = 1,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if channels < 1 or depth < 1:
            raise ValueError(f"UShapeMamba: channels and depth must be at least 1, got {channels} and {depth}")
        if stages < 0:
            raise ValueError(f"UShapeMamba: stages must be at least 0, got {stages}")
        if temb_channels is not None and temb_channels < 1:
            raise ValueError(f"UShapeMamba: temb_channels must be at least 1, or None, got {temb_channels}")
        self.channels, self.temb_channels, self.stages, self.depth = channels, temb_channels, stages, depth
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {"d_state": d_state, "d_conv": d_conv, "expand": expand}

        def blocks(first: int) -> nn.ModuleList:
            numbers = range(first * depth, (first + 1) * depth)
            return nn.ModuleList(_Block(channels, temb_channels, number, options, like) for number in numbers)

        axes = [2 - stage % 2 for stage in range(stages)]
        self.encoder = nn.ModuleList(blocks(stage) for stage in range(stages))
        self.merges = nn.ModuleList(_Merge(channels, axis, like) for axis in axes)
        self.bottleneck = blocks(stages)
        self.expands = nn.ModuleList(_Expand(channels, axis, like) for axis in reversed(axes))
        self.decoder = nn.ModuleList(blocks(stages + 1 + stage) for stage in range(stages))
        self.norm = nn.LayerNorm(channels, **like)
        self.out_proj = nn.Linear(channels, channels, **like)
        self._reset_zeros()

    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm, Mamba)  # Mamba after its own linear layers
        for kind in kinds:
            for module in self.modules():
                if isinstance(module, kind):
                    module.reset_parameters()  # type: ignore[operator]
        self._reset_zeros()

    @torch.no_grad()
    def _reset_zeros(self) -> None:
        zeros = [module.modulation for module in self.modules() if isinstance(module, _Block)]
        for layer in (self.out_proj, *zeros):
            if layer is not None:
                layer.weight.zero_()
                layer.bias.zero_()

    def extra_repr(self) -> str:
        return f"channels={self.channels}, stages={self.stages}, depth={self.depth}"

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """hidden_states (batch, channels, height, width) -> the same shape.

        `temb` (batch, temb_channels): the embedding of the time step, before its last non-linearity, as diffusers'
        blocks get it. Width must be divisible by 2^ceil(stages / 2), height by 2^floor(stages / 2).
        """
        self._check(hidden_states, temb)
        x = hidden_states.permute(0, 2, 3, 1)
        skips: list[Tensor] = []
        for blocks, merge in zip(self.encoder, self.merges, strict=True):
            x = _through(blocks, x, temb)
            skips.append(x)
            x = merge(x)
        x = _through(self.bottleneck, x, temb)
        for expand, blocks in zip(self.expands, self.decoder, strict=True):
            x = _through(blocks, expand(x, skips.pop()), temb)
        y: Tensor = hidden_states + self.out_proj(self.norm(x)).permute(0, 3, 1, 2)
        return y

    def _check(self, x: Tensor, temb: Tensor | None) -> None:
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"UShapeMamba: hidden_states must have shape (batch, channels = {self.channels}, height, width), "
                f"got {tuple(x.shape)}"
            )
        of_height, of_width = 2 ** (self.stages // 2), 2 ** ((self.stages + 1) // 2)
        if x.shape[2] % of_height or x.shape[3] % of_width:
            raise ValueError(
                f"UShapeMamba: height must be divisible by {of_height} and width by {of_width} (stages = "
                f"{self.stages}), got {x.shape[2]} and {x.shape[3]}"
            )
        if self.temb_channels is None:
            if temb is not None:
                raise ValueError("UShapeMamba: temb must be None, since temb_channels is")
        elif temb is None or temb.shape != (x.shape[0], self.temb_channels):
            raise ValueError(
                f"UShapeMamba: temb must have shape (batch, temb_channels) = {(x.shape[0], self.temb_channels)}, "
                f"got {None if temb is None else tuple(temb.shape)}"
            )


def _through(blocks: nn.Module, x: Tensor, temb: Tensor | None) -> Tensor:
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        x = block(x, temb)
    return x
