"""The types that samplers, grids and guidance speak: `Denoiser`, `Noise`, `Step`, `OnStep`, `Sampler`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from torch import Tensor


def pairs(sigmas: Sequence[float]) -> list[tuple[float, float]]:
    """(sigma, next sigma) of every step.

    Raises ValueError unless the sigmas are finite and strictly monotone, and positive but for the last of a descending grid:
    at sigma 0 nothing is left to tell the noise from the picture, so no step can start there.
    """
    sigmas = [float(sigma) for sigma in sigmas]
    if len(sigmas) < 2:
        raise ValueError(
            f"a grid of {len(sigmas)} sigmas has no step: give at least two, the level of x and the level wanted"
        )
    steps = list(pairwise(sigmas))
    if not all(math.isfinite(sigma) for sigma in sigmas) or min(sigmas[:-1]) <= 0 or sigmas[-1] < 0:
        raise ValueError(
            "every sigma must be finite and positive, except that the last may be 0: drop the 0 that begins a reversed grid"
        )
    if not (all(a > b for a, b in steps) or all(a < b for a, b in steps)):
        raise ValueError(
            "sigmas must fall (sampling) or rise (inversion) at every step: remove repeated or unordered values"
        )
    return steps


def toward(x0: Tensor, x: Tensor, ratio: float) -> Tensor:
    """The exact step from sigma to ratio * sigma for a constant x0, which is also Euler's. As precise at sigma 4096 as at 1."""
    return x * ratio + x0 * (1 - ratio)


def check_eta(eta: float, sigma: float, sigma_next: float) -> None:
    """Raises ValueError if eta is negative, or positive while sigmas rise."""
    if not eta >= 0:
        raise ValueError(f"eta is {eta}: it must be 0 (deterministic) or positive (1: as noisy as DDPM)")
    if eta > 0 and sigma_next > sigma:
        raise ValueError(
            f"sigmas rise from {sigma:.4g} to {sigma_next:.4g} with eta {eta}: inversion adds no noise, set eta=0"
        )


def split(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(down, up): step deterministically to `down`, add noise of deviation `up`, and be at sigma_next: down^2 + up^2 = sigma_next^2.

    up = eta times the deviation of q(x_next | x, x0) (Ho et al. 2020, eq. 7; Song et al. 2021, eq. 16), which for
    x = x0 + sigma * noise is sigma_next * sqrt(1 - (sigma_next / sigma)^2). Raises ValueError as `check_eta`.
    """
    check_eta(eta, sigma, sigma_next)
    if eta == 0:
        return sigma_next, 0.0
    up = min(sigma_next, eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt(sigma_next**2 - up**2), up


def draw(noise: Noise | None, x: Tensor) -> Tensor:
    """Standard normal numbers like x. Raises ValueError where a sampler that needs noise was given none."""
    if noise is None:
        raise ValueError(
            "this sampler adds noise and was given none: pass noise=samplers.seeded([seed, ...]), or eta=0 where it has an eta"
        )
    return noise(x.shape)


Denoiser = Callable[
    [Tensor, float], Tensor
]  # (x at noise level sigma, sigma) -> estimate of x0, where x = x0 + sigma * noise
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
