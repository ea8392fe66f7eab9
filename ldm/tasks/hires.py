"""Large pictures from text: `hires`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch.nn import functional as F

from ldm.errors import ArgumentError, require_known, require_number
from ldm.images import from_pil, nearest_multiple
from ldm.limits import precision
from ldm.model import LatentDiffusion
from ldm.tasks.job import Job, require_strength, require_text_only, size_of

ENLARGERS = ("latent", "pixel")


@torch.no_grad()
def hires(
    model: LatentDiffusion, prompts: str | Sequence[str], *, scale: float = 2.0,
    enlarge: Literal["latent", "pixel"] = "pixel", strength: float = 0.6,
    height: int | None = None, width: int | None = None, **options: Any,
) -> list[Image.Image]:  # fmt: skip
    """Large pictures without doubled subjects: made at the size of training, enlarged, then partly redrawn.

    scale     of both sides, above 1 to 8
    enlarge   the latent (bicubic; needs a strength of about 0.6 or more to lose its blur), or the picture (Lanczos)
    strength  share of the steps that redraw the enlarged picture, above 0 to 1
    The rest as for `txt2img`; height and width are those of the first picture.
    """
    job = Job.of(prompts, options)
    require_number("scale", scale, 1, 8)
    require_known("enlarge", enlarge, ENLARGERS)
    require_strength(strength, job.sampling)
    if strength == 0:
        raise ArgumentError("strength: 0 would only enlarge; give more", key="strength")
    require_text_only(model)
    size = size_of(model, height, width)
    tall, wide = (nearest_multiple(side * scale, model.config.vae.factor) for side in size)
    images = []
    for part in job.parts(model):
        small, shape = (model.latent_shape(len(part.prompts), *sides) for sides in (size, (tall, wide)))
        latent = job.draw(model, job.guided(model, job.conds(model, part, size)), part.noise(small), part.noise)
        if enlarge == "latent":
            latent = F.interpolate(latent, size=shape[2:], mode="bicubic", align_corners=False)
        else:
            resized = [each.resize((wide, tall), Image.Resampling.LANCZOS) for each in job.pictures(model, latent)]
            pixels = from_pil(resized).to(model.device)
            latent = precision.encode(model, pixels, part.noise(shape), tile=job.sampling.tile)
        denoise = job.guided(model, job.conds(model, part, (tall, wide)))
        latent = job.redraw(model, denoise, latent, strength, part.noise(shape), part.noise)
        images += job.pictures(model, latent)
    return images
