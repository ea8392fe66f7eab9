"""What is timed: stages of making a picture at a batch and a size; and the inputs, the same for every side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.models import published
from benchmarks.models.seeded import normal
from ldm.conditioning.tokenizer import tokenize
from ldm.config import FAMILIES, ModelConfig
from weights.folder.write import as_in_folders

MODELS = ("sd1", "sd2-v", "sdxl-base", "ssd-1b")
STAGES = {
    "text": "the text towers: prompts and negative prompts as one batch",
    "step": "one guided step: the UNet at twice the batch",
    "decode": "VAE decoding",
    "picture": "end to end: prompts to 8-bit pictures",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRID = {"ddim": "ddim", "dpmpp_2m": "trailing"}  # of each sampler's noise levels: those that all sides have
PROMPT, NEGATIVE, SEED, GUIDANCE = "a photograph of an astronaut riding a horse", "", 7, 7.5
SIZE_NUMBERS = 6  # of a picture's size, which SDXL is conditioned on, each embedded in 256 values


@dataclass(frozen=True)
class Cell:
    """One thing to time, on every side."""

    stage: str  # a name in STAGES
    batch: int  # pictures
    size: int  # pixels along a side
    sampler: str = ""  # of a picture: ddim or dpmpp_2m
    steps: int = 0  # of a picture

    def __str__(self) -> str:
        how = f" {self.sampler}:{self.steps}" if self.stage == "picture" else ""
        return f"{self.stage}{how}, {self.batch} at {self.size}"


Side = Callable[[Cell], Callable[[], Tensor]]  # a cell -> what makes its output


@dataclass(frozen=True)
class Job:
    """One side, on one model."""

    side: str  # a name in SIDES
    family: str
    tiny: bool  # a narrow model of this family
    folder: str  # its weights, as diffusers stores them
    converted: str  # the same as this side needs it, made before by `sides.all.convert`
    dtype: str  # a name in DTYPES
    device: str
    threads: int | None  # None: torch's own choice


def config_of(family: str, *, tiny: bool = False) -> ModelConfig:
    """The model that is timed, its text towers as diffusers' folders have them; `tiny`: all its layers, narrow."""
    if not tiny:
        return as_in_folders(FAMILIES[family])
    config = published.tiny(family)
    config = replace(config, text=tuple(replace(tower, vocab=FAMILIES[family].text[0].vocab) for tower in config.text))
    if config.unet.vector_dim is not None and (pooled := config.text[-1].projection) is not None:
        config = replace(config, unet=replace(config.unet, vector_dim=pooled + 256 * SIZE_NUMBERS))
    return as_in_folders(config)


@dataclass(frozen=True)
class Inputs:
    """Seeded inputs of one cell. n is twice the batch, for guidance: first what is steered away from."""

    ids: tuple[Tensor, ...]  # of each text tower, [n, 77]
    x: Tensor  # [n, c, h, w]: both halves equal, as guidance has them
    t: Tensor  # [n], in timesteps
    context: Tensor  # [n, 77, d]
    pooled: Tensor | None  # [n, d], for SDXL
    sizes: Tensor | None  # [n, 6] in pixels, for SDXL
    latent: Tensor  # [b, c, h, w], scaled


def inputs(config: ModelConfig, cell: Cell, device: str, dtype: torch.dtype) -> Inputs:
    """What every side is given, on its device and in its type; the numbers do not depend on either."""
    b, cells = cell.batch, cell.size // config.vae.factor
    shape = (b, config.vae.z_channels, cells, cells)
    x = normal("x", shape)
    prompts = [NEGATIVE] * b + [PROMPT] * b
    ids = tuple(tokenize(prompts, tower.length, tower.pad).to(device) for tower in config.text)
    pooled = sizes = None
    if config.unet.vector_dim is not None:
        pooled = normal("pooled", (2 * b, config.unet.vector_dim - 256 * SIZE_NUMBERS)).to(device, dtype)
        sizes = torch.tensor([[cell.size, cell.size, 0, 0, cell.size, cell.size]] * (2 * b), device=device, dtype=dtype)
    context = normal("context", (2 * b, config.text[0].length, config.unet.context_dim)).to(device, dtype)
    t = torch.full((2 * b,), 500.0, device=device)
    x, latent = torch.cat([x, x]).to(device, dtype), normal("latent", shape).to(device, dtype)
    return Inputs(ids, x, t, context, pooled, sizes, latent)


def seeds(cell: Cell) -> list[int]:
    """Of the pictures of a cell."""
    return list(range(SEED, SEED + cell.batch))


def levels(pictures: list[Image.Image]) -> Tensor:
    """[b, H, W, 3] uint8."""
    return torch.from_numpy(np.stack([np.array(picture) for picture in pictures]))
