"""Masks of the part to repaint: from pictures, as pictures of 0 and 255, and as tensors of 0 and 1."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import ArgumentError
from ldm.images import from_pil, to_pil, to_rgb

MAX_FEATHER = 256
SIDES = ("left", "right", "top", "bottom")


def mask_of(image: Image.Image, size: tuple[int, int], source: Literal["white", "alpha"] = "white") -> Image.Image:
    """The part to repaint, 255, of a picture of size (width, height): mode L, nothing between 0 and 255.

    white  where the mask is at least half white, as in the original inpainting script
    alpha  where the picture is at least half transparent
    A mask of another size is scaled (nearest) if its shape agrees to 1 %. Raises ArgumentError if it does not, if there
    is no transparency to read, and if nothing is to be painted.
    """
    if source == "alpha":
        if "A" not in image.getbands() and "transparency" not in image.info:
            what = "mask: the picture has no transparency; give a mask that is white where to repaint"
            raise ArgumentError(what, key="mask")
        level = image.convert("RGBA").getchannel("A").point(lambda a: 255 if a < 128 else 0)
    else:
        level = to_rgb(image).convert("L").point(lambda v: 255 if v >= 128 else 0)
    (w, h), (width, height) = level.size, size
    if abs(w * height - h * width) > 0.01 * w * height:
        what = f"mask: it is {w}x{h} and the picture {width}x{height}; give a mask of the same shape"
        raise ArgumentError(what, key="mask")
    level = level.resize(size, Image.Resampling.NEAREST)
    if not level.getbbox():
        raise ArgumentError("mask: nothing to paint: it is black all over; white is what is repainted", key="mask")
    return level


def feathered(mask: Image.Image, pixels: int) -> Image.Image:
    """The mask rising from its border inwards to 255 over 0 to 256 pixels; 0 stays 0. Raises ArgumentError."""
    if isinstance(pixels, bool) or not isinstance(pixels, int) or not 0 <= pixels <= MAX_FEATHER:
        raise ArgumentError(f"feather: {pixels!r}; give 0 to {MAX_FEATHER} pixels", key="feather")
    inner, total = mask, np.asarray(mask, dtype=np.float32)
    for _ in range(pixels):
        inner = inner.filter(ImageFilter.MinFilter(3))
        total = total + np.asarray(inner)
    return Image.fromarray((total / (pixels + 1)).round().astype(np.uint8))


def paste_back(painted: Image.Image, init: Image.Image, mask: Image.Image) -> Image.Image:
    """`painted` where the mask is white, the very pixels of `init` where it is black."""
    return Image.composite(painted, init, mask)


def to_tensor(mask: Image.Image) -> Tensor:
    """Mode L -> [1, 1, H, W] float32 of 0 and 1; 1 is repainted."""
    return (from_pil(mask.convert("RGB"))[:, :1] >= 0).float()


def cells(mask: Tensor, factor: int, *, any_pixel: bool) -> Tensor:
    """A mask [b, 1, H, W] of pixels as one [b, 1, h, w] of latent cells.

    any_pixel  a cell is repainted if one of its pixels is, so that nothing of it shows through. Otherwise its first
               pixel decides (nearest), as in the original inpainting script
    """
    return F.max_pool2d(mask, factor) if any_pixel else F.interpolate(mask, scale_factor=1 / factor, mode="nearest")


def extended(image: Image.Image, sides: dict[str, int]) -> tuple[Image.Image, Image.Image]:
    """A larger picture whose new sides repeat the border, with the mask of the new part.

    sides  pixels to add at left, right, top, bottom
    Raises ArgumentError for another side, a number below 0, or nothing to add.
    """
    for side, pixels in sides.items():
        if side not in SIDES:
            raise ArgumentError(f"extend: {side[:20]!r} is no side; there are {', '.join(SIDES)}", key="extend")
        if isinstance(pixels, bool) or not isinstance(pixels, int) or not 0 <= pixels <= 8192:
            raise ArgumentError(f"extend: {side}={pixels!r}; give 0 to 8192 pixels", key="extend")
    left, right, top, bottom = (sides.get(side, 0) for side in SIDES)
    if not (left or right or top or bottom):
        raise ArgumentError("extend: nothing to add; give left=128, for example", key="extend")
    mask = Image.new("L", (image.width + left + right, image.height + top + bottom), 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return padded(image, left, right, top, bottom), mask


def padded(image: Image.Image, left: int, right: int, top: int, bottom: int) -> Image.Image:
    """The picture with its border repeated outwards by these numbers of pixels."""
    return to_pil(F.pad(from_pil(image), (left, right, top, bottom), mode="replicate"))[0]
