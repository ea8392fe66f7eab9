"""DPM-Solver++: exponential integration of x0 in lambda = -log sigma. `dpmpp_2m dpmpp_2s_ancestral dpmpp_sde`.

With x = x0 + sigma * noise the exact solution over h = lambda_next - lambda is
x_next = exp(-h) x + integral of exp(tau - h) x0(lambda + tau) over tau in [0, h]  (Lu et al. 2022, "DPM-Solver++", eq. 8 with alpha = 1),
and exp(-h) = sigma_next / sigma: holding x0 constant is DDIM, and the solvers here put a better constant in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from samplers.core import Denoiser, Noise, OnStep, Step, check_eta, draw, pairs, split, toward


def dpmpp_2m(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    lower_order_final: bool = True,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", alg. 2): x0 extrapolated along lambda to the middle of the step from the last two.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending; a last step to 0 is of first order
    lower_order_final  below 15 steps the last step is of first order even if it ends above 0: steadier, as the authors' code does
    Returns x at noise level sigmas[-1].
    """
    steps = pairs(sigmas)
    last_x0, last_h = None, 0.0
    for i, (sigma, sigma_next) in enumerate(steps):
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        final = i == len(steps) - 1
        first_order = last_x0 is None or sigma_next == 0 or (final and lower_order_final and len(steps) < 15)
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        middle = x0 if first_order else x0 + (x0 - last_x0) * (h / (2 * last_h))
        x = toward(middle, x, sigma_next / sigma)
        last_x0, last_h = x0, h
    return x


def dpmpp_2s_ancestral(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022, "DPM-Solver++", alg. 1, r = 1/2) down to the level that fresh noise brings back up to the next one.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending; a last step to 0 is of first order
    eta     share of the noise that is fresh: 1 as in DDPM, 0 plain DPM-Solver++(2S);  s_noise multiplies its deviation
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
            middle = math.sqrt(sigma * down)  # halfway in lambda
            x0 = denoise(toward(x0, x, middle / sigma), middle)
        x = toward(x0, x, down / sigma)
        if up > 0:
            x = x + draw(noise, x) * (s_noise * up)
    return x


def dpmpp_sde(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM++ SDE: DPM-Solver++(2S) whose midpoint is reached with noise too (K. Crowson's stochastic form of Lu et al. 2022, alg. 1, r = 1/2).

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending; a last step to 0 is of first order
    eta     share of the noise that is fresh: 1 as in DDPM, 0 plain DPM-Solver++(2S);  s_noise multiplies its deviation
    Two network calls and two draws per step, the first for the midpoint (one call and no draw for a step to 0). The draws are independent,
    as in other implementations without a Brownian tree: of first order in distribution when eta is 1, of second when it is 0.
    Returns x at noise level sigmas[-1]. Raises ValueError if sigmas rise while eta > 0, or noise is needed and missing.
    """
    steps = pairs(sigmas)
    for i, (sigma, sigma_next) in enumerate(steps):
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)  # halfway in lambda
            down, up = split(sigma, middle, eta)
            halfway = toward(x0, x, down / sigma)
            if up > 0:
                halfway = halfway + draw(noise, x) * (s_noise * up)
            x0 = denoise(halfway, middle)
        down, up = split(sigma, sigma_next, eta)
        x = toward(x0, x, down / sigma)
        if up > 0:
            x = x + draw(noise, x) * (s_noise * up)
    return x


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


def renewed(
    x: Tensor, x0: Tensor, sigma_next: float, h: float, eta: float, s_noise: float, noise: Noise | None
) -> Tensor:
    """The exact step to sigma_next for a constant x0, with noise at rate eta."""
    x = toward(x0, x, math.exp(-(1 + eta) * h))
    return x + draw(noise, x) * (s_noise * sigma_next * math.sqrt(-math.expm1(-2 * eta * h))) if eta > 0 else x
