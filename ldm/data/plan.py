"""Which pictures every micro-batch of a run holds, and every other choice about an example, as functions of the seed."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch


def fraction(seed: int, *what: object) -> float:
    """A number from 0 to below 1, drawn for this purpose alone: the same whenever it is asked for."""
    return int.from_bytes(_hash(seed, *what)[:6], "little") / 2**48


def permutation(n: int, seed: int, *what: object) -> list[int]:
    """0 to n - 1 in an order drawn for this purpose alone."""
    generator = torch.Generator().manual_seed(int.from_bytes(_hash(seed, *what)[:4], "little"))  # torch's CPU generator uses 32 bits
    return torch.randperm(n, generator=generator).tolist()


def _hash(seed: int, *what: object) -> bytes:
    return blake2b("/".join(map(str, (seed, *what))).encode(), digest_size=8).digest()


class Plan:
    """The order of the pictures: pass after pass over all of them, each shuffled anew.

    groups  the numbers of the pictures of each bucket
    micro   pictures at once, all of one bucket
    Pictures of one size follow each other without a seam, so that how many are seen at once changes nothing. With several buckets
    each pass shuffles micro-batches, and each bucket's last one is filled up from the bucket's beginning. Two passes are kept in memory.
    """

    def __init__(self, groups: Sequence[Sequence[int]], micro: int, seed: int):
        self.groups, self.micro, self.seed = [list(group) for group in groups if group], micro, seed
        self.micros = sum(-(-len(group) // micro) for group in self.groups)  # that hold all pictures
        self._kept: dict[int, list] = {}  # passes

    def items(self, number: int) -> tuple[int, ...]:
        """The pictures of micro-batch `number` of the run, counted from 0."""
        if len(self.groups) > 1:
            epoch, place = divmod(number, self.micros)
            return self._pass(epoch)[place]
        places = (divmod(i, len(self.groups[0])) for i in range(number * self.micro, (number + 1) * self.micro))
        return tuple(self._pass(epoch)[place] for epoch, place in places)

    def _pass(self, epoch: int) -> list:
        """The pictures of one pass, if there is one bucket; otherwise its micro-batches."""
        made = self._kept.get(epoch)
        if made is None:  # several threads may be here: what one of them keeps another may drop
            shuffled = [[group[i] for i in permutation(len(group), self.seed, "pass", epoch, g)] for g, group in enumerate(self.groups)]
            made = shuffled[0] if len(shuffled) == 1 else self._mixed(shuffled, epoch)
            self._kept = {n: each for n, each in self._kept.items() if abs(n - epoch) < 2} | {epoch: made}
        return made

    def _mixed(self, shuffled: Sequence[list[int]], epoch: int) -> list[tuple[int, ...]]:
        made = [tuple(group[i % len(group)] for i in range(n, n + self.micro)) for group in shuffled for n in range(0, len(group), self.micro)]
        return [made[i] for i in permutation(len(made), self.seed, "order", epoch)]
