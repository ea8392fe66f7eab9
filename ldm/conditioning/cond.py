"""`Cond`, the inputs of the UNet besides x and t, and the sizes on which SDXL is conditioned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch
from torch import Tensor

from ldm.errors import ArgumentError
from ldm.networks.unet import timestep_embedding


@dataclass(frozen=True)
class Cond:
    """Batch-first; None: this family has no such input."""

    context: Tensor  # [b, n, context_dim]
    y: Tensor | None = None  # [b, vector_dim] float, or [b] integer noise level (x4 upscaler)
    concat: Tensor | None = None  # [b, c, h, w]: mask and masked latent, depth, or low-resolution image

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Several conditions as one batch. Raises ArgumentError if one has an input that another lacks."""

        def join(name: str, values: list[Tensor | None]) -> Tensor | None:
            tensors = [value for value in values if value is not None]
            if len(tensors) not in (0, len(values)):
                raise ArgumentError(f"conditions of one batch must all have {name}, or none")
            return torch.cat(tensors) if tensors else None

        context = torch.cat([c.context for c in conds])
        return Cond(context, join("y", [c.y for c in conds]), join("concat", [c.concat for c in conds]))


@dataclass(frozen=True)
class Sizes:
    """SDXL's conditioning besides text (Podell et al. 2023, sections 2.2 and 2.5). Pixels, heights before widths."""

    original: tuple[int, int] | None = None  # before it was scaled; small ones were blurred. None: the size made
    crop: tuple[int, int] = (0, 0)  # top and left of the part that was cut out; 0, 0 keeps objects in the middle
    target: tuple[int, int] | None = None  # what it was cut to. None: the size made
    aesthetic: float = 6.0  # score of its beauty, for the refiner
    negative_aesthetic: float = 2.5  # the same for what guidance steers away from

    def __post_init__(self) -> None:
        for name, pair, least in (("original", self.original, 1), ("crop", self.crop, 0), ("target", self.target, 1)):
            if pair and (len(pair) != 2 or not all(isinstance(n, Integral) and least <= n <= 2**20 for n in pair)):
                what = f"{name}: {pair!r}; give two whole numbers of pixels from {least}, height before width"
                raise ArgumentError(what, key=name)
        for name, score in (("aesthetic", self.aesthetic), ("negative_aesthetic", self.negative_aesthetic)):
            if not (isinstance(score, Real) and 0 <= score <= 100):
                raise ArgumentError(f"{name}: {score!r}; give a score from 0 to 100", key=name)

    def negative(self) -> Sizes:
        """The same for the condition that guidance steers away from."""
        return replace(self, aesthetic=self.negative_aesthetic)

    def numbers(self, size: tuple[int, int], count: int) -> tuple[float, ...]:
        """SDXL's 6 numbers (original, crop, target) or its refiner's 5 (original, crop, aesthetic), for this size."""
        first = (*(self.original or size), *self.crop)
        if count in (5, 6):
            return (*first, *(self.target or size)) if count == 6 else (*first, self.aesthetic)
        raise ArgumentError(f"this model's conditioning vector has room for {count} sizes; SDXL has 6, its refiner 5")


def size_embedding(sizes: Tensor) -> Tensor:
    """Numbers [b, k] -> [b, 256 k]: each embedded like a timestep, in order (Podell et al. 2023, section 2.2)."""
    return torch.cat([timestep_embedding(column, 256) for column in sizes.unbind(dim=1)], dim=1)


def vector(pooled: Tensor, sizes: Sizes, size: tuple[int, int], dim: int) -> Tensor:
    """SDXL's conditioning vector [b, dim]: the pooled text [b, d], then every number embedded in 256 values.

    Original: generative-models GeneralConditioner with the embedders of sd_xl_base.yaml and sd_xl_refiner.yaml.
    Raises ArgumentError where dim leaves room for neither 6 nor 5 numbers.
    """
    numbers = [sizes.numbers(size, (dim - pooled.shape[1]) // 256)] * len(pooled)
    return torch.cat([pooled, size_embedding(torch.tensor(numbers, device=pooled.device)).to(pooled)], dim=1)
