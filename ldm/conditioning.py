"""Prompts and sizes to `Cond`, what the UNet is told besides x and t."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ldm.errors import ArgumentError
from ldm.unet import timestep_embedding


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


def size_embedding(sizes: Tensor) -> Tensor:
    """Numbers [b, k] -> [b, 256 k]: each embedded like a timestep, in order (SDXL: heights before widths; Podell et al. 2023, section 2.2)."""
    return torch.cat([timestep_embedding(column, 256) for column in sizes.unbind(dim=1)], dim=1)
