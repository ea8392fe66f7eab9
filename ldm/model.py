"""The networks and their config under one roof."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ldm.clip import CLIPText
from ldm.conditioning import Cond
from ldm.config import ModelConfig
from ldm.errors import ArgumentError
from ldm.prompts import encode_text
from ldm.unet import UNet
from ldm.vae import VAE
from samplers import Schedule


class LatentDiffusion(nn.Module):
    """A UNet, the VAE whose latents it denoises, and the text towers that tell it what to make (Rombach et al. 2022)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.schedule = Schedule(config.schedule.start, config.schedule.end, config.schedule.steps)
        self.unet = UNet(config.unet)
        self.vae = VAE(config.vae)
        self.text = nn.ModuleList(CLIPText(text) for text in config.text)

    @property
    def device(self) -> torch.device:
        """Where the UNet is."""
        return self.unet.time_embed[0].weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the UNet's weights."""
        return self.unet.time_embed[0].weight.dtype

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], size: tuple[int, int], *, clip_skip: int = 1) -> Cond:
        """What the UNet is told for these prompts.

        size       (height, width) in pixels
        clip_skip  1: the layer the model was trained with; n: n - 1 layers earlier
        Raises ArgumentError for a size that no latent has, a layer that no tower has, or a family that is told more than text.
        """
        self.latent_shape(len(prompts), *size)
        unet = self.config.unet
        if not self.config.text or unet.vector_dim is not None or unet.noise_levels is not None:
            more = "an image" if not self.config.text else "sizes" if unet.vector_dim is not None else "a noise level"
            raise ArgumentError(f"a model of family {self.config.name} is also told {more}; build its Cond by hand, this version conditions on text alone")
        context, _ = encode_text(self.text, prompts, clip_skip)
        return Cond(context)

    def latent_shape(self, n: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[b, c, h, w] of the latents of n pictures of height x width pixels. Raises ArgumentError unless both are multiples of the VAE's factor."""
        factor = self.config.vae.factor
        if height < factor or width < factor or height % factor or width % factor:
            raise ArgumentError(f"size {width}x{height}: both must be multiples of {factor}")
        return n, self.config.vae.z_channels, height // factor, width // factor
