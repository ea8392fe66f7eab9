"""Text to pictures: `txt2img hires`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.conditioning.cond import Cond
from ldm.errors import ArgumentError, require_known, require_number
from ldm.images import from_pil, nearest_multiple
from ldm.limits import precision
from ldm.model import LatentDiffusion
from ldm.tasks.job import Job, Part, require_strength
from samplers import finish, start

ENLARGERS = ("latent", "pixel")


@torch.no_grad()
def txt2img(
    model: LatentDiffusion, prompts: str | Sequence[str], *, height: int | None = None, width: int | None = None,
    refiner: LatentDiffusion | None = None, refine_from: float = 0.8, refine_strength: float | None = None, **job: Any,
) -> list[Image.Image]:  # fmt: skip
    """Pictures of what prompts say (Rombach et al. 2022, section 3; Ho & Salimans 2022 for the guidance).

    prompts          one for each picture, or one for all
    height, width    pixels, multiples of 8; the model's own size if not given
    refiner          a model that finishes the latents of this one (Podell et al. 2023, section 2.5)
    refine_from      share of the noise schedule after which the refiner takes over, 0 to 1
    refine_strength  give the refiner finished latents instead, noised anew to this share of the steps
    job              `seeds`, and other fields of `Job` and `Sampling`
    Raises ArgumentError, and NonFinite rather than give a black picture.
    """
    todo = Job.of(prompts, job)
    size = model.config.size if height is None else height, model.config.size if width is None else width
    require_text_only(model)
    if refiner is not None:
        _require_refiner(model, refiner, todo, refine_from, refine_strength)
    images = []
    for part in todo.parts(model):
        conds = todo.told(model, part, size)
        shape = model.latent_shape(len(part.prompts), *size)
        if refiner is None:
            latent = todo.draw(model, todo.guided(model, conds), part.noise(shape), part.noise)
        else:
            latent = _refined(model, refiner, todo, part, conds, size, refine_from, refine_strength)
        images += todo.pictures(model, latent)
    return images


def _refined(
    model: LatentDiffusion,
    refiner: LatentDiffusion,
    job: Job,
    part: Part,
    conds: list[Cond],
    size: tuple[int, int],
    refine_from: float,
    strength: float | None,
) -> Tensor:
    """Latents that the model begins and the refiner finishes."""
    begin, end = job.guided(model, conds), job.guided(refiner, _for(refiner, job).told(refiner, part, size))
    first = part.noise(model.latent_shape(len(part.prompts), *size))
    if strength is not None:
        latent = job.draw(model, begin, first, part.noise)
        return job.redraw(refiner, end, latent, strength, part.noise(latent.shape), part.noise)
    sigmas = job.sampling.sigmas(model.schedule)
    k = handover(model, sigmas, refine_from)
    x = job.solve(begin, start(first, sigmas), sigmas[: k + 1], part.noise)
    return finish(job.solve(end, x, sigmas[k:], part.noise), sigmas)


def _for(refiner: LatentDiffusion, job: Job) -> Job:
    """The job with what of its textual inversions is for the refiner's text tower: those of SDXL are for both of the base's."""
    widths = {tower.width for tower in refiner.config.text}
    embeddings = tuple(
        replace(e, vectors={width: e.vectors[width] for width in e.vectors if width in widths})
        for e in job.sampling.embeddings
    )
    return replace(job, sampling=replace(job.sampling, embeddings=embeddings))


def handover(model: LatentDiffusion, sigmas: Sequence[float], share: float) -> int:
    """How many steps of a grid come before the timestep that is left after `share` of the schedule.

    Raises ArgumentError where that leaves no step to one of the two.
    """
    cutoff = round(model.schedule.steps * (1 - share))
    k = sum(model.schedule.timestep(sigma) >= cutoff for sigma in sigmas[:-1])
    if not 0 < k < len(sigmas) - 1:
        raise ArgumentError(
            f"refine_from: {share:g} leaves all {len(sigmas) - 1} steps to one model; choose another share, or more steps",
            key="refine_from",
        )
    return k


def _require_refiner(
    model: LatentDiffusion, refiner: LatentDiffusion, job: Job, refine_from: float, strength: float | None
) -> None:
    if (
        model.config.vae.z_channels != refiner.config.vae.z_channels
        or model.config.vae.scale != refiner.config.vae.scale
        or model.schedule != refiner.schedule
    ):
        raise ArgumentError(
            f"refiner: a model of family {refiner.config.name} cannot go on with the latents of {model.config.name}",
            key="refiner",
        )
    require_text_only(refiner)
    require_number("refine_from", refine_from, 0, 1)
    if strength is None:
        handover(model, job.sampling.sigmas(model.schedule), refine_from)
    else:
        require_strength(strength, job.sampling)


@torch.no_grad()
def hires(
    model: LatentDiffusion, prompts: str | Sequence[str], *, scale: float = 2.0, enlarge: Literal["latent", "pixel"] = "pixel", strength: float = 0.6,
    height: int | None = None, width: int | None = None, **job: Any,
) -> list[Image.Image]:  # fmt: skip
    """Large pictures without doubled subjects: made at the size of training, enlarged, then partly redrawn at the large size.

    scale     of both sides, above 1 to 8
    enlarge   the latent (bicubic; needs a strength of about 0.6 or more to lose its blur), or the picture (Lanczos)
    strength  share of the steps that redraw the enlarged picture, above 0 to 1
    The rest as for `txt2img`; height and width are those of the first picture.
    """
    todo = Job.of(prompts, job)
    require_number("scale", scale, 1, 8)
    require_known("enlarge", enlarge, ENLARGERS)
    require_strength(strength, todo.sampling)
    if strength == 0:
        raise ArgumentError("strength: 0 would only enlarge; give more", key="strength")
    require_text_only(model)
    size = model.config.size if height is None else height, model.config.size if width is None else width
    large = tuple(nearest_multiple(side * scale, model.config.vae.factor) for side in size)
    images = []
    for part in todo.parts(model):
        n = len(part.prompts)
        denoise, shape = todo.guided(model, todo.told(model, part, size)), model.latent_shape(n, *large)
        latent = todo.draw(model, denoise, part.noise(model.latent_shape(n, *size)), part.noise)
        if enlarge == "latent":
            latent = F.interpolate(latent, size=shape[2:], mode="bicubic", align_corners=False)
        else:
            resized = [
                picture.resize((large[1], large[0]), Image.Resampling.LANCZOS)
                for picture in todo.pictures(model, latent)
            ]
            latent = precision.encode(
                model, from_pil(resized).to(model.device), part.noise(shape), tile=todo.sampling.tile
            )
        denoise = todo.guided(model, todo.told(model, part, large))
        images += todo.pictures(
            model, todo.redraw(model, denoise, latent, strength, part.noise(latent.shape), part.noise)
        )
    return images


def require_text_only(model: LatentDiffusion) -> None:
    """These tasks have text and noise to give: a model that needs more is for another task. Raises ArgumentError."""
    if not model.config.text or model.config.concat:
        needs = ", ".join(model.config.concat) or "an image instead of text"
        task = {"mask": "inpaint", "depth": "depth2img", "low_res": "upscale"}.get(
            model.config.concat[0] if model.config.concat else "", "variations"
        )
        raise ArgumentError(f"this model ({model.config.name}) needs {needs}: it is not for text alone; use {task}")
