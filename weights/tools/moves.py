"""What a conversion puts under each key of its target: from which tensors of the source, and what is done to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.files.folders import Folder
from weights.files.opened import Weights
from weights.files.write import Pending, cast
from weights.names.layout import Layout
from weights.names.places import Place, Shape

MADE = "synthesised"


@dataclass(frozen=True)
class Move:
    """One tensor of the target."""

    sources: tuple[str, ...]  # keys in the source; none: it is made from nothing
    done: str  # what is done to them, in words
    pending: Pending


def copied(file: Weights | Folder, key: str, dtype: torch.dtype | None = None, done: str = "copied") -> Move:
    """A tensor as it is, converted to `dtype` if its numbers are floating-point ones."""
    spec = file.specs[key]
    return Move((key,), done, Pending(cast(spec.dtype, dtype), spec.shape, lambda: file.read(key, mapped=False)))


def synthesised(make: Callable[[], Tensor]) -> Move:
    """A tensor that the source need not have."""
    made = make()
    return Move((), MADE, Pending(made.dtype, tuple(made.shape), make))


def renamed(
    file: Weights | Folder,
    sources: Mapping[str, Place],
    wanted: Mapping[str, Shape],
    layout: Layout,
    dtype: torch.dtype | None = None,
) -> dict[str, Move]:
    """The parameters `wanted` (our name: shape) under the keys of another layout. `sources` says where each lies in `file`."""
    parts: dict[str, list[_Part]] = {}
    for name, shape in wanted.items():
        place = layout.places(name)[0]
        for i, key in enumerate(place.keys):
            parts.setdefault(key, []).append(_Part(sources[name], place, i, shape))
    return {
        key: _move(file, sorted(pieces, key=lambda part: "qkv".find(part.target.how)), dtype)
        for key, pieces in parts.items()
    }


@dataclass(frozen=True)
class _Part:
    """One of our parameters on its way into a tensor of the target."""

    source: Place
    target: Place
    index: int  # which of the target's keys it is for
    ours: Shape

    @property
    def keys(self) -> tuple[str, ...]:
        """What is read; of rows that are apart on both sides only those of this part."""
        return (
            self.source.keys[self.index : self.index + 1] if self.source.more and self.target.more else self.source.keys
        )

    @property
    def shape(self) -> Shape:
        """Of what it becomes there."""
        if self.target.more:
            return (self.ours[0] // len(self.target.keys), *self.ours[1:])
        return (
            self.ours[:2]
            if self.target.how == "kernel"
            else self.ours[::-1]
            if self.target.how == "transposed"
            else self.ours
        )

    def made(self, file: Weights | Folder) -> Tensor:
        if self.source.more and self.target.more:
            return file.read(self.keys[0], mapped=False)
        ours = read(file, self.source, self.ours)
        if self.target.more:
            return ours.chunk(len(self.target.keys))[self.index]
        return (
            ours.reshape(self.shape)
            if self.target.how == "kernel"
            else ours.T.contiguous()
            if self.target.how == "transposed"
            else ours
        )


def read(file: Weights | Folder, place: Place, ours: Shape) -> Tensor:
    """One of our parameters, of shape `ours`, as a copy in the type in which it is stored."""
    if place.more:
        return torch.cat([file.read(key, mapped=False) for key in place.keys])
    return place.turned(file.read(place.key, rows=place.rows(file.shape(place.key)), mapped=False), ours)


def _move(file: Weights | Folder, parts: list[_Part], dtype: torch.dtype | None) -> Move:
    keys = tuple(dict.fromkeys(key for part in parts for key in part.keys))
    types = {file.specs[key].dtype for key in keys}
    if len(types) > 1 and any(dtype.itemsize == 1 for dtype in types):
        raise file.error(f"{keys[0]} and {keys[1]} are to be joined, and one has 8-bit numbers; pass dtype=", keys[0])
    stored = functools.reduce(torch.promote_types, types)
    rows = sum(part.shape[0] for part in parts) if len(parts) > 1 else 0
    shape = (rows, *parts[0].shape[1:]) if rows else parts[0].shape

    def make() -> Tensor:
        made = [part.made(file) for part in parts]
        return torch.cat(made) if len(made) > 1 else made[0]

    return Move(keys, _done(file, parts), Pending(cast(stored, dtype), shape, make))


def _done(file: Weights | Folder, parts: Iterable[_Part]) -> str:
    """In words, what happens to a tensor on its way."""
    words: dict[str, None] = {}
    for part in parts:
        split, joined = part.source.how in ("q", "k", "v"), part.target.how in ("q", "k", "v")
        before = len(file.shape(part.source.key))
        if split != joined:
            words[f"{part.source.how} split from q, k, v" if split else "q, k, v joined"] = None
        if bool(part.source.more) != bool(part.target.more):
            words["q, k, v joined" if part.source.more else f"{'qkv'[part.index]} split from q, k, v"] = None
        if (part.source.how == "transposed") != (part.target.how == "transposed"):
            words["transposed"] = None
        if before != len(part.shape):
            words["1x1 convolution to matrix" if before > len(part.shape) else "matrix to 1x1 convolution"] = None
    return ", ".join(words) or "copied"
