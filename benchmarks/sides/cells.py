"""What is timed: stages of making a picture at a batch and a size, and the inputs that every side is given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.conditioning.tokenizer import tokenize
from ldm.config import FAMILIES, ModelConfig
from tests.made import checkpoints
from tests.made.seeded import normal
from weights.folder.write import as_in_folders

MODELS = ("sd1", "sd2-v", "sdxl-base", "ssd-1b")
STAGES = {
    "text": "the text towers: prompts and negative prompts as one batch",
    "step": "one guided step: the UNet at twice the batch",
    "decode": "VAE decoding",
    "picture": "end to end: prompts to 8-bit pictures",
}
PROMPT, NEGATIVE, SEED, GUIDANCE = "a photograph of an astronaut riding a horse", "", 7, 7.5
SIZE_NUMBERS = 6  # what SDXL is told of a picture's size, each embedded in 256 values


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


def config_of(family: str, *, tiny: bool = False) -> ModelConfig:
    """The model that is timed, its text towers as diffusers' folders have them; `tiny`: all its layers, narrow."""
    if not tiny:
        return as_in_folders(FAMILIES[family])
    config = checkpoints.tiny(family)
    config = replace(config, text=tuple(replace(tower, vocab=FAMILIES[family].text[0].vocab) for tower in config.text))
    if config.unet.vector_dim is not None:
        config = replace(config, unet=replace(config.unet, vector_dim=config.text[-1].projection + 256 * SIZE_NUMBERS))
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
    return Inputs(
        ids, torch.cat([x, x]).to(device, dtype), t, context, pooled, sizes, normal("latent", shape).to(device, dtype)
    )
