"""The linear multistep method of Adams and Bashforth for the very grid in use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from samplers.core import Denoiser, Noise, OnStep, Step, pairs, toward


def weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Weight of the slope at each node: the integral from start to end of its Lagrange polynomial (Gauss quadrature, exact)."""
    points, w = np.polynomial.legendre.leggauss(len(nodes))
    at = (start + end) / 2 + points * (end - start) / 2
    result = []
    for j, node in enumerate(nodes):
        lagrange = np.prod([(at - other) / (node - other) for k, other in enumerate(nodes) if k != j], axis=0)
        result.append(float(np.sum(w * lagrange) * (end - start) / 2))
    return result


def lms(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    order: int = 4,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Linear multistep: the slopes (x - x0) / sigma of the last `order` steps, interpolated and integrated exactly over sigma.

    Adams-Bashforth for unequal steps (Hairer, Norsett & Wanner, "Solving ODEs I", III.5); the first steps have lower order.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending, or ascending to invert; the last may be 0
    order   1 (Euler) or more; 4 as usual
    Returns x at noise level sigmas[-1], after one network call per step. Raises ValueError for an order below 1.
    """
    if order < 1:
        raise ValueError(f"order is {order}: give 1 (Euler) to 4")
    steps = pairs(sigmas)
    slopes: list[Tensor] = []  # newest first, as are the levels they were taken at
    for i, (sigma, sigma_next) in enumerate(steps):
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        slopes = [(x - x0) / sigma, *slopes[: order - 1]]
        nodes = [steps[i - k][0] for k in range(len(slopes))]
        for w, slope in zip(weights(nodes, sigma, sigma_next), slopes, strict=True):
            x = x + slope * w
    return x


# Adams-Bashforth weights of the newest, second newest, ... slope for equal steps (Liu et al. 2022, eq. 12 and appendix)
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, on_step: OnStep | None = None
) -> Tensor:
    """PLMS, i.e. pseudo linear multistep (Liu et al. 2022, S-PNDM start and eq. 12), on the slope eps = (x - x0) / sigma.

    The first step is a trapezoid with two network calls, the next two are Adams-Bashforth of order 2 and 3, then order 4: one call more
    than steps. The weights are those of equal steps in the timestep, whatever the grid, as published. v models work: eps comes from x0.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending; the last may be 0
    Returns x at noise level sigmas[-1].
    """
    steps = pairs(sigmas)
    slopes: list[Tensor] = []  # newest first
    for i, (sigma, sigma_next) in enumerate(steps):
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        slopes = [(x - x0) / sigma, *slopes[:3]]
        if i == 0 and sigma_next > 0:
            ahead = denoise(toward(x0, x, sigma_next / sigma), sigma_next)
            x = toward(
                x0 + (ahead - x0) * (sigma / (2 * sigma_next)), x, sigma_next / sigma
            )  # Heun's step, as in `heun`
        else:
            for w, slope in zip(ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True):
                x = x + slope * (w * (sigma_next - sigma))
    return x
