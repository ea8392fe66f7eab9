"""Every family at narrow widths, from a diffusers folder that both we and diffusers read: the same inputs, the same outputs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weights
from ldm.model import LatentDiffusion
from tests.made.diffusers_folders import FOLDERS, components, single, write_folder
from tests.made.seeded import normal

SIZE_WIDTH = 16  # of an embedded size, 256 in the published models: as narrow as the rest


@torch.no_grad()
def rows(family: str, folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(network, our output, that of diffusers or transformers) for one family. `folder` must not exist yet; the checkpoint is written there."""
    write_folder(folder, family, components(family, single(family)))
    yield from compared(family, weights.load(folder), folder)


@torch.no_grad()
def compared(family: str, model: LatentDiffusion, folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The same for a model, and a narrow folder that holds its weights."""
    yield _unet(family, model, folder)
    yield from _vae(family, model, folder)
    for i, name in enumerate(name for name in FOLDERS[family] if name.startswith("text_encoder")):
        yield from _text(family, name, model.text[i], folder)
    if model.vision is not None:
        yield _vision(family, model, folder)


def _unet(family: str, model: LatentDiffusion, folder: Path) -> tuple[str, Tensor, Tensor]:
    from diffusers import UNet2DConditionModel

    config = model.config.unet
    narrow = {"addition_time_embed_dim": SIZE_WIDTH} if config.vector_dim else {}
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", **narrow).eval()
    x, context, t = (
        normal("x", (2, config.in_channels, 16, 16)),
        normal("context", (2, 77, config.context_dim)),
        torch.tensor([500.0, 37.0]),
    )
    y: Tensor | None = None
    more: dict[str, Any] = {}
    if config.noise_levels:
        y = more["class_labels"] = torch.tensor([20, 350])
    elif (
        config.vector_dim
    ):  # theirs takes the sizes as numbers; their embedding of them is compared on its own in tests/test_unet.py
        count = 5 if family == "sdxl-refiner" else 6
        ids = torch.arange(2.0 * count).view(2, count) * 100
        pooled = normal("pooled", (2, config.vector_dim - count * SIZE_WIDTH))
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        y = torch.cat([pooled, theirs.add_time_proj(ids.flatten()).view(2, -1)], dim=1)
    return "UNet", model.unet(x, t, context, y), theirs(x, t, context, **more).sample


def _vae(family: str, model: LatentDiffusion, folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    from diffusers import AutoencoderKL

    theirs, scale = AutoencoderKL.from_pretrained(folder / "vae").eval(), model.config.vae.scale
    image, z = normal("image", (1, 3, 32, 32)).clamp(-1, 1), normal("z", (1, 4, 8, 8))
    yield "VAE moments", model.vae.moments(image), theirs.encode(image).latent_dist.parameters
    yield "VAE decoded", model.vae.decode(z), theirs.decode(z / scale).sample


def _text(family: str, name: str, tower: torch.nn.Module, folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = tower.config
    projected = config.projection is not None
    theirs = (CLIPTextModelWithProjection if projected else CLIPTextModel).from_pretrained(folder / name).eval()
    ids = torch.full((2, config.length), min(config.pad, config.vocab - 1))
    ids[:, 0], ids[0, 1:6], ids[1, 1:3] = config.vocab - 2, torch.arange(5, 10), torch.arange(20, 22)
    ids[0, 6] = ids[1, 3] = config.vocab - 1
    out = theirs(ids, output_hidden_states=True)
    tokens, _ = tower(ids, config.skip, config.norm)
    last = out.last_hidden_state if config.norm else out.hidden_states[-1 - config.skip]
    yield name, tokens, last


def _vision(family: str, model: LatentDiffusion, folder: Path) -> tuple[str, Tensor, Tensor]:
    from transformers import CLIPVisionModelWithProjection

    theirs = CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder").eval()
    pixels = normal("pixels", (2, 3, model.config.vision.image, model.config.vision.image))
    return "image encoder", model.vision(pixels), theirs(pixels).image_embeds
