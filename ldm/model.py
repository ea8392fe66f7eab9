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
    """A UNet, the VAE whose latents it denoises, and the towers whose output conditions it (Rombach et al. 2022)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        self.unet = UNet(config.unet)
        self.vae = VAE(config.vae)
        self.text = Modules(CLIPText(text) for text in config.text)
        self.vision = None if config.vision is None else CLIPVision(config.vision)
        self.depth = None if config.depth is None else DPT(config.depth)
        self.runs_on: torch.device | None = None  # set by `offload`: where networks run that rest elsewhere

    @property
    def device(self) -> torch.device:
        """Where the networks run: what they are given belongs there."""
        return self.unet.time_embed[0].weight.device if self.runs_on is None else self.runs_on

    @property
    def dtype(self) -> torch.dtype:
        """The type of the UNet's weights."""
        return self.unet.time_embed[0].weight.dtype

    def tell(
        self, prompts: Sequence[str | None], size: tuple[int, int], *,
        sizes: Sizes | None = None, noise_level: int | None = None, **text: Any,
    ) -> Cond:  # fmt: skip
        """What these prompts condition the UNet on; a task adds what its family concatenates to the latent.

        prompts      None: no prompt, as the family was trained without one: zeros for SDXL, the empty prompt elsewhere
        size         (height, width) in pixels
        sizes        the picture's past, for SDXL; None: that it has always had this size
        noise_level  how noisy the x4 upscaler's input is, in timesteps; None: 20
        text         keywords of `ldm.conditioning.prompts.encode_text`: clip_skip, weighting, ...
        Has gradients to towers and embeddings, which `condition` has not. Raises ArgumentError for a size that no
        latent has, a layer that no tower has, or an input that this family does not have.
        """
        self.latent_shape(len(prompts), *size)
        unet, name = self.config.unet, self.config.name
        if not self.config.text:
            raise ArgumentError(f"a model of family {name} takes an image instead of text: use variations")
        if sizes is not None and unet.vector_dim is None:
            raise ArgumentError(f"a model of family {name} takes no sizes; SDXL models do")
        context, pooled = encode_text(self.text, [prompt or "" for prompt in prompts], **text)
        if self.config.zero_empty:
            given = torch.tensor([prompt is not None for prompt in prompts], device=pooled.device)
            context, pooled = context * given[:, None, None], pooled * given[:, None]
        if unet.vector_dim is not None:
            return Cond(context, vector(pooled, sizes or Sizes(), size, unet.vector_dim))
        if unet.noise_levels is not None:
            level, highest = (
                NOISE_LEVEL if noise_level is None else noise_level,
                min(MAX_NOISE_LEVEL, unet.noise_levels - 1),
            )
            if not (isinstance(level, Integral) and 0 <= level <= highest):
                raise ArgumentError(
                    f"noise_level: {level!r}; give a whole number from 0 to {highest}", key="noise_level"
                )
            return Cond(context, torch.full((len(prompts),), int(level), device=context.device))
        if noise_level is not None:
            raise ArgumentError(f"a model of family {name} takes no noise level; the x4 upscaler does")
        return Cond(context)

    condition = torch.no_grad()(tell)

    def latent_shape(self, n: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[b, c, h, w] of the latents of n pictures of height x width pixels.

        Raises ArgumentError unless both are multiples of the VAE's factor.
        """
        factor = self.config.vae.factor
        if height < factor or width < factor or height % factor or width % factor:
            raise ArgumentError(f"size {width}x{height}: both must be multiples of {factor}")
        return n, self.config.vae.z_channels, height // factor, width // factor
