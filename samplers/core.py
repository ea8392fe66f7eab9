"""The types that samplers, grids and guidance speak: `Denoiser`, `Noise`, `Step`, `OnStep`, `Sampler`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]  # (x at noise level sigma, sigma) -> estimate of x0, where x = x0 + sigma * noise
Noise = Callable[[Sequence[int]], Tensor]  # shape [b, ...] -> N(0, 1) float32; image k drawn from generator k


@dataclass(frozen=True)
class Step:
    """What a sampler reports before each update: step `index` of `total`, at noise level `sigma`, sees `x` and estimates `x0`."""

    index: int
    total: int
    sigma: float
    x: Tensor
    x0: Tensor


OnStep = Callable[[Step], None]  # told of every step before x changes: progress, previews; what it returns is ignored


class Sampler(Protocol):
    """Carries x from noise level sigmas[0] to sigmas[-1]. A sampler may add keywords of its own (eta, order, ...)."""

    def __call__(
        self,
        denoise: Denoiser,
        x: Tensor,
        sigmas: Sequence[float],
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor: ...
