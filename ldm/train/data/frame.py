"""The part of a picture that is learnt from: its bucket, how it is scaled, and where it is cut."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

from PIL import Image

from ldm.conditioning.cond import Sizes

MAX_RATIO = 2.0  # of a bucket's longer side to its shorter one
MAX_ENLARGED = 2.0  # how often a picture may be enlarged, along a side: more would train on blur

Size = tuple[int, int]  # height and width, pixels


class Frame(NamedTuple):
    """A picture is mirrored or not, scaled (Lanczos), and cut."""

    size: Size  # of the cut: its bucket
    scaled: Size  # of the whole picture; covers the bucket
    crop: tuple[int, int]  # top and left of the bucket in it
    mirrored: bool = False


def buckets(size: int, step: int) -> list[Size]:
    """The largest sizes of at most size x size pixels, sides multiples of `step`, from 1:2 to 2:1 (as SDXL's)."""
    fitting = set()
    for side in range(step, int(size * MAX_RATIO) + 1, step):
        other = size * size // side // step * step
        if other and max(side, other) <= MAX_RATIO * min(side, other):
            fitting |= {(side, other), (other, side)}
    largest = [(h, w) for h, w in fitting if not any((h <= a and w <= b) and (h, w) != (a, b) for a, b in fitting)]
    return sorted(largest)


def bucket(sizes: Sequence[Size], picture: Size) -> Size:
    """The size whose aspect ratio is nearest to the picture's, as a factor; of two equally near ones the first."""
    return min(sizes, key=lambda size: abs(log(size[0] / size[1]) - log(picture[0] / picture[1])))


def enlarged(picture: Size, size: Size) -> float:
    """By what factor a picture grows to cover a size."""
    return max(size[0] / picture[0], size[1] / picture[1])


def frame(picture: Size, size: Size, place: tuple[float, float] | None = None, mirrored: bool = False) -> Frame:
    """The frame of a picture in a size.

    place  of the cut, from 0 to below 1, downwards and to the right; None: the middle
    """
    scale = enlarged(picture, size)
    scaled = (max(size[0], round(picture[0] * scale)), max(size[1], round(picture[1] * scale)))
    spare = (scaled[0] - size[0], scaled[1] - size[1])
    if place is None:
        crop = (spare[0] // 2, spare[1] // 2)
    else:
        crop = (int(place[0] * (spare[0] + 1)), int(place[1] * (spare[1] + 1)))
    return Frame(size, scaled, crop, mirrored)


def framed(image: Image.Image, how: Frame) -> Image.Image:
    """The part of a picture in its frame."""
    if how.mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    (height, width), (top, left) = how.size, how.crop
    if image.size != how.scaled[::-1]:
        image = image.resize(how.scaled[::-1], Image.Resampling.LANCZOS)
    return image.crop((left, top, left + width, top + height))


def sizes(picture: Size, how: Frame) -> Sizes:
    """SDXL's size conditioning: the size before scaling, the cut's place and size (Podell et al. 2023, section 2.2)."""
    return Sizes(original=picture, crop=how.crop, target=how.size)
