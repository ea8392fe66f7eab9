"""What commands draw with a tiny model, and what the functions of Python draw with the same options."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from ldm import tasks
from ldm.model import LatentDiffusion
from ldm.pictures.read import open_image

QUICK = "--ckpt tiny.safetensors --steps 2 --seed 7 --dtype float32 --no-fast"
OPTIONS = {"seeds": [7], "steps": 2, "weighting": True}


def drawn(model: LatentDiffusion, prompt: str = "a cat", **options: Any) -> Image.Image:
    """The picture of the Python function."""
    return tasks.txt2img(model, prompt, **OPTIONS | options)[0]


def same(path: str, image: Image.Image) -> bool:
    return np.array_equal(open_image(path), image)
