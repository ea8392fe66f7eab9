"""Animations: pictures of one size in one file, which are shown one after another."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

from PIL import Image

from ldm.errors import ArgumentError
from ldm.pictures.write import write_data

ANIMATIONS = ("webp", "gif")
MAX_FPS = 50.0  # viewers slow down a GIF that asks for more


def save_animation(
    frames: Sequence[Image.Image],
    path: str | PathLike[str] | Iterable[Path],
    *,
    kind: str = "webp",
    fps: float = 8,
    overwrite: bool = False,
) -> Path:
    """Write pictures of one size as an animation that repeats for ever; return its path. The rest is as for `save`.

    kind  webp, or gif: 256 colours a picture, and times in hundredths of a second
    fps   pictures a second, above 0 to 50
    Raises ArgumentError for another kind or speed, and for pictures of different sizes, or none.
    """
    if kind not in ANIMATIONS:
        raise ArgumentError(f"animation: {kind[:20]!r} is unknown; use {' or '.join(ANIMATIONS)}", key="animation")
    require_fps(fps)
    if len({frame.size for frame in frames}) != 1:
        sizes = sorted({frame.size for frame in frames}) or "none"
        raise ArgumentError(f"an animation is made of pictures of one size; these have {sizes}")
    buffer, time = io.BytesIO(), 1000 / fps
    if kind == "gif":
        frames, time = [frame.quantize(256) for frame in frames], max(20, round(time / 10) * 10)
    frames[0].save(
        buffer,
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=round(time),
        loop=0,
        **{"quality": 90} if kind == "webp" else {},
    )
    return write_data(buffer.getvalue(), path, overwrite)


def require_fps(fps: float) -> None:
    """Raises ArgumentError for a speed that no animation has."""
    if not 0 < fps <= MAX_FPS:
        raise ArgumentError(f"fps: {fps:g}; give more than 0 and at most {MAX_FPS:g} pictures a second", key="fps")
