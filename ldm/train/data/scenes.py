"""The scenes that the model that ships learns from, rendered as they are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ldm import blocks
from ldm.errors import ArgumentError, FileError
from ldm.train.data.source import Bad, Item, PictureSource, digest

CAPTIONS = 4  # ways each of them is described


class Scenes(PictureSource):
    """Scenes 0 to n - 1 of `ldm.blocks`, size x size pixels, of combinations that are not held out, with four captions.

    caption  of every scene instead of these
    """

    bad: Sequence[Bad] = ()
    has_depth = False

    def __init__(self, n: int, size: int, caption: str = ""):
        if n < 1 or size < 8:
            what = f"{n} of {size} pixels; give at least 1, of at least 8 pixels"
            raise ArgumentError(f"scenes: {what}", key="data.scenes")
        self.size = size
        self.items = [self._item(i, (caption,) if caption else captions_of(i, n)) for i in range(n)]

    def _item(self, i: int, captions: tuple[str, ...]) -> Item:
        return Item(f"scene {i}", captions, (self.size, self.size), digest(blocks.RENDERER, f"{i} {self.size}"))

    def picture(self, i: int) -> Image.Image:
        """Scene i."""
        return Image.fromarray(blocks.render(blocks.sample(i), self.size))

    def depth(self, i: int) -> Image.Image:
        """The renderer makes no depth maps: raises FileError."""
        raise FileError("has no depth map", path=self.items[i].id)


def captions_of(i: int, n: int) -> tuple[str, ...]:
    """The captions of scene i of n."""
    scene = blocks.sample(i)
    return tuple(blocks.caption(scene, i + k * n) for k in range(CAPTIONS))
