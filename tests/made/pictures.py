"""Noisy pictures, alone, with captions, in tar files and in batches, and what a resize makes of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from benchmarks.models.seeded import normal
from ldm.conditioning.cond import Sizes
from ldm.train.data.batch import Batch


def color(image: Image.Image) -> tuple[int, int, int]:
    """The one colour of a picture."""
    assert image.mode == "RGB"
    ((_, value),) = image.getcolors()
    return value


def photo_of(width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def half_white(width: int = 32, height: int = 32) -> Image.Image:
    """A mask: the right half is repainted."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def levels_of(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def levels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def drawn_at(image: Image.Image, colour: str) -> list[tuple[int, int]]:
    """Where a picture has exactly this colour."""
    wanted, width = ImageColor.getrgb(colour), image.width
    return [
        (i % width, i // width)
        for i, pixel in enumerate(
            image.get_flattened_data() if hasattr(image, "get_flattened_data") else image.getdata()
        )
        if pixel == wanted
    ]


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (6, 9), **how: object) -> Path:
    """A noisy picture of (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path, **how)
    return path


def captioned(path: Path, text: str, **how: object) -> None:
    picture(path, **how).with_suffix(".txt").write_text(text)


def png(seed: int = 0, size: tuple[int, int] = (5, 7)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, members: dict[str, bytes | str], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            data = data.encode() if isinstance(data, str) else data
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def batch_of(n: int = 2, side: int = 64, *, first: int = 0, **fields) -> Batch:
    images = torch.stack([normal(f"image{i}", (3, side, side)).clamp(-1, 1) for i in range(n)])
    captions = tuple(("a red cube", "a blue sphere behind a green cone")[i % 2] for i in range(n))
    return Batch(
        tuple(range(first, first + n)),
        captions,
        (side, side),
        (Sizes(),) * n,
        torch.ones(n),
        **({"image": images} | fields),
    )


def cubic(x: float) -> float:
    """The kernel of Keys 1981 with a = -0.75, which torch and OpenCV take."""
    x = abs(x)
    return 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else (-0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0)


def resampling(length: int, size: int, corners: bool) -> Tensor:
    """[size, length]: one axis of a bicubic resize without antialias, written out; beyond the border its last pixel is
    repeated."""
    matrix = torch.zeros(size, length, dtype=torch.float64)
    for i in range(size):
        place = i * (length - 1) / (size - 1) if corners else (i + 0.5) * length / size - 0.5
        first = int(place // 1) - 1
        for j in range(first, first + 4):
            matrix[i, min(max(j, 0), length - 1)] += cubic(place - j)
    return matrix
