"""The noise schedule of training as sigmas, and where a picture enters and leaves it.

sigma = sqrt((1 - alpha_bar) / alpha_bar): x / sqrt(alpha_bar) = x0 + sigma * noise, for which every solver is a formula
in sigma alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The levels that a network was trained at: sqrt(beta) rises linearly from sqrt(start) to sqrt(end) over `steps`.

    zero_snr  rescale to zero terminal signal (Lin et al. 2023, alg. 1), for v models trained so. The last level would
              be infinite; here its signal sqrt(alpha_bar) is 2^-12 and sigma 4096: next to unit noise that is below
              half a unit in the last place of float16, so no network can tell, and every grid and solver stays finite.
              (Or 3/4 of the signal before, if that is less.)
    """

    start: float = 0.00085
    end: float = 0.012
    steps: int = 1000
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.start <= self.end < 1) or self.steps < 1:
            raise ValueError(
                f"betas from {self.start} to {self.end} in {self.steps} steps: need 0 < start <= end < 1 and steps >= 1"
            )

    @cached_property
    def alphas_cumprod(self) -> tuple[float, ...]:
        """alpha_bar of every timestep, falling, multiplied up in float64 as in training."""
        betas = np.linspace(self.start**0.5, self.end**0.5, self.steps, dtype=np.float64) ** 2
        signal = np.sqrt(np.cumprod(1 - betas))
        if self.zero_snr and self.steps > 1:
            signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
            signal[-1] = min(2.0**-12, signal[-2] * 0.75)
        return tuple((signal**2).tolist())

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """Noise level of every timestep, rising."""
        return tuple(math.sqrt((1 - a) / a) for a in self.alphas_cumprod)

    @property
    def sigma_min(self) -> float:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> float:
        return self.sigmas[-1]

    def timestep(self, sigma: float) -> float:
        """The timestep of a noise level: exact at the trained ones, fractional between, the nearest end outside.

        Between two timesteps log(alpha_bar) is linear in t: DPM-Solver's rule, and the one that meets the reference
        runs of both origins. k-diffusion's, log(sigma) linear, differs by up to 3 % of sigma below t = 1, by 1e-5 of it
        above t = 100; only `discrete` needs it.
        Raises ValueError if sigma is negative or not a number.
        """
        if not sigma >= 0:
            raise ValueError(f"sigma is {sigma}: a noise level is 0 or more")
        i = bisect_right(self.sigmas, sigma) - 1
        if i < 0:
            return 0.0
        if i >= self.steps - 1:
            return float(self.steps - 1)
        low, high, log = (math.log1p(s * s) for s in (self.sigmas[i], self.sigmas[i + 1], sigma))  # -log(alpha_bar)
        return i + (log - low) / (high - low)

    def sigma(self, t: float) -> float:
        """The noise level of a timestep in [0, steps - 1], fractional ones included. Raises ValueError outside."""
        if not 0 <= t <= self.steps - 1:
            raise ValueError(f"timestep {t} is outside the trained ones: give 0 to {self.steps - 1}")
        i = min(int(t), self.steps - 1)
        if t == i:
            return self.sigmas[i]
        low, high = (math.log1p(s * s) for s in self.sigmas[i : i + 2])  # -log(alpha_bar)
        return math.sqrt(math.expm1(low + (t - i) * (high - low)))


def checked(schedule: Schedule, steps: int) -> int:
    """`steps`, if it can be honoured."""
    if isinstance(steps, bool) or not hasattr(steps, "__index__") or steps < 1:
        raise ValueError(f"steps is {steps!r}: give a whole number from 1 to {schedule.steps}")
    if steps > schedule.steps:
        raise ValueError(
            f"{steps} steps: give at most {schedule.steps} (the model has {schedule.steps} training steps)"
        )
    return int(steps)


def at(schedule: Schedule, timesteps: Sequence[float]) -> list[float]:
    """The sigmas of descending timesteps, then 0."""
    return [schedule.sigma(float(t)) for t in timesteps] + [0.0]


def start(noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Pure noise [b, c, h, w] as x at level sigmas[0]: scaled to the variance 1 + sigma^2 of a noised unit latent."""
    return noise * math.sqrt(1 + sigmas[0] ** 2)


def finish(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The latent of x at noise level sigmas[-1]: x / sqrt(1 + sigma^2), x itself for a grid that ends at 0.

    The original DDIM, PLMS and DPM-Solver grids end at 0.0292, and the noise that is left is shrunk, not removed.
    """
    return x / math.sqrt(1 + sigmas[-1] ** 2)


def tail(sigmas: Sequence[float], strength: float, name: str = "strength") -> list[float]:
    """The last int(steps * strength) steps of a grid: what img2img denoises. strength in (0, 1], 1 is all of it.

    Raises ValueError for a strength outside (0, 1], or too small for a single step; the message names the least that is
    not, and calls it `name`.
    """
    steps = len(sigmas) - 1
    if not 0 < strength <= 1:
        raise ValueError(f"{name}: {strength}; give more than 0 and at most 1")
    kept = int(steps * strength)
    if kept == 0:
        least = math.ceil(10000 / steps) / 10000
        raise ValueError(f"{name}: {strength} leaves none of {steps} steps: give at least {least:g}, or more steps")
    return list(sigmas[steps - kept :])


def noised(
    x0: Tensor, noise: Tensor, sigmas: Sequence[float], *, strength: float = 1.0, original: bool = False
) -> tuple[Tensor, list[float]]:
    """(x, sigmas) to begin img2img with: the clean latent x0, noised to the first level of `tail`, and that tail.

    original  as the first published scripts: noise of the level before the tail's first, one step noisier than what is
              then denoised, rescaled to the variance that the first level expects. At strength 1 no such level exists
              and the tail loses a step instead (the later scripts' clamp).
    x0, noise [b, c, h, w]. Raises ValueError as `tail` does.
    """
    part = tail(sigmas, strength)
    if not original:
        return x0 + noise * part[0], part
    if len(part) == len(sigmas):
        part = part[1:]
        if len(part) < 2:
            raise ValueError(
                "one step at strength 1 has no noisier level to take the original's noise from: use original=False"
            )
    before = sigmas[len(sigmas) - len(part) - 1]
    return (x0 + noise * before) * math.sqrt((1 + part[0] ** 2) / (1 + before**2)), part
