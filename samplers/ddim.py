"""DDIM and its relatives that forget everything but the last estimate: `ddim ddpm lcm`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from samplers.core import Denoiser, Noise, OnStep, Step, draw, pairs, split, toward


def ddim(
    denoise: Denoiser,
    x: Tensor,
    sigmas: Sequence[float],
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12), written for x = x0 + sigma * noise.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending to sample; ascending to invert: the same function then finds the noise of a picture (eta must be 0)
    eta     0 deterministic, 1 as noisy as DDPM; needs `noise` when positive
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
            x = x + draw(noise, x) * up
    return x


def ddpm(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, on_step: OnStep | None = None
) -> Tensor:
    """DDPM (Ho et al. 2020, eq. 6-7, the smaller of the two variances): draws from q(x_next | x, x0) with x0 as estimated.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending; the last may be 0. Any subset of the trained levels (Nichol & Dhariwal 2021, section 4), not only all of them
    Returns x at noise level sigmas[-1]. Raises ValueError if sigmas rise or `noise` is missing.
    """
    steps = pairs(sigmas)
    for i, (sigma, sigma_next) in enumerate(steps):
        if sigma_next > sigma:
            raise ValueError("ddpm cannot run up in noise: use ddim with eta=0 to invert a picture")
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        keep = (
            sigma_next / sigma
        ) ** 2  # the posterior mean lies between x0 and x, the closer to x the shorter the step
        x = toward(x0, x, keep)
        if sigma_next > 0:
            x = x + draw(noise, x) * (sigma_next * (1 - keep) ** 0.5)
    return x


def lcm(
    denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, on_step: OnStep | None = None
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, alg. 1; Luo et al. 2023, alg. 3): jump to x0, add fresh noise, repeat.

    Only for consistency models (LCM checkpoints and LoRAs), in 1 to 8 steps. Their skip weight c_skip = 0.25 / ((10 t)^2 + 0.25), below
    1e-4 for every timestep above 5, is taken as 0: x0 is the network's own.

    x       [b, c, h, w] float32 at noise level sigmas[0]
    sigmas  descending; the last may be 0
    Returns x at noise level sigmas[-1]. Raises ValueError if sigmas rise or `noise` is missing where it is needed.
    """
    steps = pairs(sigmas)
    for i, (sigma, sigma_next) in enumerate(steps):
        if sigma_next > sigma:
            raise ValueError("lcm cannot run up in noise: use ddim with eta=0 to invert a picture")
        x0 = denoise(x, sigma)
        if on_step:
            on_step(Step(i, len(steps), sigma, x, x0))
        x = x0 + draw(noise, x) * sigma_next if sigma_next > 0 else x0
    return x
