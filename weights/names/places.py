"""Where one of our tensors lies in a file: under which key, and what has to be done to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Shape = tuple[int, ...]

# whole       as it is
# q, k, v     a third of the rows: OpenCLIP stacks the three matrices (and biases) of an attention in this order
# transposed  `x @ w` there, `x @ w.T` here
# kernel      a 1x1 convolution here; there too, or the same numbers as a matrix
How = Literal["whole", "q", "k", "v", "transposed", "kernel"]


@dataclass(frozen=True)
class Place:
    """A tensor of a file, or the part of it that is ours; or several whose rows, one after the other, are ours."""

    key: str
    how: How = "whole"
    more: tuple[str, ...] = ()  # keys whose rows follow

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that are read."""
        return (self.key, *self.more)

    def under(self, prefix: str) -> Place:
        """The same place in a network whose keys begin with `prefix`."""
        return Place(prefix + self.key, self.how, tuple(prefix + key for key in self.more))

    def rows(self, stored: Shape) -> slice | None:
        """The rows that are ours of a tensor of this shape; None: all of them."""
        if self.how not in ("q", "k", "v"):
            return None
        n, i = stored[0] // 3, "qkv".index(self.how)
        return slice(i * n, (i + 1) * n)

    def stored(self, ours: Shape) -> Shape:
        """The shape in the file, under each key, of what has shape `ours` here."""
        if self.how in ("q", "k", "v"):
            return (3 * ours[0], *ours[1:])
        if self.more:
            return (ours[0] // len(self.keys), *ours[1:])
        return ours[::-1] if self.how == "transposed" else ours

    def fits(self, stored: Shape, ours: Shape) -> bool:
        """Can a tensor of shape `stored` give ours?"""
        if self.how == "kernel" and stored == ours[:2] and ours[2:] == (1, 1):
            return True
        return stored == self.stored(ours)

    def ours(self, stored: Shape) -> Shape:
        """The shape here of what has shape `stored` in the file.

        Of a kernel: as stored, since only our network knows.
        """
        if self.how in ("q", "k", "v"):
            return (stored[0] // 3, *stored[1:]) if stored else ()
        return stored[::-1] if self.how == "transposed" else stored

    def turned(self, tensor: Tensor, ours: Shape) -> Tensor:
        """Ours, from the rows that were read."""
        if self.how == "transposed":
            return tensor.T.contiguous()
        return tensor.view(ours) if self.how == "kernel" else tensor


def joined(key: str, parts: Sequence[tuple[Place, Tensor]]) -> Tensor:
    """The tensor that a file has under a key, from those of ours that lie in it, each with its place.

    Kernels keep our shape.
    """
    rows = []
    for place, tensor in sorted(parts, key=lambda part: "qkv".find(part[0].how)):
        if place.more:
            tensor = tensor.chunk(len(place.keys))[place.keys.index(key)]
        rows.append(tensor.T.contiguous() if place.how == "transposed" else tensor)
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def short(key: str, limit: int = 34) -> str:
    """The telling end of a long name."""
    return key if len(key) <= limit else "..." + key[3 - limit :]
