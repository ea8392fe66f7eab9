"""The scenes that the model that ships learns from, rendered as they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ldm import blocks
from ldm.errors import ArgumentError, FileError
from ldm.train.data.source import Bad, Item, digest

CAPTIONS = 4  # ways each of them is described


class Scenes:
    """Scenes 0 to n - 1 of `ldm.blocks`, size x size pixels, none of a combination that is held out, each said in four ways.

    caption  said of every one instead
    """

    bad: Sequence[Bad] = ()
    has_depth = False

    def __init__(self, n: int, size: int, caption: str = ""):
        if n < 1 or size < 8:
            raise ArgumentError(
                f"scenes: {n} of {size} pixels; give at least 1, of at least 8 pixels", key="data.scenes"
            )
        self.size = size
        renderer = digest(blocks.code())  # another renderer, other pictures
        self.items = [
            Item(f"scene {i}", (caption,) if caption else said(i, n), (size, size), digest(renderer, f"{i} {size}"))
            for i in range(n)
        ]

    def picture(self, i: int) -> Image.Image:
        """Scene i."""
        return Image.fromarray(blocks.render(blocks.sample(i), self.size))

    def depth(self, i: int) -> Image.Image:
        """The renderer gives none."""
        raise FileError("has no depth map", path=self.items[i].id)


def said(i: int, n: int) -> tuple[str, ...]:
    """The captions of scene i of n."""
    scene = blocks.sample(i)
    return tuple(blocks.caption(scene, i + k * n) for k in range(CAPTIONS))
