"""What solvers speak and share: their types, a grid pair by pair, the step, the draw, and how calls are watched."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

Sigmas = Sequence[float]  # noise levels, one more than steps
Denoiser = Callable[[Tensor, float], Tensor]  # (x at level sigma, sigma) -> estimate of x0; x = x0 + sigma * noise
Noise = Callable[[Sequence[int]], Tensor]  # shape [b, ...] -> N(0, 1) float32; image k drawn from generator k


class Sampler(Protocol):
    """Carries x from noise level sigmas[0] to sigmas[-1]. A sampler may add keywords of its own (eta, order, ...).

    x       [b, c, h, w] float32 at noise level sigmas[0]; it is not changed
    sigmas  falling; the last may be 0, and a step to 0 has order 1, since there is no slope at 0. Rising sigmas invert
            a picture, that is, find the noise that it comes from; samplers that add noise refuse them
    noise   where samplers that add noise draw it from; the others need none
    eta     keyword of some: how much of the noise is fresh, 0 none, 1 as in DDPM
    s_noise keyword of some: multiplies the deviation of the fresh noise
    Returns x at noise level sigmas[-1]. Raises ValueError for sigmas that `pairs` refuses, sigmas that rise where noise
    would be added, noise that is needed and missing, and a negative eta.

    The sigmas alone decide how often it calls `denoise`: to know that beforehand, it is run on x [1, 1, 1, 1].
    """

    def __call__(self, denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, noise: Noise | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """A network call, `index` (from 0) of `total`: at noise level `sigma` the network saw `x` and estimated `x0`."""

    index: int
    total: int
    sigma: float
    x: Tensor
    x0: Tensor
    steps: int  # that the solver takes in these calls


OnStep = Callable[[Step], None]  # progress, previews; what it returns is ignored


def watched(denoise: Denoiser, on_step: OnStep, total: int, steps: int | None = None) -> Denoiser:
    """The same denoiser, which reports every network call to `on_step` before its result is used.

    total  how many calls there will be, as `samplers.calls` counts them
    steps  how many steps the solver takes; None: one for each call
    """
    indices = count()

    def watching(x: Tensor, sigma: float) -> Tensor:
        x0 = denoise(x, sigma)
        on_step(Step(next(indices), total, sigma, x, x0, total if steps is None else steps))
        return x0

    return watching


def calls_of(sampler: Sampler, sigmas: Sigmas, **options: Any) -> int:
    """Network calls that a sampler makes on this grid, counted by running it on a single number.

    options  its own keywords, such as eta. Raises what the sampler raises
    """
    seen: list[Step] = []
    denoise = watched(lambda x, sigma: x * 0, seen.append, 0)
    sampler(denoise, torch.zeros(1, 1, 1, 1), sigmas, noise=lambda shape: torch.zeros(*shape), **options)
    return len(seen)


def pairs(sigmas: Sigmas) -> list[tuple[float, float]]:
    """(sigma, next sigma) of every step.

    Raises ValueError unless the sigmas are finite and strictly monotone, and positive but for the last of a descending
    grid: at sigma 0 nothing is left to tell the noise from the picture, so no step can start there.
    """
    sigmas = [float(sigma) for sigma in sigmas]
    if len(sigmas) < 2:
        raise ValueError(
            f"a grid of {len(sigmas)} sigmas has no step: give at least two, the level of x and the level wanted"
        )
    steps = list(pairwise(sigmas))
    if not all(math.isfinite(sigma) for sigma in sigmas) or min(sigmas[:-1]) <= 0 or sigmas[-1] < 0:
        raise ValueError(
            "every sigma must be finite and positive, except that the last may be 0: "
            "drop the 0 that begins a reversed grid"
        )
    if not (all(a > b for a, b in steps) or all(a < b for a, b in steps)):
        raise ValueError(
            "sigmas must fall (sampling) or rise (inversion) at every step: remove repeated or unordered values"
        )
    return steps


def falling(sigmas: Sigmas, sampler: str) -> list[tuple[float, float]]:
    """`pairs` for a sampler that always adds noise. Raises ValueError if they rise."""
    steps = pairs(sigmas)
    if sigmas[0] < sigmas[-1]:
        raise ValueError(f"{sampler} cannot run up in noise: use ddim with eta=0 to invert a picture")
    return steps


def toward(x0: Tensor, x: Tensor, ratio: float) -> Tensor:
    """The exact step from sigma to ratio * sigma for a constant x0, and Euler's. As precise at sigma 4096 as at 1."""
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
    """(down, up): step deterministically to `down`, add noise of deviation `up`, and be at sigma_next.

    up = eta times the deviation of q(x_next | x, x0) (Ho et al. 2020, eq. 7; Song et al. 2021, eq. 16), which for
    x = x0 + sigma * noise is sigma_next * sqrt(1 - (sigma_next / sigma)^2); down^2 + up^2 = sigma_next^2.
    Raises ValueError as `check_eta`.
    """
    check_eta(eta, sigma, sigma_next)
    if eta == 0:
        return sigma_next, 0.0
    up = min(sigma_next, eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt(sigma_next**2 - up**2), up


def noisier(x: Tensor, deviation: float, noise: Noise | None) -> Tensor:
    """x with fresh noise of this deviation; x itself where that is 0. Raises ValueError for noise that is missing."""
    if deviation == 0:
        return x
    if noise is None:
        raise ValueError(
            "this sampler adds noise and was given none: "
            "pass noise=samplers.seeded([seed, ...]), or eta=0 where it has an eta"
        )
    return x + noise(x.shape) * deviation
