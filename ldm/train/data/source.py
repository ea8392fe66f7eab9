"""`PictureSource`: pictures that are listed without decoding them, and decoded one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # of files that are taken for pictures, in capitals or not


@dataclass(frozen=True)
class Item:
    """One picture, listed but not decoded."""

    id: str  # its name in its source: a relative path, "000.tar/key", "scene 17"
    captions: tuple[str, ...]  # at least one; one of them is drawn for every example
    size: tuple[int, int]  # height and width in pixels as it will be decoded, turned upright
    fingerprint: str  # another one when the picture is another


@dataclass(frozen=True)
class Bad:
    """A picture that is left out."""

    id: str
    why: str  # the rest of a sentence that begins with the id


class PictureSource(Protocol):
    """Pictures with captions, in an order that depends on nothing but the data."""

    items: Sequence[Item]
    bad: Sequence[Bad]  # pictures that were left out while listing
    has_depth: bool  # whether every item has a depth map

    def picture(self, i: int) -> Image.Image:
        """Item i, RGB and upright. Raises FileError that names it."""

    def depth(self, i: int) -> Image.Image:
        """The depth map of item i, RGB, light is near, where `has_depth`. Raises FileError that names it."""


def digest(*parts: str | bytes) -> str:
    """32 hexadecimal digits of these parts in this order."""
    h = blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()
