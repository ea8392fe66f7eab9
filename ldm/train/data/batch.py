"""`Batch`, the examples of one forward pass of training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ldm.conditioning.cond import Sizes


@dataclass(frozen=True)
class Batch:
    """Some examples of one size, on the CPU. A tensor that is not needed, or not known, is None."""

    index: tuple[int, ...]  # the examples' numbers in the run, which their randomness is drawn from
    captions: tuple[str, ...]  # one each, of those that the picture has
    size: tuple[int, int]  # height and width of the pictures, pixels
    sizes: tuple[Sizes, ...]  # SDXL's size conditioning of each
    weight: Tensor  # [b] float32: of each one's loss (DreamBooth's prior pictures may have another than 1)
    image: Tensor | None = None  # [b, 3, H, W] float32 in [-1, 1]; None where latents are cached
    moments: Tensor | None = None  # [b, 2 z, h, w] float32: the VAE's mean and log variance, cached
    context: Tensor | None = None  # [b, n, d] the encoded captions, cached
    pooled: Tensor | None = None  # [b, d] likewise
    depth: Tensor | None = None  # [b, 1, H, W] float32: relative depth from a file beside the picture
