"""Inputs of a UNet, and how near a fast network comes."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.models.seeded import normal
from ldm.model import LatentDiffusion

STATED = 1e-4  # of the root mean square, in float32: what the README says of the output of a network
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def inputs(model: LatentDiffusion, *, guided: bool = False, size: tuple[int, int] = (8, 8)) -> Inputs:
    """x, t, context and y of two rows: two pictures, or one under two conditions."""
    unet = model.config.unet
    x, t = normal("x", (2, unet.in_channels, *size)), torch.tensor([500.0, 37.0])
    context = normal("context", (2, 5, unet.context_dim))
    y = (
        torch.tensor([20, 350])
        if unet.noise_levels
        else None
        if unet.vector_dim is None
        else normal("y", (2, unet.vector_dim))
    )
    return (x[:1].repeat(2, 1, 1, 1), t[:1].repeat(2), context, y) if guided else (x, t, context, y)
