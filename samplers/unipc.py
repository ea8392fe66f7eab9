"""UniPC: multistep prediction, and a correction that costs no network call."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from samplers.core import Denoiser, Noise, Sigmas, pairs

# on [-1, 1]: exact to rounding for every step between two trained levels
POINTS, WEIGHTS = np.polynomial.legendre.leggauss(24)


def moments(h: float, count: int) -> list[float]:
    """h * integral of exp(-h (1 - u)) u^n over u in [0, 1], for n = 1 ... count."""
    u = (POINTS + 1) / 2
    return [float(h / 2 * np.sum(WEIGHTS * np.exp(-h * (1 - u)) * u**n)) for n in range(1, count + 1)]


def coefficients(r: list[float], h: float) -> list[float]:
    """Weights of x0(r_k) - x0(0), over a step of lambda that runs from u = 0 to u = 1.

    They integrate polynomials in u exactly (Zhao et al. 2023, theorem 3.1: R_p a_p B(h) = phi_p); B(h) cancels, but for
    a single r, where the paper sets a = 1/2 and B is its B_2(h) = exp(h) - 1, for x0 prediction 1 - exp(-h).
    """
    if len(r) <= 1:
        return [-math.expm1(-h) / (2 * node) for node in r]
    matrix = np.array([[node**n for node in r] for n in range(1, len(r) + 1)])
    return [float(w) for w in np.linalg.solve(matrix, moments(h, len(r)))]


def advance(x: Tensor, x0: Tensor, others: list[tuple[float, Tensor]], lam: float, h: float) -> Tensor:
    """x a step of h beyond lambda, from x0 there and x0 at other lambdas: (lambda, x0)."""
    x = x * math.exp(-h) + x0 * -math.expm1(-h)
    for w, (_, other) in zip(coefficients([(at - lam) / h for at, _ in others], h), others, strict=True):
        x = x + (other - x0) * w
    return x


def unipc(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sigmas,
    *,
    order: int = 2,
    lower_order_final: bool = True,
    noise: Noise | None = None,
) -> Tensor:
    """UniPC-p in x0 prediction with B_2 (Zhao et al. 2023, section 3: predictor UniP-p, corrector UniC-p).

    lambda = -log sigma. Every prediction is corrected once the network has been called there for the next step; x0 is
    not computed again at the corrected x.

    order              p, 1 or more: 2 is the authors' choice with guidance, 3 without; the first steps have a lower one
    lower_order_final  the last steps fall back to order 1, as in the authors' code: better in few steps, but then the
                       order is 2 in all; without it, p + 1
    """
    if order < 1:
        raise ValueError(f"order is {order}: give 1, 2 or 3")
    steps = pairs(sigmas)
    past: list[tuple[float, Tensor]] = []  # (lambda, x0), newest first
    base, p = x, 1
    for i, (sigma, sigma_next) in enumerate(steps):
        lam, x0 = -math.log(sigma), denoise(x, sigma)
        if past:
            (last, last_x0), *older = past
            x = advance(base, last_x0, [*older[: p - 1], (lam, x0)], last, lam - last)
        if sigma_next == 0:
            return x0
        past = [(lam, x0), *past[: order - 1]]
        p = min(order, len(past), len(steps) - i if lower_order_final else order)
        base, x = x, advance(x, x0, past[1:p], lam, math.log(sigma / sigma_next))
    return x
