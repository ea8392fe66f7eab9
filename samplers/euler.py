"""Runge-Kutta solvers of order 1 and 2: `euler euler_ancestral heun dpm_2 dpm_2_ancestral`, on dx / dsigma = (x - x0) / sigma.

A step with any slope is Euler's step toward x - sigma * slope. With slopes taken at Euler's own points, x cancels from that target: it is
x0 plus a multiple of how x0 changed. Written so, nothing of the size of sigma is subtracted from its like, however noisy x is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from samplers.core import Denoiser, Noise, OnStep, Step, draw, pairs, split, toward


def euler(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, on_step: OnStep | None = None
) -> Tensor:
    """Euler's method on the probability flow (Karras et al. 2022, eq. 1 and 3; alg. 1 without its correction).

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending, or ascending to invert; the last may be 0
    Returns x at noise level sigmas[-1]. The same as DDIM with eta 0.
    """
    steps = pairs(sigmas)
    for i, (sigma, sigma_next) in enumerate(steps):
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        x = toward(x0, x, sigma_next / sigma)
    return x


def euler_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler down to the level that fresh noise brings back up to the next one (the ancestral step of Ho et al. 2020, eq. 7, in sigma).

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending; the last may be 0
    eta     share of the noise that is fresh: 1 as in DDPM, 0 is `euler`;  s_noise multiplies its deviation
    Returns x at noise level sigmas[-1]. Raises ValueError if sigmas rise while eta > 0, or noise is needed and missing.
    """
    steps = pairs(sigmas)
    for i, (sigma, sigma_next) in enumerate(steps):
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        down, up = split(sigma, sigma_next, eta)
        x = toward(x0, x, down / sigma)
        if up > 0:
            x = x + draw(noise, x) * (s_noise * up)
    return x


def heun(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, on_step: OnStep | None = None
) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, alg. 1): the mean of the slopes at both ends of the step.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending, or ascending to invert; a last step to 0 is Euler's, since there is no slope at 0
    Returns x at noise level sigmas[-1], after two network calls per step (one for a step to 0).
    """
    steps = pairs(sigmas)
    for i, (sigma, sigma_next) in enumerate(steps):
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        if sigma_next > 0:
            end = denoise(toward(x0, x, sigma_next / sigma), sigma_next)
            x0 = x0 + (end - x0) * (sigma / (2 * sigma_next))
        x = toward(x0, x, sigma_next / sigma)
    return x


def dpm_2(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, on_step: OnStep | None = None
) -> Tensor:
    """The midpoint method with its midpoint in log sigma, the time of DPM-Solver-2 (Lu et al. 2022, alg. 1, r = 1/2).

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending, or ascending to invert; a last step to 0 is Euler's
    Returns x at noise level sigmas[-1], after two network calls per step (one for a step to 0).
    """
    return dpm_2_ancestral(denoise, x, sigmas, eta=0.0, on_step=on_step)


def dpm_2_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """`dpm_2` down to the level that fresh noise brings back up to the next one.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending; a last step to 0 is Euler's
    eta     share of the noise that is fresh: 1 as in DDPM, 0 is `dpm_2`;  s_noise multiplies its deviation
    Returns x at noise level sigmas[-1], after two network calls per step (one for a step to 0).
    Raises ValueError if sigmas rise while eta > 0, or noise is needed and missing.
    """
    steps = pairs(sigmas)
    for i, (sigma, sigma_next) in enumerate(steps):
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        down, up = split(sigma, sigma_next, eta)
        if down > 0:
            middle = math.sqrt(sigma * down)
            halfway = denoise(toward(x0, x, middle / sigma), middle)
            x0 = x0 + (halfway - x0) * (sigma / middle)
        x = toward(x0, x, down / sigma)
        if up > 0:
            x = x + draw(noise, x) * (s_noise * up)
    return x
