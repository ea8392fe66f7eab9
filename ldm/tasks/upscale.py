"""Pictures four times as wide and high: `upscale`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning.cond import Cond
from ldm.errors import ArgumentError, require_whole
from ldm.images import from_pil, to_rgb
from ldm.model import NOISE_LEVEL, LatentDiffusion
from ldm.pictures.masks import padded
from ldm.tasks.job import Job
from samplers.core import Denoiser

UNIT = 64  # the original pads its input to multiples of this
WINDOW, OVERLAP = 256, 32  # pixels of the small picture
WHOLE = 512 * 512  # pixels of the small picture up to which it is seen at once, unless windows are asked for


@torch.no_grad()
def upscale(
    model: LatentDiffusion,
    init: Image.Image,
    prompts: str | Sequence[str],
    *,
    noise_level: int = NOISE_LEVEL,
    window: int | None = None,
    **job: Any,
) -> list[Image.Image]:
    """`init` four times as wide and high, with detail as the prompt says (Stable Diffusion x4 upscaler).

    noise_level  0 to 350: how much of init is doubted; more invents more
    window       side in pixels of init of the windows in which the network looks at a large picture, which overlap and are blended at
                 every step; 0: always all of it at once; None: windows of 256 above 512 x 512
    The rest as for `txt2img`. The picture is continued to multiples of 64 and cut again, as in the original LatentUpscaleDiffusion.
    """
    todo = Job.of(prompts, job)
    if model.config.concat != ("low_res",):
        raise ArgumentError(f"this model ({model.config.name}) is no upscaler: use an x4 upscaler, or hires")
    if window is not None and window != 0:
        require_whole("window", window, UNIT, 2**14)
    init = to_rgb(init)
    image = from_pil(padded(init, 0, -init.width % UNIT, 0, -init.height % UNIT)).to(model.device)
    height, width = image.shape[2:]
    factor = model.config.vae.factor
    side = window if window is not None else (WINDOW if height * width > WHOLE else 0)
    images = []
    for part in todo.parts(model):
        n = len(part.prompts)
        conds = todo.told(model, part, (factor * height, factor * width), noise_level=noise_level)
        first = part.noise(model.latent_shape(n, factor * height, factor * width))
        alpha = model.schedule.alphas_cumprod[noise_level]
        low = math.sqrt(alpha) * image + math.sqrt(1 - alpha) * part.noise((n, 3, height, width))
        conds = [replace(cond, concat=low) for cond in conds]
        latent = todo.draw(
            model, _windowed(model, todo, conds, side) if side else todo.guided(model, conds), first, part.noise
        )
        images += [
            picture.crop((0, 0, factor * init.width, factor * init.height)) for picture in todo.pictures(model, latent)
        ]
    return images


def _windowed(model: LatentDiffusion, job: Job, conds: Sequence[Cond], side: int) -> Denoiser:
    """A denoiser that asks for x0 in overlapping windows of the latent and blends what it gets, so that no window has a border of its own."""
    height, width = conds[0].concat.shape[2:]
    windows = []
    for top in _places(height, side):
        for left in _places(width, side):
            here = slice(top, top + side), slice(left, left + side)
            cut = [replace(cond, concat=cond.concat[:, :, here[0], here[1]]) for cond in conds]
            windows.append((here, _ramps(min(side, height), min(side, width)), job.guided(model, cut)))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        total, weight = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
        for (rows, columns), ramp, ask in windows:
            ramp = ramp.to(x)
            total[:, :, rows, columns] += ask(x[:, :, rows, columns], sigma) * ramp
            weight[:, :, rows, columns] += ramp
        return total / weight

    return denoise


def _places(length: int, side: int) -> Iterator[int]:
    """Where windows of `side` begin along a length, evenly spread so that they overlap by OVERLAP or more."""
    if length <= side:
        return iter([0])
    count = math.ceil((length - OVERLAP) / (side - OVERLAP))
    return (round(i * (length - side) / (count - 1)) for i in range(count))


def _ramps(height: int, width: int) -> Tensor:
    """Weights [1, 1, h, w] that fall linearly towards the borders over OVERLAP cells, never to 0."""

    def ramp(n: int) -> Tensor:
        distance = torch.minimum(torch.arange(n), torch.arange(n).flip(0)) + 1.0
        return (distance / (OVERLAP + 1)).clamp(max=1)

    return (ramp(height)[:, None] * ramp(width))[None, None]
