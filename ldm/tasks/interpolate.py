"""The way from one picture to another: `interpolate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning.cond import Cond
from ldm.errors import ArgumentError, require_whole
from ldm.model import LatentDiffusion
from ldm.tasks.job import Job, Part, require_text_only, size_of
from samplers import seeded

MAX_FRAMES = 10_000


@torch.no_grad()
def interpolate(
    model: LatentDiffusion, prompts: str | Sequence[str], *, seeds: Sequence[int], frames: int = 16,
    height: int | None = None, width: int | None = None, **options: Any,
) -> list[Image.Image]:  # fmt: skip
    """Pictures on the way between what several prompts and seeds give: the first and the last are those of `txt2img`.

    prompts, seeds  stations of the way, two or more in all; one prompt, or one seed, stays the same all the way
    frames          pictures in all, spread evenly over the way
    The noise and every token of the prompts go along great circles (Shoemake 1985). Noise that a sampler draws on the
    way is that of the first seed in every frame. The rest as for `txt2img`.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = list(seeds)
    stations = max(len(texts), len(seeds))
    if stations < 2 or not {len(texts), len(seeds)} <= {1, stations}:
        raise ArgumentError(
            f"prompts: {len(texts)} with {len(seeds)} seeds; give two or more of one, and as many or one of the other",
            key="prompts",
        )
    require_whole("frames", frames, 2, MAX_FRAMES)
    require_text_only(model)
    texts *= stations if len(texts) == 1 else 1
    seeds *= stations if len(seeds) == 1 else 1
    job = Job.of(texts, {**options, "seeds": seeds})
    size = size_of(model, height, width)
    chunks = max(part.chunks for part in job.parts(model))  # one length for all, to go from one to another
    noises = [seeded([seed], model.device) for seed in seeds]
    conds = [job.conds(model, Part([text], noise, chunks), size) for text, noise in zip(texts, noises, strict=True)]
    firsts = [noise(model.latent_shape(1, *size)) for noise in noises]
    images = []
    batch = job.batch or frames
    for i in range(0, frames, batch):
        ways = [k * (stations - 1) / (frames - 1) for k in range(i, min(i + batch, frames))]
        places = [(k := min(int(way), stations - 2), way - k) for way in ways]  # the station before, and how far beyond
        first = torch.cat(
            [slerp(firsts[k].flatten(1), firsts[k + 1].flatten(1), t).view_as(firsts[k]) for k, t in places]
        )
        between = [Cond.cat([_between(conds[k][i], conds[k + 1][i], t) for k, t in places]) for i in range(2)]
        noise = seeded([seeds[0]] * len(places), model.device)
        noise(first.shape)  # the draw that `txt2img` begins with
        images += job.pictures(model, job.draw(model, job.guided(model, between), first, noise))
    return images


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a to b [..., d] along a great circle, with lengths that change linearly.

    Along the line where both point the same way or one is 0.
    """
    if t in (0, 1):
        return b if t else a
    length_a, length_b = (x.norm(dim=-1, keepdim=True) for x in (a, b))
    cosine = (a * b).sum(dim=-1, keepdim=True) / (length_a * length_b).clamp(min=1e-12)
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    unit_a, unit_b = a / length_a.clamp(min=1e-12), b / length_b.clamp(min=1e-12)
    arc = torch.sin((1 - t) * angle) / sine * unit_a + torch.sin(t * angle) / sine * unit_b
    straight = (sine < 1e-4) | (cosine == 0) & (length_a * length_b == 0)
    return torch.where(straight, torch.lerp(a, b, t), arc * torch.lerp(length_a, length_b, t))


def _between(a: Cond, b: Cond, t: float) -> Cond:
    def mixed(x: Tensor, y: Tensor) -> Tensor:
        return slerp(x.float(), y.float(), t).to(x)

    return Cond(mixed(a.context, b.context), None if a.y is None or b.y is None else mixed(a.y, b.y))
