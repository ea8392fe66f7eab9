"""Random holes to train inpainting with: strokes and boxes as LaMa's, or everything."""

from __future__ import annotations

from math import cos, pi, sin

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

MAX_CHAINS, MAX_SEGMENTS, MAX_BOXES = 3, 5, 3
LENGTH = (0.1, 0.6)  # of one segment of a chain; this and the following are shares of the shorter side
WIDTH = (0.1, 0.35)  # of a chain
BOX = (0.15, 0.65)  # either side of a box


def hole(height: int, width: int, generator: torch.Generator, whole: float) -> Tensor:
    """A mask [1, height, width] float32 of 0 and 1; 1 is to be painted.

    With probability `whole` it is 1 everywhere. Otherwise it shows, with equal probability, a few polygonal chains of a
    large random width or a few boxes of any aspect ratio (Suvorov et al. 2022, section 3.3, "wide" and "box" masks);
    their numbers and sizes are ours.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator).item()

    def count(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    if uniform(0, 1) < whole:
        return torch.ones(1, height, width)
    side = min(height, width)
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    if uniform(0, 1) < 0.5:
        for _ in range(count(MAX_CHAINS)):
            begin = uniform(0, width), uniform(0, height)
            segments = [(uniform(0, 2 * pi), side * uniform(*LENGTH)) for _ in range(count(MAX_SEGMENTS))]
            _chain(draw, begin, segments, side * uniform(*WIDTH))
    else:
        for _ in range(count(MAX_BOXES)):
            w, h = round(side * uniform(*BOX)), round(side * uniform(*BOX))
            left, top = int(uniform(0, width - w + 1)), int(uniform(0, height - h + 1))
            draw.rectangle((left, top, left + w - 1, top + h - 1), fill=1)
    return torch.from_numpy(np.array(mask, dtype=np.float32))[None]


def _chain(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], segments: list[tuple[float, float]], width: float
) -> None:
    """Line after line, (direction in radians, length in pixels) each, with round ends."""
    for direction, length in [(0.0, 0.0), *segments]:
        to = (at[0] + length * cos(direction), at[1] + length * sin(direction))
        draw.line((*at, *to), fill=1, width=max(1, round(width)))
        draw.ellipse((to[0] - width / 2, to[1] - width / 2, to[0] + width / 2, to[1] + width / 2), fill=1)
        at = to
