"""Images to latents and back, factor 8 (4 for the upscaler)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import VAEConfig
from ldm.networks.modules import Modules


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)  # as trained


class ResnetBlock(nn.Module):
    """Two convolutions around which x is added."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = _norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """One-head self-attention over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(to(h), "b c h w -> b 1 (h w) c") for to in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Half the size, by a strided convolution padded on the right and at the bottom only, as trained."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the size: nearest, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the way out of it: down, up, or at the ends neither."""

    def __init__(self, channels: int, out_channels: int, blocks: int, *, down: bool = False, up: bool = False):
        super().__init__()
        # The way out is made before the blocks: a seed then gives the initial weights that it always gave.
        ways = Downsample(out_channels) if down else None, Upsample(out_channels) if up else None
        self.block = Modules(ResnetBlock(out_channels if i else channels, out_channels) for i in range(blocks))
        self.downsample, self.upsample = ways

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.block, self.downsample, self.upsample):
            x = x if layer is None else layer(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.attn_1 = ResnetBlock(channels, channels), AttnBlock(channels)
        self.block_2 = ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[b, 3, H, W] -> [b, 2 z, h, w]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        inner = [config.channels * m for m in (1, *config.channel_mult)]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = Modules(
            Level(inner[i], inner[i + 1], config.num_res_blocks, down=i < len(inner) - 2) for i in range(len(inner) - 1)
        )
        self.mid = Middle(inner[-1])
        self.norm_out = _norm(inner[-1])
        self.conv_out = nn.Conv2d(inner[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """[b, z, h, w] -> [b, 3, H, W]. `up` counts from the finest level, so it is walked backwards."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        inner = [*widths, widths[-1]]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = Modules(
            Level(inner[i + 1], width, config.num_res_blocks + 1, up=i > 0) for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """The KL autoencoder (Rombach et al. 2022, section 3.1). Outside of it latents have about unit variance."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def moments(self, image: Tensor) -> Tensor:
        """[b, 3, H, W] in [-1, 1] -> [b, 2 z, h, w]: mean and log variance of the posterior, unscaled."""
        return self.quant_conv(self.encoder(image))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """[b, 3, H, W] in [-1, 1] -> scaled latent [b, z, h, w]: the mean, or a sample with noise, N(0, 1)."""
        return self.latent(self.moments(image), noise)

    def latent(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Moments [b, 2 z, h, w] -> scaled latent [b, z, h, w]: the mean, or a sample where `noise` is given."""
        mean, logvar = moments.chunk(2, dim=1)
        if noise is not None:
            mean = mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise
        return mean * self.config.scale

    def decode(self, latent: Tensor) -> Tensor:
        """Scaled latent [b, z, h, w] -> [b, 3, H, W], about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latent / self.config.scale))
