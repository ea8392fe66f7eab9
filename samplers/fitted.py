"""Time grids that were fitted to what networks do: the quantiles of a beta distribution, and Align Your Steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from samplers.schedule import Schedule, at, checked


def beta(schedule: Schedule, steps: int, *, alpha: float = 0.6, beta: float = 0.6) -> list[float]:
    """Timesteps at the quantiles of Beta(alpha, beta), dense at both ends (Lee et al. 2024), then 0.

    Others round the timesteps; here they stay fractional, so that no two coincide however many the steps.
    """
    p = 1 - np.linspace(0, 1, checked(schedule, steps), endpoint=False)
    return at(schedule, (beta_quantile(p, alpha, beta) * (schedule.steps - 1)).tolist())


def beta_quantile(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """x with I_x(a, b) = p, by bisection of the incomplete beta function (DLMF 8.17.7, and 8.17.4 above one half)."""
    n = np.arange(64)
    norm = math.gamma(a + b) / (math.gamma(a) * math.gamma(b))

    def below_half(x: np.ndarray, a: float, b: float) -> np.ndarray:
        """I_x(a, b) for x <= 1/2: the series in x converges like 2^-n."""
        terms = np.cumprod(np.concatenate([[1.0], (n[1:] - b) / n[1:]])) / (a + n)
        return norm * x**a * np.sum(terms * x[:, None] ** n, axis=1)

    def cdf(x: np.ndarray) -> np.ndarray:
        return np.where(x <= 0.5, below_half(np.minimum(x, 0.5), a, b), 1 - below_half(np.minimum(1 - x, 0.5), b, a))

    p = np.atleast_1d(np.asarray(p, dtype=np.float64))
    low, high = np.zeros_like(p), np.ones_like(p)
    for _ in range(60):
        middle = (low + high) / 2
        under = cdf(middle) < p
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return np.where(p >= 1, 1.0, np.where(p <= 0, 0.0, (low + high) / 2))


AYS_SD1 = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
AYS_SDXL = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)


def ays(schedule: Schedule, steps: int, *, timesteps: Sequence[int] = AYS_SD1) -> list[float]:
    """Align Your Steps (Sabour et al. 2024): ten optimised timesteps, log sigma interpolated for other counts, then 0.

    timesteps  AYS_SD1 (SD 1 and 2) or AYS_SDXL, of 1000; the scale ends at sigma_min, where 0 takes its place
    """
    steps = checked(schedule, steps)
    levels = [schedule.sigma(t * (schedule.steps - 1) / 999) for t in timesteps] + [schedule.sigma_min]
    logs = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(levels)), np.log(levels))
    return [*np.exp(logs[:-1]).tolist(), 0.0]


def ays_sdxl(schedule: Schedule, steps: int) -> list[float]:
    """`ays` with the timesteps of SDXL."""
    return ays(schedule, steps, timesteps=AYS_SDXL)
