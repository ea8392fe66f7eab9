"""The way from one picture to another: `interpolate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning.cond import Cond
from ldm.errors import ArgumentError, require_whole
from ldm.model import LatentDiffusion
from ldm.tasks.job import Job, Part
from ldm.tasks.text import require_text_only
from samplers import seeded


@torch.no_grad()
def interpolate(
    model: LatentDiffusion, prompts: str | Sequence[str], *, seeds: Sequence[int], frames: int = 16,
    height: int | None = None, width: int | None = None, **job: Any,
) -> list[Image.Image]:  # fmt: skip
    """Pictures on the way between what several prompts and seeds give: the first and the last are those of `txt2img`.

    prompts, seeds  stations of the way, two or more in all; one prompt, or one seed, stays the same all the way
    frames          pictures in all, spread evenly over the way
    The noise and every token of the prompts go along great circles (Shoemake 1985). Noise that a sampler draws on the way is that of the
    first seed in every frame. The rest as for `txt2img`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    seeds = list(seeds)
    stations = max(len(prompts), len(seeds))
    if stations < 2 or not {len(prompts), len(seeds)} <= {1, stations}:
        raise ArgumentError(
            f"prompts: {len(prompts)} with {len(seeds)} seeds; give two or more of one, and as many or one of the other",
            key="prompts",
        )
    require_whole("frames", frames, 2, 10_000)
    require_text_only(model)
    prompts, seeds = (given * stations if len(given) == 1 else given for given in (prompts, seeds))
    todo = Job.of(prompts, {**job, "seeds": seeds})
    size = model.config.size if height is None else height, model.config.size if width is None else width
    chunks = max(
        part.chunks for part in todo.parts(model)
    )  # of the longest: all must be of one length to go from one to another
    conds = [
        todo.told(model, Part([prompt], seeded([seed], model.device), chunks), size)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    shape = model.latent_shape(1, *size)
    noises = [seeded([seed], model.device)(shape) for seed in seeds]
    ways = [i * (stations - 1) / (frames - 1) for i in range(frames)]
    images = []
    for i in range(0, frames, todo.batch or frames):
        part = ways[i : i + (todo.batch or frames)]
        places = [(min(int(way), stations - 2), way - min(int(way), stations - 2)) for way in part]
        first = torch.cat([slerp(noises[k].flatten(1), noises[k + 1].flatten(1), t).view(shape) for k, t in places])
        between = [
            Cond.cat([_between(conds[k][which], conds[k + 1][which], t) for k, t in places]) for which in range(2)
        ]
        noise = seeded([seeds[0]] * len(part), model.device)
        noise(first.shape)  # the draw that `txt2img` begins with
        images += todo.pictures(model, todo.draw(model, todo.guided(model, between), first, noise))
    return images


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """From a to b [..., d] along a great circle, lengths changing linearly in between; along the line where both point the same way or one is 0."""
    if t in (0, 1):
        return b if t else a
    lengths = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    cosine = (a * b).sum(dim=-1, keepdim=True) / (lengths[0] * lengths[1]).clamp(min=1e-12)
    angle = torch.arccos(cosine.clamp(-1, 1))
    line = torch.lerp(a, b, t)
    sine = torch.sin(angle)
    arc = torch.sin((1 - t) * angle) / sine * (a / lengths[0].clamp(min=1e-12)) + torch.sin(t * angle) / sine * (
        b / lengths[1].clamp(min=1e-12)
    )
    return torch.where(
        (sine < 1e-4) | (cosine == 0) & (lengths[0] * lengths[1] == 0), line, arc * torch.lerp(*lengths, t)
    )


def _between(a: Cond, b: Cond, t: float) -> Cond:
    def mixed(x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None else slerp(x.float(), y.float(), t).to(x)

    return Cond(**{field.name: mixed(getattr(a, field.name), getattr(b, field.name)) for field in fields(Cond)})
