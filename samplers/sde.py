"""Multistep DPM-Solver++ for the reverse SDE: `dpmpp_2m_sde dpmpp_3m_sde`.

With fresh noise in proportion eta the exact solution over h = lambda_next - lambda, lambda = -log sigma, is, with z = (1 + eta) h,
x_next = exp(-z) x + z * integral of exp(-z (1 - u)) x0(lambda + h u) over u in [0, 1] + sigma_next sqrt(1 - exp(-2 eta h)) * noise
(Lu et al. 2022, "DPM-Solver++", section 5, where eta = 1). The solvers extrapolate x0 in u from earlier steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from samplers.core import Denoiser, Noise, OnStep, Step
from samplers.steps import check_eta, draw, pairs, toward


def dpmpp_2m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", section 5), midpoint form: x0 extrapolated to u = 1/2 from the last two.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending; a last step to 0 is of first order
    eta     rate of fresh noise: 1 the reverse SDE, 0 is `dpmpp_2m`;  s_noise multiplies its deviation
    Returns x at noise level sigmas[-1]. Raises ValueError if sigmas rise while eta > 0, or noise is needed and missing.
    """
    steps = pairs(sigmas)
    last_x0, last_h = None, 0.0
    for i, (sigma, sigma_next) in enumerate(steps):
        check_eta(eta, sigma, sigma_next)
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        if sigma_next == 0:
            return x0
        h = math.log(sigma / sigma_next)
        middle = x0 if last_x0 is None else x0 + (x0 - last_x0) * (h / (2 * last_h))
        x = renewed(x, middle, sigma_next, h, eta, s_noise, noise)
        last_x0, last_h = x0, h
    return x


def dpmpp_3m_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM++ 3M SDE (K. Crowson's stochastic form of DPM-Solver-3, Lu et al. 2022): x0 extrapolated in u from the last three.

    With Newton's x0(u) = x0 + b u + c u^2 the integral is x0 (1 - exp(-z)) + m1 b + m2 c, m_n = z * integral of exp(-z (1 - u)) u^n.
    As published, c enters with m2 / 2: the order is that of two steps, the error constant smaller. Kept, since pictures depend on it.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending; a last step to 0 is of first order
    eta     rate of fresh noise: 1 the reverse SDE, 0 none;  s_noise multiplies its deviation
    Returns x at noise level sigmas[-1]. Raises ValueError if sigmas rise while eta > 0, or noise is needed and missing.
    """
    steps = pairs(sigmas)
    past: list[tuple[Tensor, float]] = []  # (x0, h of the step that left it), newest first
    for i, (sigma, sigma_next) in enumerate(steps):
        check_eta(eta, sigma, sigma_next)
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        if sigma_next == 0:
            return x0
        h = math.log(sigma / sigma_next)
        z = (1 + eta) * h
        first = -math.expm1(-z)
        m1 = 1 - first / z
        total = x0 * first
        if past:
            (x1, h1), *older = past
            rise = (x0 - x1) * (h / h1)  # divided difference of the last two, per unit of u
            b = rise
            if older:
                (x2, h2) = older[0]
                c = (rise - (x1 - x2) * (h / h2)) * (h / (h1 + h2))
                b = rise + c * (h1 / h)
                total = total + c * (0.5 - m1 / z)  # m2 / 2
            total = total + b * m1
        x = renewed(x, total / first, sigma_next, h, eta, s_noise, noise)
        past = [(x0, h), *past[:1]]
    return x


def renewed(x: Tensor, x0: Tensor, sigma_next: float, h: float, eta: float, s_noise: float, noise: Noise | None) -> Tensor:
    """The exact step to sigma_next for a constant x0, with noise at rate eta."""
    x = toward(x0, x, math.exp(-(1 + eta) * h))
    return x + draw(noise, x) * (s_noise * sigma_next * math.sqrt(-math.expm1(-2 * eta * h))) if eta > 0 else x
