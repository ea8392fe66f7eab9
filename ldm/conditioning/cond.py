"""`Cond`, what the UNet is told besides x and t, and the numbers that SDXL is told of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
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

        def join(values: list[Tensor | None], name: str) -> Tensor | None:
            if all(v is None for v in values):
                return None
            if any(v is None for v in values):
                raise ArgumentError(f"conditions of one batch must all have {name}, or none")
            return torch.cat(values)

        return Cond(**{field.name: join([getattr(c, field.name) for c in conds], field.name) for field in fields(Cond)})


@dataclass(frozen=True)
class Sizes:
    """What SDXL and its refiner are told of a picture besides text (Podell et al. 2023, section 2.2 and 2.5). Pixels, heights before widths."""

    original: tuple[int, int] | None = (
        None  # of the picture before it was scaled; small ones were blurred. None: the size that is made
    )
    crop: tuple[int, int] = (0, 0)  # top and left of what was cut out; 0, 0 keeps things in the middle
    target: tuple[int, int] | None = None  # what it was cut to. None: the size that is made
    aesthetic: float = 6.0  # score of its beauty, for the refiner
    negative_aesthetic: float = 2.5  # the same for what guidance steers away from

    def __post_init__(self) -> None:
        for name, pair, least in (("original", self.original, 1), ("crop", self.crop, 0), ("target", self.target, 1)):
            if pair is not None and (
                len(pair) != 2 or not all(isinstance(n, Integral) and least <= n <= 2**20 for n in pair)
            ):
                raise ArgumentError(
                    f"{name}: {pair!r}; give two whole numbers of pixels from {least}, height before width", key=name
                )
        for name, score in (("aesthetic", self.aesthetic), ("negative_aesthetic", self.negative_aesthetic)):
            if not (isinstance(score, Real) and 0 <= score <= 100):
                raise ArgumentError(f"{name}: {score!r}; give a score from 0 to 100", key=name)

    def negative(self) -> Sizes:
        """The same for the condition that guidance steers away from."""
        return replace(self, aesthetic=self.negative_aesthetic)

    def numbers(self, size: tuple[int, int], count: int) -> tuple[float, ...]:
        """The 6 numbers of SDXL (original, crop, target) or the 5 of its refiner (original, crop, aesthetic), for a picture of `size`."""
        first = (*(self.original or size), *self.crop)
        if count == 6:
            return (*first, *(self.target or size))
        if count == 5:
            return (*first, self.aesthetic)
        raise ArgumentError(f"this model's conditioning vector has room for {count} sizes; SDXL has 6, its refiner 5")


def size_embedding(sizes: Tensor) -> Tensor:
    """Numbers [b, k] -> [b, 256 k]: each embedded like a timestep, in order (SDXL: heights before widths; Podell et al. 2023, section 2.2)."""
    return torch.cat([timestep_embedding(column, 256) for column in sizes.unbind(dim=1)], dim=1)


def vector(pooled: Tensor, sizes: Sizes, size: tuple[int, int], dim: int) -> Tensor:
    """SDXL's conditioning vector [b, dim]: the pooled text [b, d], then every number embedded in 256 values.

    Original: generative-models GeneralConditioner with the embedders of sd_xl_base.yaml and sd_xl_refiner.yaml.
    Raises ArgumentError where dim leaves room for neither 6 nor 5 numbers.
    """
    numbers = sizes.numbers(size, (dim - pooled.shape[1]) // 256)
    return torch.cat(
        [pooled, size_embedding(torch.tensor([numbers] * len(pooled), device=pooled.device)).to(pooled)], dim=1
    )
