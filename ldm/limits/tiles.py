"""The VAE strip by strip, for pictures whose layers are too large to be held several times over: it needs less memory.

Tiles that each go through the whole network show their borders, because its GroupNorms look at all of the picture and
a tile would be normed by itself. So here the picture goes layer by layer, and every layer is computed on strips, from
top to bottom: a convolution sees a row or two of the neighbouring strips, a norm the mean and variance of all strips.
A strip is freed as soon as nothing needs it any more, and strips may rest in another memory than the one they are
computed in. Only rounding differs from the network in one piece. SD 1's decoder holds 349 numbers per pixel at its peak
instead of 983 (512 x 512 pixels in float32 on the CPU, strips as large as 128 x 128).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.networks.vae import VAE, Level, ResnetBlock

TILE = 512  # side in pixels of the square that a strip is as large as

Layer = Callable[[Tensor], Tensor]


def decode(vae: VAE, latent: Tensor, tile: int, rest: torch.device | None = None) -> Tensor:
    """`vae.decode(latent)` in strips of about tile x tile pixels, all as wide as the picture.

    rest  where layers rest while they are not computed with; None: with the latent
    """
    decoder, height = vae.decoder, _height(vae, tile, latent.shape[3] * vae.config.factor)
    z = vae.post_quant_conv(latent / vae.config.scale)
    x = decoder.mid(decoder.conv_in(z))  # in one piece: it has as few places as latents
    strips = Strips.of(x, height, rest)
    del x
    for level in reversed(decoder.up):
        strips = _level(level, strips)
    norm = _normed(decoder.norm_out, strips)
    return strips.through(lambda x: decoder.conv_out(F.silu(norm(x))), halo=1).whole()


def moments(vae: VAE, image: Tensor, tile: int, rest: torch.device | None = None) -> Tensor:
    """`vae.moments(image)` in strips of about tile x tile pixels. `rest` as for `decode`."""
    encoder, factor = vae.encoder, vae.config.factor
    strips = Strips.of(image, factor * _height(vae, tile, image.shape[3]), rest).through(encoder.conv_in, halo=1)
    for level in encoder.down:
        strips = _level(level, strips)
    return vae.quant_conv(encoder.conv_out(F.silu(encoder.norm_out(encoder.mid(strips.whole())))))


def _height(vae: VAE, tile: int, width: int) -> int:
    """Rows of latent cells in a strip of a picture that is `width` pixels wide."""
    return max(1, tile * tile // (width * vae.config.factor))


@dataclass(frozen=True)
class Strips:
    """A picture's rows from top to bottom. A layer that is computed on them frees them."""

    rows: list[Tensor]  # [b, c, h, w] each, of the whole width
    device: torch.device  # where they are computed with

    @staticmethod
    def of(x: Tensor, height: int, rest: torch.device | None) -> Strips:
        """x [b, c, H, w] in strips of `height` rows, the last one maybe of fewer."""
        return Strips([part.to(rest or x.device) for part in x.split(height, dim=2)], x.device)

    def whole(self) -> Tensor:
        """All rows again in one piece."""
        return torch.cat([part.to(self.device) for part in self.rows], dim=2)

    def through(self, layer: Layer, *, halo: int = 0, leave: Layer | None = None) -> Strips:
        """The picture through `layer`, which looks no further than a few rows.

        halo   rows beyond a strip that the layer looks at, rounded up to a multiple of its stride
        leave  a layer that replaces each strip of this picture by its output; None: the strip's memory is freed
        """
        made, above = [], None
        for i, strip in enumerate(self.rows):
            below = self.rows[i + 1][:, :, :halo] if halo and i + 1 < len(self.rows) else None
            x = torch.cat([rows.to(self.device) for rows in (above, strip, below) if rows is not None], dim=2)
            y = layer(x)
            extra = [0 if rows is None else rows.shape[2] * y.shape[2] // x.shape[2] for rows in (above, below)]
            made.append(y[:, :, extra[0] : y.shape[2] - extra[1]].to(strip.device))
            above = strip[:, :, -halo:].clone() if halo else None  # a view would keep all of the strip
            self.rows[i] = strip.new_empty(0) if leave is None else leave(strip.to(self.device)).to(strip.device)
        return Strips(made, self.device)

    def plus(self, other: Strips) -> Strips:
        """The sum of two pictures."""
        made = []
        for i, strip in enumerate(self.rows):
            made.append((strip.to(self.device) + other.rows[i].to(self.device)).to(strip.device))
            self.rows[i] = other.rows[i] = strip.new_empty(0)
        return Strips(made, self.device)


def _level(level: Level, strips: Strips) -> Strips:
    for block in level.block:
        strips = _block(block, strips)
    if level.downsample is not None:
        strips = strips.through(level.downsample, halo=2)  # it looks one row down; two are a row of what it gives
    if level.upsample is not None:
        strips = strips.through(level.upsample, halo=1)
    return strips


def _block(block: ResnetBlock, x: Strips) -> Strips:
    norm1 = _normed(block.norm1, x)
    h = x.through(lambda x: block.conv1(F.silu(norm1(x))), halo=1, leave=block.nin_shortcut)
    norm2 = _normed(block.norm2, h)
    return x.plus(h.through(lambda h: block.conv2(F.silu(norm2(h))), halo=1))


def _normed(norm: nn.GroupNorm, strips: Strips) -> Layer:
    """The norm with the mean and variance of all strips, as a function of rows; in float32, as inside of torch."""
    counts, moments = [], []
    for strip in strips.rows:
        groups = strip.to(strips.device).float().unflatten(1, (norm.num_groups, -1)).flatten(2)
        counts.append(groups.shape[2])
        moments.append(torch.stack(torch.var_mean(groups, dim=2, correction=0)))
    share = torch.tensor(counts, device=strips.device).div(sum(counts))[:, None, None]
    variances, means = torch.stack(moments, dim=1)
    mean = (share * means).sum(0)  # [b, g]
    variance = (share * (variances + (means - mean).square())).sum(0)
    repeat = norm.num_channels // norm.num_groups
    mean, scale = (
        s.repeat_interleave(repeat, dim=1)[:, :, None, None] for s in (mean, torch.rsqrt(variance + norm.eps))
    )
    scale = scale * norm.weight.float()[:, None, None]
    shift = norm.bias.float()[:, None, None] - mean * scale
    return lambda x: torch.addcmul(shift, x.float(), scale).to(x.dtype)
