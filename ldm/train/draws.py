"""The randomness of training as a function of seed, example and purpose: the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor


class Draws:
    """The random draws of some examples, which are numbered through the whole run, not through the data.

    Each example and purpose has a generator of its own, so that a draw depends neither on its batch nor on other draws.
    """

    def __init__(self, seed: int, index: Sequence[int]):
        self.seed, self.index = seed, tuple(index)

    def __len__(self) -> int:
        return len(self.index)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One for each example, on the CPU."""
        names = [f"{self.seed}/{i}/{purpose}".encode() for i in self.index]
        digests = [blake2b(name, digest_size=4).digest() for name in names]  # torch's CPU generator uses 32 bits
        return [torch.Generator().manual_seed(int.from_bytes(digest, "little")) for digest in digests]

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """N(0, 1) float32 [b, *shape]."""
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self.generators(purpose)])

    def uniform(self, purpose: str) -> Tensor:
        """[0, 1) float32 [b]."""
        return torch.cat([torch.rand(1, generator=g) for g in self.generators(purpose)])

    def integers(self, purpose: str, n: int) -> Tensor:
        """0 to n - 1, int64 [b]."""
        return torch.cat([torch.randint(n, (1,), generator=g) for g in self.generators(purpose)])

    def places(self, purpose: str, n: int) -> Tensor:
        """0 to n - 1, int64 [b]: each example's place in a random order of the n examples of its update."""
        updates = {i // n for i in self.index}
        generators = {update: Draws(self.seed, [update]).generators(purpose)[0] for update in updates}
        order = {update: torch.randperm(n, generator=generator) for update, generator in generators.items()}
        return torch.stack([order[i // n][i % n] for i in self.index])
