"""The pictures of every micro-batch of a run, and the other choices about its examples, as functions of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil
from typing import Any

import torch

from ldm.errors import FileError
from ldm.train.data import frame as framing
from ldm.train.data.frame import Size
from ldm.train.data.source import Bad, PictureSource, digest
from ldm.train.recipe import Run


def fraction(seed: int, *what: object) -> float:
    """A number from 0 to below 1, drawn for this purpose alone: always the same."""
    return int.from_bytes(_hash(seed, *what)[:6], "little") / 2**48


def permutation(n: int, seed: int, *what: object) -> list[int]:
    """0 to n - 1 in an order drawn for this purpose alone."""
    number = int.from_bytes(_hash(seed, *what)[:4], "little")  # torch's CPU generator uses 32 bits
    return torch.randperm(n, generator=torch.Generator().manual_seed(number)).tolist()


def _hash(seed: int, *what: object) -> bytes:
    return blake2b("/".join(map(str, (seed, *what))).encode(), digest_size=8).digest()


class Plan:
    """The order of the pictures: pass after pass over all of them, each shuffled anew.

    groups  the numbers of the pictures of each bucket
    micro   pictures at once, all of one bucket
    Pictures of one size follow each other without a seam, so that the size of a micro-batch changes nothing. With
    several buckets each pass shuffles micro-batches, and each bucket's last one is filled up from the bucket's
    beginning. Two passes are kept in memory.
    """

    def __init__(self, groups: Sequence[Sequence[int]], micro: int, seed: int):
        self.groups, self.micro, self.seed = [list(group) for group in groups if group], micro, seed
        self.micros = sum(-(-len(group) // micro) for group in self.groups)  # that hold all pictures
        self._kept: dict[int, list[Any]] = {}  # passes

    def items(self, number: int) -> tuple[int, ...]:
        """The pictures of micro-batch `number` of the run, counted from 0."""
        if len(self.groups) > 1:
            epoch, place = divmod(number, self.micros)
            return self._pass(epoch)[place]
        places = (divmod(i, len(self.groups[0])) for i in range(number * self.micro, (number + 1) * self.micro))
        return tuple(self._pass(epoch)[place] for epoch, place in places)

    def _pass(self, epoch: int) -> list[Any]:
        """The pictures of one pass, if there is one bucket; otherwise its micro-batches."""
        made = self._kept.get(epoch)
        if made is None:  # several threads may be here: a pass that one of them keeps another may drop
            shuffled = [
                [group[i] for i in permutation(len(group), self.seed, "pass", epoch, g)]
                for g, group in enumerate(self.groups)
            ]
            made = shuffled[0] if len(shuffled) == 1 else self._mixed(shuffled, epoch)
            self._kept = {n: each for n, each in self._kept.items() if abs(n - epoch) < 2} | {epoch: made}
        return made

    def _mixed(self, shuffled: Sequence[list[int]], epoch: int) -> list[tuple[int, ...]]:
        made = [
            tuple(group[i % len(group)] for i in range(n, n + self.micro))
            for group in shuffled
            for n in range(0, len(group), self.micro)
        ]
        return [made[i] for i in permutation(len(made), self.seed, "order", epoch)]


@dataclass(frozen=True)
class Subset:
    """The pictures to learn from, or those that keep the class as it is."""

    source: PictureSource
    weight: float  # of their losses
    buckets: tuple[Size, ...]  # of every item
    groups: dict[Size, list[int]]  # the items of every bucket that are learnt from
    held: list[int]  # the items that are held out
    bad: list[Bad]  # pictures left out
    plan: Plan


def subset(
    source: PictureSource, sizes: Sequence[Size], run: Run, *, weight: float = 1.0, held_out: float = 0.0
) -> Subset:
    """The pictures of a source in buckets of these sizes.

    held_out  share that is not learnt from, rounded up to whole pictures; they are chosen by their names alone
    A picture that would have to be enlarged more than twice is left out. Raises FileError where nothing is left.
    """
    items, bad = source.items, list(source.bad)
    buckets = tuple(framing.bucket(sizes, item.size) for item in items)
    usable = []
    for i, (item, size) in enumerate(zip(items, buckets, strict=True)):
        if framing.enlarged(item.size, size) <= framing.MAX_ENLARGED:
            usable.append(i)
        else:
            small = f"is {item.size[1]}x{item.size[0]} pixels, less than half of {size[1]}x{size[0]}"
            bad.append(Bad(item.id, f"{small}; give a larger one, or a smaller data.size"))
    if not usable:
        raise FileError(f"data: no picture is left to learn from: {bad[-1].id[-60:]} {bad[-1].why}")
    by_name = sorted(usable, key=lambda i: digest("held out", items[i].id))
    held = by_name[: ceil(held_out * len(usable) - 1e-9)]  # 0.1 of 30 is 3, and a little more in floats
    groups: dict[Size, list[int]] = {}
    for i in sorted(by_name[len(held) :]):
        groups.setdefault(buckets[i], []).append(i)
    if not groups:
        raise FileError(f"data.held_out: leaves none of {len(usable)} pictures to learn from; lower it")
    plan = Plan([groups[size] for size in sorted(groups)], run.micro, run.seed)
    return Subset(source, weight, buckets, groups, sorted(held), bad, plan)
