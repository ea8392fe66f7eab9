"""Combining the predictions of several conditions into one x0, and keeping what is known of a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from samplers.core import Denoiser


class Combine(Protocol):
    """x0 of each condition -> one x0.

    `needs(sigma)` gives the indices of the conditions that matter at this noise level, so that no network call is
    wasted on the others. Call with x0 of every condition in order, or of just those in needs(sigma).
    """

    def needs(self, sigma: float) -> tuple[int, ...]: ...

    def __call__(self, x0s: Sequence[Tensor], sigma: float) -> Tensor: ...


@dataclass(frozen=True)
class Guidance:
    """What `cfg` returns: a `Combine` of (uncond, cond) that can be looked at."""

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale is {self.scale}: give a finite number, 1 for no guidance")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale is {self.rescale}: give 0 (off) to 1; 0.7 is the authors' choice")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"guidance interval {self.interval} is empty: give (low, high) sigmas with 0 <= low < high"
            )

    def needs(self, sigma: float) -> tuple[int, ...]:
        """Indices into (uncond, cond): both, or the one that alone decides."""
        inside = self.interval is None or self.interval[0] < sigma <= self.interval[1]
        if not inside or self.scale == 1:
            return (1,)
        return (0,) if self.scale == 0 else (0, 1)

    def __call__(self, x0s: Sequence[Tensor], sigma: float) -> Tensor:
        """x0s: [uncond, cond], or only the one in needs(sigma); each [b, c, h, w]."""
        needed = self.needs(sigma)
        if len(x0s) == len(needed) == 1:
            return x0s[0]
        if len(x0s) != 2:
            raise ValueError(
                f"guidance got {len(x0s)} predictions at sigma {sigma:.4g}: it combines two, [uncond, cond]"
            )
        if len(needed) == 1:
            return x0s[needed[0]]
        uncond, cond = x0s
        x0 = uncond + (cond - uncond) * self.scale
        if self.rescale > 0:
            dims = tuple(range(1, x0.ndim))
            ratio = cond.std(dims, keepdim=True) / x0.std(dims, keepdim=True).clamp(min=1e-12)
            x0 = x0 * (self.rescale * ratio + (1 - self.rescale))
        return x0


def cfg(scale: float, rescale: float = 0.0, interval: tuple[float, float] | None = None) -> Guidance:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6, with scale = w + 1): x0 = uncond + scale * (cond - uncond).

    scale     1 uses only cond, 0 only uncond: `needs` says so and one network pass suffices. A negative prompt is just
              another uncond
    rescale   share of the way back to the deviation of cond, image by image (Lin et al. 2023, eq. 15-16), against
              over-exposure. Taken on x0, where the over-exposure is seen; others take it on the network's eps or v
    interval  guide only for low < sigma <= high (Kynkaanniemi et al. 2024); elsewhere cond alone
    Raises ValueError for a scale that is not finite, a rescale outside [0, 1], or an empty interval.
    """
    return Guidance(float(scale), float(rescale), interval)


def keep_known(denoise: Denoiser, known: Tensor, mask: Tensor, noise: Tensor) -> Denoiser:
    """A denoiser that repaints only where the mask is 1: for inpainting with a model that has no mask input.

    The network sees `known`, noised to its level, outside the mask, and x0 is `known` there (as in Lugmayr et al. 2022,
    eq. 8, on x0): a grid that ends at 0 returns `known` outside the mask.

    known  [b, c, h, w] clean latent;  mask [b or 1, 1, h, w] in [0, 1], 1 = repaint;  noise [b, c, h, w], the one that
           x started from
    """

    def kept(x: Tensor, sigma: float) -> Tensor:
        x0 = denoise(x * mask + (known + noise * sigma) * (1 - mask), sigma)
        return x0 * mask + known * (1 - mask)

    return kept
