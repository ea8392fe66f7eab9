"""Runge-Kutta solvers of order 1 and 2 on dx / dsigma = (x - x0) / sigma.

A step with any slope is Euler's step toward x - sigma * slope. With slopes taken at Euler's own points, x cancels from
that target: it is x0 plus a multiple of how x0 changed. Written so, nothing of the size of sigma is subtracted from its
like, however noisy x is.
"""

from __future__ import annotations

import math

from torch import Tensor

from samplers.core import Denoiser, Noise, Sigmas, noisier, pairs, split, toward


def euler(denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, noise: Noise | None = None) -> Tensor:
    """Euler's method on the probability flow (Karras et al. 2022, eq. 1 and 3): the same as DDIM with eta 0."""
    for sigma, sigma_next in pairs(sigmas):
        x = toward(denoise(x, sigma), x, sigma_next / sigma)
    return x


def euler_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Tensor:
    """Euler down to the level that fresh noise brings back up to the next one (Ho et al. 2020, eq. 7, in sigma)."""
    for sigma, sigma_next in pairs(sigmas):
        x0 = denoise(x, sigma)
        down, up = split(sigma, sigma_next, eta)
        x = noisier(toward(x0, x, down / sigma), s_noise * up, noise)
    return x


def heun(denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, noise: Noise | None = None) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, alg. 1): the mean of the slopes at both ends of the step."""
    for sigma, sigma_next in pairs(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next > 0:
            end = denoise(toward(x0, x, sigma_next / sigma), sigma_next)
            x0 = x0 + (end - x0) * (sigma / (2 * sigma_next))
        x = toward(x0, x, sigma_next / sigma)
    return x


def dpm_2(denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, noise: Noise | None = None) -> Tensor:
    """The midpoint method with its midpoint in log sigma, the time of DPM-Solver-2 (Lu et al. 2022, alg. 1, r 1/2)."""
    return dpm_2_ancestral(denoise, x, sigmas, eta=0.0)


def dpm_2_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Tensor:
    """`dpm_2` down to the level that fresh noise brings back up to the next one."""
    for sigma, sigma_next in pairs(sigmas):
        x0 = denoise(x, sigma)
        down, up = split(sigma, sigma_next, eta)
        if down > 0:
            middle = math.sqrt(sigma * down)
            halfway = denoise(toward(x0, x, middle / sigma), middle)
            x0 = x0 + (halfway - x0) * (sigma / middle)
        x = noisier(toward(x0, x, down / sigma), s_noise * up, noise)
    return x
