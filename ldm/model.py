"""The networks and their config under one roof."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

from ldm.conditioning.cond import Cond, Sizes, vector
from ldm.conditioning.prompts import encode_text
from ldm.config import ModelConfig
from ldm.errors import ArgumentError
from ldm.networks.clip import CLIPText
from ldm.networks.dpt import DPT
from ldm.networks.modules import Modules
from ldm.networks.unet import UNet
from ldm.networks.vae import VAE
from ldm.networks.vision import CLIPVision

NOISE_LEVEL, MAX_NOISE_LEVEL = 20, 350  # of the x4 upscaler: the published default, and what it was trained with


class LatentDiffusion(nn.Module):
    """A UNet, the VAE whose latents it denoises, and the towers that tell it what to make (Rombach et al. 2022)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        self.unet = UNet(config.unet)
        self.vae = VAE(config.vae)
        self.text = Modules(CLIPText(text) for text in config.text)
        self.vision = None if config.vision is None else CLIPVision(config.vision)
        self.depth = None if config.depth is None else DPT(config.depth)
        self.runs_on: torch.device | None = None  # set by `ldm.offload`, whose networks run elsewhere than they rest

    @property
    def device(self) -> torch.device:
        """Where the networks run: what they are given belongs there."""
        return self.unet.time_embed[0].weight.device if self.runs_on is None else self.runs_on

    @property
    def dtype(self) -> torch.dtype:
        """The type of the UNet's weights."""
        return self.unet.time_embed[0].weight.dtype

    @torch.no_grad()
    def condition(
        self,
        prompts: Sequence[str | None],
        size: tuple[int, int],
        *,
        sizes: Sizes | None = None,
        noise_level: int | None = None,
        **text: Any,
    ) -> Cond:
        """`tell` without gradients."""
        return self.tell(prompts, size, sizes=sizes, noise_level=noise_level, **text)

    def tell(
        self,
        prompts: Sequence[str | None],
        size: tuple[int, int],
        *,
        sizes: Sizes | None = None,
        noise_level: int | None = None,
        **text: Any,
    ) -> Cond:
        """What the UNet is told for these prompts, with gradients to towers and embeddings; what a family concatenates to the latent is added by its task.

        prompts      None: nothing is said, as the family was trained to hear it: zeros for SDXL, the empty prompt elsewhere
        size         (height, width) in pixels
        sizes        what SDXL is told of the picture's past; None: that it has always had this size
        noise_level  how noisy the x4 upscaler's input is, in timesteps; None: 20
        text         keywords of `ldm.prompts.encode_text`: clip_skip, weighting, ...
        Raises ArgumentError for a size that no latent has, a layer that no tower has, or what this family is not told.
        """
        self.latent_shape(len(prompts), *size)
        unet = self.config.unet
        if not self.config.text:
            raise ArgumentError(
                f"a model of family {self.config.name} is told an image instead of text: use condition_image"
            )
        if sizes is not None and unet.vector_dim is None:
            raise ArgumentError(f"a model of family {self.config.name} is told no sizes; SDXL models are")
        context, pooled = encode_text(self.text, ["" if prompt is None else prompt for prompt in prompts], **text)
        if self.config.zero_empty:
            said = torch.tensor([prompt is not None for prompt in prompts], device=pooled.device)
            context, pooled = context * said[:, None, None], pooled * said[:, None]
        if unet.vector_dim is not None:
            return Cond(context, vector(pooled, sizes or Sizes(), size, unet.vector_dim))
        if unet.noise_levels is not None:
            return Cond(context, torch.full((len(prompts),), self._noise_level(noise_level), device=context.device))
        if noise_level is not None:
            raise ArgumentError(f"a model of family {self.config.name} is told no noise level; the x4 upscaler is")
        return Cond(context)

    def _noise_level(self, level: int | None) -> int:
        level = NOISE_LEVEL if level is None else level
        if not (isinstance(level, Integral) and 0 <= level <= min(MAX_NOISE_LEVEL, self.config.unet.noise_levels - 1)):
            raise ArgumentError(
                f"noise_level: {level!r}; give a whole number from 0 to {min(MAX_NOISE_LEVEL, self.config.unet.noise_levels - 1)}",
                key="noise_level",
            )
        return int(level)

    def latent_shape(self, n: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[b, c, h, w] of the latents of n pictures of height x width pixels. Raises ArgumentError unless both are multiples of the VAE's factor."""
        factor = self.config.vae.factor
        if height < factor or width < factor or height % factor or width % factor:
            raise ArgumentError(f"size {width}x{height}: both must be multiples of {factor}")
        return n, self.config.vae.z_channels, height // factor, width // factor
