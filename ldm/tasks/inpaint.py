"""Parts of pictures anew: `inpaint outpaint`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.errors import ArgumentError
from ldm.images import fit, from_pil, size_for, to_rgb
from ldm.limits import precision
from ldm.model import LatentDiffusion
from ldm.pictures.masks import cells, extended, feathered, mask_of, padded, paste_back, to_tensor
from ldm.tasks.job import Job, Part, require_strength, require_text_only
from samplers import keep_known

NATIVE = ("mask", "masked_image")


@torch.no_grad()
def inpaint(
    model: LatentDiffusion, init: Image.Image, mask: Image.Image, prompts: str | Sequence[str], *,
    strength: float = 1.0, feather: int = 0,
    height: int | None = None, width: int | None = None, **options: Any,
) -> list[Image.Image]:  # fmt: skip
    """Pictures in which what the mask covers is painted anew; every other pixel is that of `init`.

    mask           white (at least half) is repainted. Of the shape of init
    strength       1 begins from noise, less from init, noised; as for `img2img`, above 0
    feather        pixels over which the new fades in, inwards from the mask's border
    height, width  pixels: init is scaled to cover them and cut evenly first; its own, whatever they are, if not given
    A model with mask channels (9 in all) sees the mask and the picture with a grey hole, as in the original
    LatentInpaintDiffusion; with any text model the known region is kept at every step (Lugmayr et al. 2022). The rest
    as for `txt2img`.
    """
    job = Job.of(prompts, options)
    require_strength(strength, job.sampling)
    if strength == 0:
        raise ArgumentError("strength: 0 would paint nothing; give more", key="strength")
    if model.config.concat != NATIVE:
        require_text_only(model)
    init = to_rgb(init)
    mask = mask_of(mask, init.size)
    if height is not None or width is not None:
        size = size_for(init, width, height)
        init, mask = fit(init, *size), mask_of(fit(mask.convert("RGB"), *size), size)
    alpha = feathered(mask, feather)
    image, hole = _tensors(model, init, mask)
    images = []
    for part in job.parts(model):
        latent = _painted(model, job, part, image, hole, strength)
        images += [paste_back(each.crop((0, 0, *init.size)), init, alpha) for each in job.pictures(model, latent)]
    return images


def _painted(model: LatentDiffusion, job: Job, part: Part, image: Tensor, hole: Tensor, strength: float) -> Tensor:
    """Latents in which the hole [1, 1, H, W] in the image [1, 3, H, W] is painted anew."""
    n, (height, width) = len(part.prompts), image.shape[2:]
    shape, factor = model.latent_shape(n, height, width), model.config.vae.factor
    first = part.noise(shape)

    def encoded(image: Tensor) -> Tensor:
        return precision.encode(model, image, part.noise(shape), tile=job.sampling.tile)

    conds = job.conds(model, part, (height, width))
    known = None if model.config.concat == NATIVE else encoded(image)
    if known is None:  # the UNet sees the mask, and the picture with a hole that is 0, mid-grey
        masked = encoded(image * (hole < 0.5))
        concat = torch.cat([cells(hole, factor, any_pixel=False).expand(n, -1, -1, -1), masked], dim=1)
        denoise = job.guided(model, [replace(cond, concat=concat) for cond in conds])
    else:  # what is known is put back, noised, before every call, and clean after it
        denoise = keep_known(job.guided(model, conds), known, cells(hole, factor, any_pixel=True), first)
    if strength == 1:
        return job.draw(model, denoise, first, part.noise)
    latent = encoded(image) if known is None else known
    return job.redraw(model, denoise, latent, strength, first, part.noise)


def outpaint(
    model: LatentDiffusion,
    init: Image.Image,
    extend: Mapping[str, int],
    prompts: str | Sequence[str],
    **inpainting: Any,
) -> list[Image.Image]:
    """Pictures that go on beyond the borders of `init`, whose own pixels stay.

    extend      pixels to add at left, right, top, bottom
    inpainting  keywords of `inpaint`
    """
    canvas, mask = extended(to_rgb(init), dict(extend))
    return inpaint(model, canvas, mask, prompts, **inpainting)


def _tensors(model: LatentDiffusion, init: Image.Image, mask: Image.Image) -> tuple[Tensor, Tensor]:
    """The picture [1, 3, H, W] and the hole [1, 1, H, W], continued to the right and below to a size of latents."""
    right, below = (-side % model.config.vae.factor for side in init.size)
    image = from_pil(padded(init, 0, right, 0, below))
    hole = to_tensor(padded(mask.convert("RGB"), 0, right, 0, below))
    return image.to(model.device), hole.to(model.device)
