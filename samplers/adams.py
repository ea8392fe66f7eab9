"""Adams-Bashforth methods, which extrapolate the slopes eps = (x - x0) / sigma of the last steps: `lms plms`.

dx / dsigma = eps, so x_next = x + the integral of eps over the step. In the place of eps, the polynomial through the
last slopes is integrated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from samplers.core import Denoiser, Noise, Sigmas, pairs, toward

# Weights of the newest, second newest, ... slope for equal steps (Liu et al. 2022, eq. 12 and appendix)
EQUAL_STEPS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Weight of the slope at each node: the integral of its Lagrange polynomial from start to end (exact, by Gauss)."""
    points, w = np.polynomial.legendre.leggauss(len(nodes))
    at = (start + end) / 2 + points * (end - start) / 2
    result = []
    for j, node in enumerate(nodes):
        lagrange = np.prod([(at - other) / (node - other) for k, other in enumerate(nodes) if k != j], axis=0)
        result.append(float(np.sum(w * lagrange) * (end - start) / 2))
    return result


def lms(denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, order: int = 4, noise: Noise | None = None) -> Tensor:
    """Linear multistep: Adams-Bashforth for unequal steps, in sigma (Hairer, Norsett & Wanner 1993, III.5).

    order  of the method, 1 (Euler) or more; the first steps have a lower one. Raises ValueError below 1
    """
    if order < 1:
        raise ValueError(f"order is {order}: give 1 (Euler) to 4")
    past: list[tuple[float, Tensor]] = []  # (sigma, slope), newest first
    for sigma, sigma_next in pairs(sigmas):
        past = [(sigma, (x - denoise(x, sigma)) / sigma), *past[: order - 1]]
        nodes, slopes = zip(*past, strict=True)
        for w, slope in zip(weights(nodes, sigma, sigma_next), slopes, strict=True):
            x = x + slope * w
    return x


def plms(denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, noise: Noise | None = None) -> Tensor:
    """PLMS, i.e. pseudo linear multistep (Liu et al. 2022, S-PNDM start and eq. 12).

    The first step is Heun's with two network calls, the next two are Adams-Bashforth of order 2 and 3, then order 4:
    one call more than steps. The weights are those of equal steps in the timestep, whatever the grid, as published.
    v models work: eps comes from x0.
    """
    slopes: list[Tensor] = []  # newest first
    for sigma, sigma_next in pairs(sigmas):
        x0 = denoise(x, sigma)
        slopes = [(x - x0) / sigma, *slopes[:3]]
        if len(slopes) == 1 and sigma_next > 0:
            end = denoise(toward(x0, x, sigma_next / sigma), sigma_next)
            x = toward(x0 + (end - x0) * (sigma / (2 * sigma_next)), x, sigma_next / sigma)
        else:
            for w, slope in zip(EQUAL_STEPS[len(slopes) - 1], slopes, strict=True):
                x = x + slope * (w * (sigma_next - sigma))
    return x
