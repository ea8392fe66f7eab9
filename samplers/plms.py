"""PLMS, the linear multistep sampler that Stable Diffusion was published with."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from samplers.core import Denoiser, Noise, OnStep, Step
from samplers.steps import pairs, toward

# Adams-Bashforth weights of the newest, second newest, ... slope for equal steps (Liu et al. 2022, eq. 12 and appendix)
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(denoise: Denoiser, x: Tensor, sigmas: Sequence[float], *, noise: Noise | None = None, on_step: OnStep | None = None) -> Tensor:
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
            x = toward(x0 + (ahead - x0) * (sigma / (2 * sigma_next)), x, sigma_next / sigma)  # Heun's step, as in `heun`
        else:
            for w, slope in zip(ADAMS_BASHFORTH[len(slopes) - 1], slopes, strict=True):
                x = x + slope * (w * (sigma_next - sigma))
    return x
