"""A second model, the refiner, that finishes what the first one begins (Podell et al. 2023, section 2.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ldm.conditioning.cond import Cond
from ldm.errors import ArgumentError, require_number
from ldm.model import LatentDiffusion
from ldm.tasks.job import Job, Part, require_strength, require_text_only
from samplers import finish, start


def refined(
    model: LatentDiffusion, refiner: LatentDiffusion, job: Job, part: Part, conds: list[Cond], size: tuple[int, int],
    refine_from: float, strength: float | None,
) -> Tensor:  # fmt: skip
    """Latents that the model begins and the refiner finishes."""
    begin, end = job.guided(model, conds), job.guided(refiner, _for(refiner, job).conds(refiner, part, size))
    first = part.noise(model.latent_shape(len(part.prompts), *size))
    if strength is not None:
        latent = job.draw(model, begin, first, part.noise)
        return job.redraw(refiner, end, latent, strength, part.noise(latent.shape), part.noise)
    sigmas = job.sampling.sigmas(model.schedule)
    k = handover(model, sigmas, refine_from)
    x = job.solve(begin, start(first, sigmas), sigmas[: k + 1], part.noise)
    return finish(job.solve(end, x, sigmas[k:], part.noise), sigmas)


def _for(refiner: LatentDiffusion, job: Job) -> Job:
    """The job with those vectors of its textual inversions that suit the refiner's tower: SDXL's have two sets."""
    widths = {tower.width for tower in refiner.config.text}
    embeddings = tuple(
        replace(each, vectors={width: vectors for width, vectors in each.vectors.items() if width in widths})
        for each in job.sampling.embeddings
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
            f"refine_from: {share:g} leaves all {len(sigmas) - 1} steps to one model; "
            "choose another share, or more steps",
            key="refine_from",
        )
    return k


def require_refiner(
    model: LatentDiffusion, refiner: LatentDiffusion, job: Job, refine_from: float, strength: float | None
) -> None:
    """Refuse a refiner that cannot go on with the model's latents, and a share or strength that leaves it no step.

    Raises ArgumentError.
    """
    of_model, of_refiner = ((m.config.vae.z_channels, m.config.vae.scale, m.schedule) for m in (model, refiner))
    if of_model != of_refiner:
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
