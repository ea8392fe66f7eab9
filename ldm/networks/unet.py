"""The denoising network of all families."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import UNetConfig
from ldm.networks.attention import SpatialTransformer, zero
from ldm.networks.modules import Layers, Modules


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """[cos, sin] of t at dim/2 frequencies from 1 down to 1/10000, in float32: t [b] -> [b, dim].

    Vaswani et al. 2017, section 3.5, cosines first as in the original code.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Downsample(nn.Module):
    """Half the size, by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest enlargement to the size of the skip it will meet (twice the size, or one less), then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions around which x is added; the time embedding is added between them."""

    def __init__(self, channels: int, emb_dim: int, out_channels: int):
        super().__init__()
        self.in_layers = Layers(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = Layers(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        self.out_layers = Layers(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # x [b, c, h, w], emb [b, emb_dim]
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Block(nn.ModuleList):
    """Layers in a row, each given what it asks for."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, size: tuple[int, int] = (0, 0)) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Noise or v prediction from a noisy latent (Rombach et al. 2022, section 3.2 and appendix B).

    Parameter names are those of the published checkpoints: input_blocks go down, output_blocks come up, and the
    last number of a name counts layers inside a block. `describe` says what each block is.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width, emb_dim = config.model_channels, 4 * config.model_channels
        widths = [width * m for m in config.channel_mult]

        def transformer(channels: int, depth: int, cross_only: bool = False) -> SpatialTransformer:
            heads, linear = config.heads_of(channels), config.linear_proj
            return SpatialTransformer(
                channels, config.context_dim, heads, depth, linear_proj=linear, cross_only=cross_only
            )

        def embedding(inputs: int) -> Layers:
            return Layers(nn.Linear(inputs, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))

        self.time_embed = embedding(width)
        if config.vector_dim is not None:
            self.label_emb: nn.Module = nn.Sequential(embedding(config.vector_dim))
        elif config.noise_levels is not None:
            self.label_emb = nn.Embedding(config.noise_levels, emb_dim)

        self.input_blocks = Modules([Block([nn.Conv2d(config.in_channels, width, 3, padding=1)])])
        skips, channels = [width], width
        for level, depths in enumerate(config.down_depth):
            for depth in depths:
                layers: list[nn.Module] = [ResBlock(channels, emb_dim, widths[level])]
                channels = widths[level]
                if depth:
                    layers.append(transformer(channels, depth, config.cross_only[level]))
                self.input_blocks.append(Block(layers))
                skips.append(channels)
            if level < len(widths) - 1:
                self.input_blocks.append(Block([Downsample(channels)]))
                skips.append(channels)

        self.middle_block = Block([ResBlock(channels, emb_dim, channels)])
        if config.mid_depth is not None:
            self.middle_block.extend([transformer(channels, config.mid_depth), ResBlock(channels, emb_dim, channels)])

        self.output_blocks: Modules[Block] = Modules()
        for level, depths in zip(reversed(range(len(widths))), config.up_depth, strict=True):
            for i, depth in enumerate(depths):
                layers = [ResBlock(channels + skips.pop(), emb_dim, widths[level])]
                channels = widths[level]
                if depth:
                    layers.append(transformer(channels, depth, config.cross_only[level]))
                if level > 0 and i == len(depths) - 1:
                    layers.append(Upsample(channels))
                self.output_blocks.append(Block(layers))

        self.out = Layers(
            nn.GroupNorm(32, channels), nn.SiLU(), zero(nn.Conv2d(channels, config.out_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict eps or v, whichever the weights were trained for.

        x        [b, in_channels, h, w]: the noisy latent and the inputs concatenated to it
        t        [b] timesteps, fractional ones allowed
        context  [b, n, context_dim]
        y        [b, vector_dim], or [b] integer noise levels; None where the family has no such input
        Returns [b, out_channels, h, w].
        """
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb, context, size=skips[-1].shape[2:] if skips else x.shape[2:])
        return self.out(x)

    def describe(self) -> str:
        """The table of blocks: name, layers, resolution, channels, transformer depth, and the name in diffusers."""
        n, levels = self.config.num_res_blocks, range(len(self.config.channel_mult))
        down, up = [(1, "conv_in")], list[tuple[int, str]]()  # downsampling factor and diffusers name of every block
        for level in levels:
            down += [(2**level, f"down_blocks.{level}.resnets.{i}") for i in range(n)]
            down += [(2 ** (level + 1), f"down_blocks.{level}.downsamplers.0")] * (level < levels[-1])
            up += [(2 ** levels[-1 - level], f"up_blocks.{level}.resnets.{i}") for i in range(n + 1)]
        rows = [["block", "layers", "resolution", "channels", "depth", "diffusers"]]
        for i, (block, place) in enumerate(zip(self.input_blocks, down, strict=True)):
            rows.append(_row(f"input_blocks.{i}", block, *place))
        rows.append(_row("middle_block", self.middle_block, self.config.factor, "mid_block"))
        for i, (block, place) in enumerate(zip(self.output_blocks, up, strict=True)):
            rows.append(_row(f"output_blocks.{i}", block, *place))
        columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(n) for cell, n in zip(row, columns, strict=True)).rstrip() for row in rows
        )


def _row(name: str, block: Block, factor: int, diffusers: str) -> list[str]:
    kinds = {ResBlock: "res", SpatialTransformer: "transformer", Downsample: "down", Upsample: "up", nn.Conv2d: "conv"}
    channels = next(p.shape[0] for layer in reversed(block) for p in [*layer.parameters()][-1:])
    depth = sum(len(layer.transformer_blocks) for layer in block if isinstance(layer, SpatialTransformer))
    layers = " ".join(kinds[type(layer)] for layer in block)
    return [name, layers, f"1/{factor}", str(channels), str(depth or "-"), diffusers]
