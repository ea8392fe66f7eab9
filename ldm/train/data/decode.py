"""Pictures from bytes, refused as `ldm.images.open_image` refuses files."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager

from PIL import Image

from ldm.errors import FileError
from ldm.images import to_rgb
from ldm.pictures.read import opened
from ldm.train.data.source import Unusable

ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side
# a PNG with an orientation holds one of these, perhaps after its pixels
ORIENTED_PNG = (b"eXIf", b"rofile type exif", b"com.adobe.xmp")


def size_of(data: bytes, place: str) -> tuple[int, int]:
    """Height and width of the picture in these bytes, upright after EXIF; no pixel is decoded. Raises FileError."""
    with _opened(data, place) as image:
        width, height = image.size
        upright = image.format == "PNG" and not any(mark in data for mark in ORIENTED_PNG)  # asking would decode it
        lies = not upright and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return (width, height) if lies else (height, width)


def decoded(data: bytes, place: str) -> Image.Image:
    """The picture in these bytes, RGB and upright, of an animation the first frame. Raises FileError for `place`."""
    with _opened(data, place) as image:
        image.load()
        return to_rgb(image)


def _opened(data: bytes, place: str) -> AbstractContextManager[Image.Image]:
    if not data:
        raise FileError("is empty (0 bytes)", path=place)
    return opened(io.BytesIO(data), place)


def require_shape(depth: tuple[int, int], picture: tuple[int, int]) -> None:
    """Raises Unusable for a depth map (height, width) of another shape than its picture, to 1 %: as `depth2img`."""
    if abs(depth[1] * picture[0] - depth[0] * picture[1]) > 0.01 * depth[1] * picture[0]:
        shapes = f"{depth[1]}x{depth[0]} pixels, another shape than its {picture[1]}x{picture[0]}"
        raise Unusable(f"has a depth map of {shapes}")
