"""The linear multistep method of Adams and Bashforth for the very grid in use."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from samplers.core import Denoiser, Noise, OnStep, Step
from samplers.steps import pairs


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
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, order: int = 4, noise: Noise | None = None, on_step: OnStep | None = None
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
