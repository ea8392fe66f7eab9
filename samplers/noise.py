"""Noise that depends on the seed of each image alone: not on the batch, the device or other random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from samplers.core import Noise


def seeded(seeds: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """Noise for a batch with one seed per image: image k draws from a generator of its own, seeded seeds[k].

    Draws are float32 on the CPU and then moved, so every device sees the same numbers, and image k of a batch sees the
    same as if it were made alone. A draw is a function of (seed, how many draws came before it, their shapes). Call
    `seeded` anew to begin again.
    Returns noise(shape [b, ...]) -> N(0, 1) of that shape on `device`. Raises ValueError for a seed that is no integer
    of 64 bits, for no seeds, and, when drawing, for a batch that is not one image per seed.
    """
    if len(seeds) == 0:
        raise ValueError("no seeds given: pass one integer per image, such as seeded([7])")
    for seed in seeds:
        if isinstance(seed, bool) or not hasattr(seed, "__index__") or not -(2**63) <= int(seed) < 2**64:
            raise ValueError(f"seed {seed!r} is not an integer from -2^63 to 2^64 - 1: pass one integer per image")
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def noise(shape: Sequence[int]) -> Tensor:
        batch, *rest = shape
        if batch != len(generators):
            raise ValueError(f"{batch} images, but {len(generators)} seeds: pass one seed per image")
        return torch.stack([torch.randn(rest, generator=g, dtype=torch.float32) for g in generators]).to(device)

    return noise
