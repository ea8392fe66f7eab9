"""Every family, narrow, from one diffusers folder that both sides read: our outputs, and those of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weights
from benchmarks.models.folders import FOLDERS, components, single, write_folder
from benchmarks.models.seeded import normal
from ldm.config import TextConfig
from ldm.model import LatentDiffusion

SIZE_WIDTH = 16  # of an embedded size, 256 in the published models: as narrow as the rest


@torch.no_grad()
def rows(family: str, folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(network, our output, that of diffusers or transformers) of a family, whose weights are written into `folder`."""
    write_folder(folder, family, components(family, single(family)))
    yield from compared(family, weights.load(folder), folder)


@torch.no_grad()
def compared(family: str, model: LatentDiffusion, folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The same for a model, and a narrow folder that holds its weights."""
    yield _unet(family, model, folder)
    yield from _vae(model, folder)
    names = [name for name in FOLDERS[family] if name.startswith("text_encoder")]
    for name, tower, config in zip(names, model.text, model.config.text, strict=False):  # a folder may hold more
        yield _text(name, tower, config, folder)
    if model.vision is not None and model.config.vision is not None:
        yield _vision(model.vision, model.config.vision.image, folder)


def _unet(family: str, model: LatentDiffusion, folder: Path) -> tuple[str, Tensor, Tensor]:
    from diffusers import UNet2DConditionModel

    config = model.config.unet
    narrow = {"addition_time_embed_dim": SIZE_WIDTH} if config.vector_dim else {}
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", **narrow).eval()
    x, t = normal("x", (2, config.in_channels, 16, 16)), torch.tensor([500.0, 37.0])
    context = normal("context", (2, 77, config.context_dim))
    y: Tensor | None = None
    more: dict[str, Any] = {}
    if config.noise_levels:
        y = more["class_labels"] = torch.tensor([20, 350])
    elif config.vector_dim:  # theirs takes sizes as numbers
        count = 5 if family == "sdxl-refiner" else 6
        ids = torch.arange(2.0 * count).view(2, count) * 100
        pooled = normal("pooled", (2, config.vector_dim - count * SIZE_WIDTH))
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        y = torch.cat([pooled, theirs.add_time_proj(ids.flatten()).view(2, -1)], dim=1)
    return "UNet", model.unet(x, t, context, y), theirs(x, t, context, **more).sample


def _vae(model: LatentDiffusion, folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    from diffusers import AutoencoderKL

    theirs, scale = AutoencoderKL.from_pretrained(folder / "vae").eval(), model.config.vae.scale
    image, z = normal("image", (1, 3, 32, 32)).clamp(-1, 1), normal("z", (1, 4, 8, 8))
    yield "VAE moments", model.vae.moments(image), theirs.encode(image).latent_dist.parameters
    yield "VAE decoded", model.vae.decode(z), theirs.decode(z / scale).sample


def _text(name: str, tower: nn.Module, config: TextConfig, folder: Path) -> tuple[str, Tensor, Tensor]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    projected = config.projection is not None
    theirs = (CLIPTextModelWithProjection if projected else CLIPTextModel).from_pretrained(folder / name).eval()
    ids = torch.full((2, config.length), min(config.pad, config.vocab - 1))
    ids[:, 0], ids[0, 1:6], ids[1, 1:3] = config.vocab - 2, torch.arange(5, 10), torch.arange(20, 22)
    ids[0, 6] = ids[1, 3] = config.vocab - 1
    out = theirs(ids, output_hidden_states=True)
    tokens, _ = tower(ids, config.skip, config.norm)
    last = out.last_hidden_state if config.norm else out.hidden_states[-1 - config.skip]
    return name, tokens, last


def _vision(tower: nn.Module, side: int, folder: Path) -> tuple[str, Tensor, Tensor]:
    from transformers import CLIPVisionModelWithProjection

    theirs = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval()
    pixels = normal("pixels", (2, 3, side, side))
    return "image encoder", tower(pixels), theirs(pixels).image_embeds
