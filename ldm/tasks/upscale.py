"""Pictures four times as wide and high: `upscale`."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from samplers import Denoiser

UNIT = 64  # the original pads its input to multiples of this
WINDOW, OVERLAP = 256, 32  # pixels of the small picture
WHOLE = 512 * 512  # pixels of the small picture up to which it is seen at once, unless windows are asked for


@torch.no_grad()
def upscale(
    model: LatentDiffusion, init: Image.Image, prompts: str | Sequence[str], *, noise_level: int = NOISE_LEVEL,
    window: int | None = None, **options: Any,
) -> list[Image.Image]:  # fmt: skip
    """`init` four times as wide and high, with detail as the prompt says (Stable Diffusion x4 upscaler).

    noise_level  0 to 350: how much of init is doubted; more invents more
    window       side in pixels of init of the windows in which the network looks at a large picture, which overlap and
                 are blended at every step; 0: always all of it at once; None: windows of 256 above 512 x 512
    The rest as for `txt2img`. The picture is continued to multiples of 64 and cut again, as in the original
    LatentUpscaleDiffusion.
    """
    job = Job.of(prompts, options)
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
    for part in job.parts(model):
        n = len(part.prompts)
        conds = job.conds(model, part, (factor * height, factor * width), noise_level=noise_level)
        first = part.noise(model.latent_shape(n, factor * height, factor * width))
        alpha = model.schedule.alphas_cumprod[noise_level]
        low = math.sqrt(alpha) * image + math.sqrt(1 - alpha) * part.noise((n, 3, height, width))
        if side:
            denoise = _windowed(model, job, conds, low, side)
        else:
            denoise = job.guided(model, [replace(cond, concat=low) for cond in conds])
        latent = job.draw(model, denoise, first, part.noise)
        box = (0, 0, factor * init.width, factor * init.height)
        images += [picture.crop(box) for picture in job.pictures(model, latent)]
    return images


def _windowed(model: LatentDiffusion, job: Job, conds: Sequence[Cond], low: Tensor, side: int) -> Denoiser:
    """A denoiser that asks for x0 in overlapping windows of the latent and blends the answers, so that no border shows.

    low  [b, 3, h, w] the noised small picture, a pixel for a cell of the latent
    """
    height, width = low.shape[2:]
    ramp = _falling(min(side, height))[:, None] * _falling(min(side, width))
    windows = []
    for top in _places(height, side):
        for left in _places(width, side):
            part = ..., slice(top, top + side), slice(left, left + side)
            windows.append((part, job.guided(model, [replace(cond, concat=low[part]) for cond in conds])))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        total, weight = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
        for part, ask in windows:
            total[part] += ask(x[part], sigma) * ramp.to(x)
            weight[part] += ramp.to(x)
        return total / weight

    return denoise


def _places(length: int, side: int) -> list[int]:
    """Where windows of `side` begin along a length, evenly spread so that they overlap by OVERLAP or more."""
    if length <= side:
        return [0]
    count = math.ceil((length - OVERLAP) / (side - OVERLAP))
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def _falling(n: int) -> Tensor:
    """Weights of the cells along a window, which fall linearly towards its borders over OVERLAP cells, never to 0."""
    distance = torch.minimum(torch.arange(n), torch.arange(n).flip(0)) + 1.0
    return (distance / (OVERLAP + 1)).clamp(max=1)
