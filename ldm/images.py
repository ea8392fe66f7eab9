"""Pictures: PIL <-> tensors in [-1, 1], any mode -> RGB, and sizes."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from ldm.errors import ArgumentError, NonFinite


class ImageWarning(UserWarning):
    """Something about a picture was left out."""


def to_pil(images: Tensor) -> list[Image.Image]:
    """[b, 3, H, W] in [-1, 1] -> RGB pictures; values outside are clipped, and levels are rounded to the nearest.

    Raises NonFinite for NaN or infinity, which would otherwise come out black, and ArgumentError for another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ArgumentError(f"pictures are tensors [b, 3, H, W]; this one is {list(images.shape)}")
    if not torch.isfinite(images).all():
        raise NonFinite("the decoded picture has NaN or infinity in it; decode in float32 or bfloat16")
    levels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).numpy()]


def from_pil(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> [b, 3, H, W] float32 in [-1, 1]. Raises ArgumentError for more sizes, or no picture."""
    pictures = [to_rgb(image) for image in ([images] if isinstance(images, Image.Image) else images)]
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        raise ArgumentError(f"pictures of one batch must have one size; these have {sorted(sizes) or 'none'}")
    levels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return levels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: upright as EXIF says, 16-bit levels scaled to 8, colours in sRGB, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips to white
        image = Image.fromarray(((np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8))
    alpha, colour = None, image
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        alpha, colour = rgba.getchannel("A"), image.getchannel(0) if image.mode == "LA" else rgba.convert("RGB")
    colour = _to_srgb(colour, image.info.get("icc_profile"))
    if alpha is not None:
        colour = Image.composite(colour, Image.new("RGB", colour.size, "white"), alpha)
    colour.info = {}  # its profile and transparency have been applied
    return colour


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB. A profile that cannot be read, or is for other channels, is left out with an ImageWarning."""
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            given, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, given, srgb, outputMode="RGB")
            return converted or image  # only a picture converted in place comes back as None
        except (ImageCms.PyCMSError, OSError):
            warnings.warn(f"a colour profile that does not suit its {image.mode} picture was left out", ImageWarning, 4)
    return image.convert("RGB")


def nearest_multiple(pixels: float, unit: int = 8) -> int:
    """The multiple of `unit` nearest to a length in pixels, at least `unit`; halves go up."""
    return max(unit, math.floor(pixels / unit + 0.5) * unit)


def size_for(image: Image.Image, width: int | None = None, height: int | None = None) -> tuple[int, int]:
    """(width, height) in pixels to make of a picture: the sides that are given, the others from its shape.

    Sides that are not given are rounded to multiples of 8.
    """
    if width is not None:
        return width, nearest_multiple(width * image.height / image.width) if height is None else height
    if height is not None:
        return nearest_multiple(height * image.width / image.height), height
    return nearest_multiple(image.width), nearest_multiple(image.height)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture scaled to cover width x height pixels (Lanczos), and cut evenly on both sides, but not stretched."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
