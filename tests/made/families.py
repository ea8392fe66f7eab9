"""Tiny models of every family: few, narrow layers, but every input that the family has."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.models.seeded import weight
from ldm.config import FAMILIES, DepthConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from ldm.model import LatentDiffusion

CLIP = TextConfig(width=64, layers=3, heads=4, mlp=128)
OPENCLIP = replace(CLIP, width=80, activation="gelu", projection=48, pad=0, skip=1)
UNET = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=1, context_dim=64, heads=4,
    down_depth=((1,), (0,)), up_depth=((0, 0), (1, 1)), cross_only=(False, False),
)  # fmt: skip
VAE = VAEConfig(channels=32, channel_mult=(1, 1, 1, 1), num_res_blocks=1)


def tiny(family: str) -> ModelConfig:
    """The family with tiny networks."""
    full = FAMILIES[family]
    text = tuple(
        replace(CLIP if tower.activation == "quick_gelu" else OPENCLIP, skip=tower.skip, norm=tower.norm)
        for tower in full.text
    )
    vector = (
        None if full.unet.vector_dim is None else text[-1].projection + (5 if family == "sdxl-refiner" else 6) * 256
    )
    unet = replace(
        UNET, in_channels=full.unet.in_channels, context_dim=sum(tower.width for tower in text) or 48,
        vector_dim=vector, noise_levels=full.unet.noise_levels, cross_only=(full.unet.cross_only[0], False),
        linear_proj=full.unet.linear_proj, mid_depth=full.unet.mid_depth and 1,
    )  # fmt: skip
    return replace(
        full, unet=unet, text=text, size=32,
        vae=replace(VAE, channel_mult=(1,) * len(full.vae.channel_mult), scale=full.vae.scale),
        vision=full.vision and VisionConfig(image=28, patch=7, width=64, layers=2, heads=4, mlp=128, projection=48),
        depth=full.depth and TINY_DEPTH,
    )  # fmt: skip


TINY_DEPTH = DepthConfig(
    image=64, stem=32, blocks=(1, 1, 1), width=32, layers=2, heads=4, mlp=64, hooks=(0, 1), features=32
)


TINY = tiny("sd1")


def build(config: ModelConfig = TINY) -> LatentDiffusion:
    """A model whose weights its parameters' names determine, so that no layer is silent."""
    with torch.device("meta"):  # values that are then replaced would take as long as those that replace them
        model = LatentDiffusion(config)
    model.load_state_dict({name: value.clone() for name, value in state_of(config).items()}, assign=True)
    return model.requires_grad_(False).eval()


@lru_cache(maxsize=4)
def state_of(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LatentDiffusion(config).state_dict().items()}
    return {name: weight(name, shape) for name, shape in shapes.items()}


@cache
def borrowed(family: str) -> LatentDiffusion:
    """The tiny model of a family, built once a process: whoever changes it puts it back."""
    return build(tiny(family))


def batch_sizes(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every network call from now on."""
    sizes: list[int] = []
    forward = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda x, *rest: (sizes.append(len(x)), forward(x, *rest))[1])
    return sizes
