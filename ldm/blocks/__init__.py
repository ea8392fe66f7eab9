"""Captioned scenes of simple solids on a floor, the pictures that the model that ships learns from."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy import ndarray

from ldm.blocks.render import PIXELS_PER_UNIT, Placed, layout, light_from, on_floor, paint, project, render
from ldm.blocks.scenes import (
    COLORS,
    INVERSE,
    RELATIONS,
    RGB,
    SHAPES,
    SIZES,
    Scene,
    Solid,
    canonical,
    caption,
    held_out,
    held_out_scenes,
    sample,
)

__all__ = [
    "COLORS", "INVERSE", "PIXELS_PER_UNIT", "RELATIONS", "RENDERER", "RGB", "SHAPES", "SIZES", "Placed", "Scene",
    "Solid", "batch", "canonical", "caption", "example", "held_out", "held_out_scenes", "layout", "light_from",
    "on_floor", "paint", "project", "render", "sample",
]  # fmt: skip

# Names the pictures and captions that this code makes, for kept latents and states of runs. Change it with them.
RENDERER = "4a8c0a6295b733b4a11143608d4360e2"


def example(seed: int, size: int = 128) -> tuple[ndarray, str]:
    """Training example number `seed`: its picture, uint8 [size, size, 3], and its caption."""
    scene = sample(seed)
    return render(scene, size), caption(scene, seed)


def batch(seeds: Iterable[int], size: int = 128) -> tuple[ndarray, list[str]]:
    """The training examples of these numbers: pictures uint8 [n, size, size, 3] and captions."""
    pictures, captions = zip(*(example(seed, size) for seed in seeds), strict=True)
    return np.stack(pictures), list(captions)
