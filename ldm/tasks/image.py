"""Pictures to pictures: `img2img depth2img variations`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.conditioning.cond import Cond
from ldm.errors import ArgumentError, require_known
from ldm.images import fit, from_pil, size_for, to_rgb
from ldm.limits import precision
from ldm.model import LatentDiffusion
from ldm.networks.dpt import depth_map, normalised_depth
from ldm.networks.vision import PREPROCESSORS, preprocess
from ldm.tasks.job import Job, require_strength, require_text_only, size_of


@torch.no_grad()
def img2img(
    model: LatentDiffusion, init: Image.Image, prompts: str | Sequence[str], *, strength: float = 0.75,
    height: int | None = None, width: int | None = None, **options: Any,
) -> list[Image.Image]:  # fmt: skip
    """Pictures that begin as `init`, noised, and end as prompts say (SDEdit, Meng et al. 2022).

    init           any mode; scaled to cover height x width and cut evenly
    strength       share of the steps that are run: 0 takes init through the VAE and back, 1 keeps nearly nothing of it
    height, width  pixels, multiples of 8; init's own, rounded, if not given; given one, the other follows init's shape
    The rest as for `txt2img`. The latent of init is a sample of the VAE's posterior, drawn from each picture's own
    noise as the original code does.
    """
    job = Job.of(prompts, options)
    require_strength(strength, job.sampling)
    require_text_only(model)
    return _redrawn(model, job, scaled(model, init, height, width), strength, None)


@torch.no_grad()
def depth2img(
    model: LatentDiffusion, init: Image.Image, prompts: str | Sequence[str], *,
    depth: Image.Image | None = None, strength: float = 0.8,
    height: int | None = None, width: int | None = None, **options: Any,
) -> list[Image.Image]:  # fmt: skip
    """Pictures with the depth of `init`: its shapes stay even where nothing else does (Stable Diffusion 2 depth model).

    depth     a depth map, light is near; of the shape of init. None: the model's own network looks at init
    strength  as for `img2img`; at 1 only the depth is left of init
    The rest as for `img2img`.
    """
    job = Job.of(prompts, options)
    require_strength(strength, job.sampling)
    if model.config.concat != ("depth",):
        raise ArgumentError(f"this model ({model.config.name}) takes no depth: use a depth model, or img2img")
    image = scaled(model, init, height, width)
    cells = model.latent_shape(1, *image.shape[2:])[2:]
    if depth is not None:
        near = given_depth(depth, image, cells)
    elif model.depth is not None:
        near = depth_map(model.depth, image.to(model.dtype), cells)
    else:
        raise ArgumentError("this checkpoint holds no depth network: give a depth map", key="depth")
    return _redrawn(model, job, image, strength, near)


def given_depth(depth: Image.Image, image: Tensor, cells: tuple[int, int]) -> Tensor:
    """A depth map, 8- or 16-bit, light is near, as [1, 1, h, w] in [-1, 1], like `ldm.networks.dpt.depth_map`.

    Raises ArgumentError unless its shape agrees with that of `image` [1, 3, H, W] to 1 %.
    """
    height, width = image.shape[2:]
    if abs(depth.width * height - depth.height * width) > 0.01 * depth.width * height:
        raise ArgumentError(
            f"depth: it is {depth.width}x{depth.height} and the picture {width}x{height}; give a map of the same shape",
            key="depth",
        )
    return normalised_depth(from_pil(to_rgb(depth)).mean(dim=1, keepdim=True), cells).to(image.device)


@torch.no_grad()
def variations(
    model: LatentDiffusion, init: Image.Image, *, preprocessing: str = "card",
    height: int | None = None, width: int | None = None, **options: Any,
) -> list[Image.Image]:  # fmt: skip
    """Pictures like `init`: CLIP's image embedding takes the place of the text (Pinkney's image variations).

    preprocessing  how init becomes 224 x 224 pixels: "card", as the model card asks, or "original", as in training
    height, width  pixels, multiples of 8; the model's own size if not given
    options        as for `txt2img`, without a negative prompt: guidance steers away from zeros. The card suggests cfg=3
    """
    job = Job.of("", options)
    if model.vision is None:
        raise ArgumentError(
            f"this model ({model.config.name}) takes text, not a picture: use img2img, or an image-variations model"
        )
    if job.negative is not None:
        raise ArgumentError("negative: image variations have no negative prompt", key="negative")
    require_known("preprocessing", preprocessing, PREPROCESSORS)
    size = size_of(model, height, width)
    pixels = preprocess(from_pil(to_rgb(init)), preprocessing, model.vision.config.image)
    context = model.vision(pixels.to(model.device, model.dtype))[:, None]
    images = []
    for part in job.parts(model):
        cond = Cond(context.expand(len(part.prompts), -1, -1))
        denoise = job.guided(model, [Cond(torch.zeros_like(cond.context)), cond])
        first = part.noise(model.latent_shape(len(part.prompts), *size))
        images += job.pictures(model, job.draw(model, denoise, first, part.noise))
    return images


def scaled(model: LatentDiffusion, init: Image.Image, height: int | None, width: int | None) -> Tensor:
    """[1, 3, H, W] in [-1, 1]: a picture at the size asked for, or at its own, rounded."""
    init = to_rgb(init)
    width, height = size_for(init, width, height)
    model.latent_shape(1, height, width)  # refuses a size before it is scaled to
    return from_pil(fit(init, width, height)).to(model.device)


def _redrawn(
    model: LatentDiffusion, job: Job, image: Tensor, strength: float, concat: Tensor | None
) -> list[Image.Image]:
    height, width = image.shape[2:]
    images = []
    for part in job.parts(model):
        n = len(part.prompts)
        if strength == 0:
            latent = precision.encode(model, image, tile=job.sampling.tile).expand(n, -1, -1, -1)
        else:
            conds = job.conds(model, part, (height, width))
            if concat is not None:
                conds = [replace(cond, concat=concat.expand(n, -1, -1, -1)) for cond in conds]
            shape = model.latent_shape(n, height, width)
            latent = precision.encode(model, image, part.noise(shape), tile=job.sampling.tile)
            latent = job.redraw(model, job.guided(model, conds), latent, strength, part.noise(shape), part.noise)
        images += job.pictures(model, latent)
    return images
