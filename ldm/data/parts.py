"""A source's pictures, sorted: into buckets, into what is learnt from, what is held out and what is too small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from ldm.data import frame as framing
from ldm.data.frame import Size
from ldm.data.plan import Plan
from ldm.data.source import Bad, Source, digest
from ldm.errors import FileError
from ldm.recipe import Run


@dataclass(frozen=True)
class Part:
    """The pictures to learn from, or those that keep the class as it is."""

    source: Source
    weight: float  # of their losses
    buckets: tuple[Size, ...]  # of every item
    groups: dict[Size, list[int]]  # the items of every bucket that are learnt from
    held: list[int]  # those that are not
    bad: list[Bad]  # what is left out
    plan: Plan


def part(source: Source, sizes: Sequence[Size], run: Run, *, weight: float = 1.0, held_out: float = 0.0) -> Part:
    """The pictures of a source in buckets of these sizes.

    held_out  share that is not learnt from, the next whole number of pictures; which ones depends on their names alone
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
    return Part(source, weight, buckets, groups, sorted(held), bad, Plan([groups[size] for size in sorted(groups)], run.micro, run.seed))
