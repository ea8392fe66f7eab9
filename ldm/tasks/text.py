"""Text to pictures: `txt2img`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from ldm.model import LatentDiffusion
from ldm.tasks.job import Job, require_text_only, size_of
from ldm.tasks.refine import refined, require_refiner


@torch.no_grad()
def txt2img(
    model: LatentDiffusion, prompts: str | Sequence[str], *, height: int | None = None, width: int | None = None,
    refiner: LatentDiffusion | None = None, refine_from: float = 0.8, refine_strength: float | None = None,
    **options: Any,
) -> list[Image.Image]:  # fmt: skip
    """Pictures of what prompts say (Rombach et al. 2022, section 3; Ho & Salimans 2022 for the guidance).

    prompts          one for each picture, or one for all
    height, width    pixels, multiples of 8; the model's own size if not given
    refiner          a model that finishes the latents of this one (Podell et al. 2023, section 2.5)
    refine_from      share of the noise schedule after which the refiner takes over, 0 to 1
    refine_strength  give the refiner finished latents instead, noised anew to this share of the steps
    options          `seeds`, and other fields of `Job` and `Sampling`
    Raises ArgumentError, and NonFinite rather than give a black picture.
    """
    job = Job.of(prompts, options)
    size = size_of(model, height, width)
    require_text_only(model)
    if refiner is not None:
        require_refiner(model, refiner, job, refine_from, refine_strength)
    images = []
    for part in job.parts(model):
        conds = job.conds(model, part, size)
        if refiner is None:
            first = part.noise(model.latent_shape(len(part.prompts), *size))
            latent = job.draw(model, job.guided(model, conds), first, part.noise)
        else:
            latent = refined(model, refiner, job, part, conds, size, refine_from, refine_strength)
        images += job.pictures(model, latent)
    return images
