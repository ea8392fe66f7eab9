"""DPM-Solver++ and its stochastic forms: exponential integration of x0 in lambda = -log sigma.

With x = x0 + sigma * noise the exact solution over h = lambda_next - lambda is
x_next = exp(-h) x + integral of exp(tau - h) x0(lambda + tau) over tau in [0, h]
(Lu et al. 2022, "DPM-Solver++", eq. 8 with alpha = 1), and exp(-h) = sigma_next / sigma: holding x0 constant is DDIM,
and the solvers here put a better constant in its place. The reverse SDE with noise at rate eta has (1 + eta) h in the
place of h, and adds noise of variance sigma_next^2 (1 - exp(-2 eta h)).
"""

from __future__ import annotations

import math

from torch import Tensor

from samplers.core import Denoiser, Noise, Sigmas, check_eta, noisier, pairs, split, toward


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, lower_order_final: bool = True, noise: Noise | None = None
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", alg. 2): x0 in the middle of the step, extrapolated from two.

    lower_order_final  below 15 steps the last one has order 1 even if it ends above 0: steadier, as in the authors'
                       code
    """
    steps = pairs(sigmas)
    last: tuple[Tensor, float] | None = None  # x0 and h of the step before
    for i, (sigma, sigma_next) in enumerate(steps):
        x0 = middle = denoise(x, sigma)
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        first_order = sigma_next == 0 or (lower_order_final and i == len(steps) - 1 and len(steps) < 15)
        if last and not first_order:
            middle = x0 + (x0 - last[0]) * (h / (2 * last[1]))
        x = toward(middle, x, sigma_next / sigma)
        last = x0, h
    return x


def dpmpp_2s_ancestral(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022, "DPM-Solver++", alg. 1, r = 1/2) with the ancestral step of `euler_ancestral`.

    Two network calls a step. With eta 0 it is plain DPM-Solver++(2S).
    """
    for sigma, sigma_next in pairs(sigmas):
        x0 = denoise(x, sigma)
        down, up = split(sigma, sigma_next, eta)
        if down > 0:
            middle = math.sqrt(sigma * down)  # halfway in lambda
            x0 = denoise(toward(x0, x, middle / sigma), middle)
        x = noisier(toward(x0, x, down / sigma), s_noise * up, noise)
    return x


def dpmpp_sde(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Tensor:
    """DPM++ SDE (K. Crowson's stochastic DPM-Solver++(2S)): the midpoint is reached with noise, too.

    Two network calls and two draws a step, the first for the midpoint. The draws are independent, as in other
    implementations without a Brownian tree: of first order in distribution when eta is 1, of second when it is 0.
    """
    for sigma, sigma_next in pairs(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)  # halfway in lambda
            down, up = split(sigma, middle, eta)
            x0 = denoise(noisier(toward(x0, x, down / sigma), s_noise * up, noise), middle)
        down, up = split(sigma, sigma_next, eta)
        x = noisier(toward(x0, x, down / sigma), s_noise * up, noise)
    return x


def dpmpp_2m_sde(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", section 5), midpoint form; with eta 0 it is `dpmpp_2m`."""
    last: tuple[Tensor, float] | None = None  # x0 and h of the step before
    for sigma, sigma_next in pairs(sigmas):
        check_eta(eta, sigma, sigma_next)
        x0 = middle = denoise(x, sigma)
        if sigma_next == 0:
            return x0
        h = math.log(sigma / sigma_next)
        if last:
            middle = x0 + (x0 - last[0]) * (h / (2 * last[1]))
        x = renewed(x, middle, sigma_next, h, eta, s_noise, noise)
        last = x0, h
    return x


def dpmpp_3m_sde(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, eta: float = 1.0, s_noise: float = 1.0, noise: Noise | None = None
) -> Tensor:
    """DPM++ 3M SDE (K. Crowson's stochastic DPM-Solver-3): x0 extrapolated from the last three.

    Over the step u runs from 0 to 1. With Newton's x0(u) = x0 + b u + c u^2 and z = (1 + eta) h the integral is
    x0 (1 - exp(-z)) + m1 b + m2 c, m_n = z * integral of exp(-z (1 - u)) u^n. As published, c enters with m2 / 2: the
    order is that of two steps, the error constant smaller. Kept, since pictures depend on it.
    """
    past: list[tuple[Tensor, float]] = []  # (x0, h of the step that left it), newest first
    for sigma, sigma_next in pairs(sigmas):
        check_eta(eta, sigma, sigma_next)
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            return x0
        h = math.log(sigma / sigma_next)
        z = (1 + eta) * h
        first = -math.expm1(-z)
        m1 = 1 - first / z
        total = x0 * first
        if past:
            (x1, h1), *older = past
            b = rise = (x0 - x1) * (h / h1)  # divided difference of the last two, per unit of u
            if older:
                [(x2, h2)] = older
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
    return noisier(x, s_noise * sigma_next * math.sqrt(-math.expm1(-2 * eta * h)), noise)
