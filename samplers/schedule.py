"""The noise schedule of training as sigmas, time grids as descending lists of sigmas, and where a picture enters and leaves them.

sigma = sqrt((1 - alpha_bar) / alpha_bar): x / sqrt(alpha_bar) = x0 + sigma * noise, for which every solver is a formula in sigma alone.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """The levels that a network was trained at. sqrt(beta) rises linearly from sqrt(start) to sqrt(end) over `steps` timesteps from 0.

    zero_snr  rescale to zero terminal signal (Lin et al. 2023, alg. 1), for v models trained so. The last level would be infinite; here
              its signal sqrt(alpha_bar) is 2^-12 and sigma 4096: next to unit noise that is below half a unit in the last place of
              float16, so no network can tell, and every grid and solver stays finite. (Or 3/4 of the signal before, if that is less.)
    """

    start: float = 0.00085
    end: float = 0.012
    steps: int = 1000
    zero_snr: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.start <= self.end < 1) or self.steps < 1:
            raise ValueError(f"betas from {self.start} to {self.end} in {self.steps} steps: need 0 < start <= end < 1 and steps >= 1")

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
        """The timestep of a noise level, fractional between the trained ones, exact at them, the nearest end outside them.

        Between two timesteps log(alpha_bar) is linear in t: DPM-Solver's rule, and the one that meets the reference runs of both origins.
        k-diffusion's, log(sigma) linear, differs by up to 3 % of sigma below t = 1, by 1e-5 of it above t = 100; only `discrete` needs it.
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


Grid = Callable[..., list[float]]  # (schedule, steps) -> descending sigmas, one more than steps; some take keywords


def checked(schedule: Schedule, steps: int) -> int:
    """`steps`, if it can be honoured."""
    if isinstance(steps, bool) or not hasattr(steps, "__index__") or steps < 1:
        raise ValueError(f"steps is {steps!r}: give a whole number from 1 to {schedule.steps}")
    if steps > schedule.steps:
        raise ValueError(f"{steps} steps: give at most {schedule.steps} (the model has {schedule.steps} training steps)")
    return int(steps)


def at(schedule: Schedule, timesteps: Sequence[float]) -> list[float]:
    """The sigmas of descending timesteps, then 0."""
    return [schedule.sigma(float(t)) for t in timesteps] + [0.0]


def ddim(schedule: Schedule, steps: int) -> list[float]:
    """The original DDIM spacing with exactly the steps asked for: t = i * (T // steps) + 1, then sigma of t = 0, not 0.

    Where steps divides T these are the original's own; diffusers calls it "leading", offset 1. It leaves out the noisiest levels, the more
    the fewer the steps (1 step starts at t = 1), and of more than T / 2 steps it has only t = steps ... 1. steps = T has no room for the
    offset: t = T - 1 ... 0, then 0.
    """
    steps, last = checked(schedule, steps), schedule.steps
    if steps == last:
        return at(schedule, range(last - 1, -1, -1))
    return [schedule.sigmas[i * (last // steps) + 1] for i in reversed(range(steps))] + [schedule.sigma_min]


def ddim_original(schedule: Schedule, steps: int) -> list[float]:
    """The original DDIM spacing with the original's own count: t = range(0, T, T // steps) + 1 (31 steps for 30), then sigma of t = 0.

    Raises ValueError, naming counts that work, where the original runs off the end of its table (t = T: 3, 9, 27, 36, ... steps).
    """
    steps, last = checked(schedule, steps), schedule.steps

    def timesteps(count: int) -> range:
        return range(1, last + 1, last // count)

    if timesteps(steps)[-1] >= last:
        good = [n for n in range(1, last + 1) if timesteps(n)[-1] < last]
        near = [str(n) for n in (max((n for n in good if n < steps), default=None), min((n for n in good if n > steps), default=None)) if n]
        raise ValueError(
            f"ddim_original has no {steps} steps, its first timestep would be {last}: use {' or '.join(near)}, or the grid ddim"
        )
    return [schedule.sigmas[t] for t in reversed(timesteps(steps))] + [schedule.sigma_min]


def dpm_solver(schedule: Schedule, steps: int) -> list[float]:
    """The original DPM-Solver spacing (Lu et al. 2022): times even from 1 to 1 / T, timestep (time - 1 / T) * T, ending at t = 0.

    Times are rounded to float32 at every step, as the original's, so that the timesteps agree with it to the last bit.
    """
    last = schedule.steps
    times = torch.linspace(1, 1 / last, checked(schedule, steps) + 1, dtype=torch.float32)
    return [schedule.sigma(min(max(t, 0.0), last - 1.0)) for t in ((times - 1 / last) * last).tolist()]


def discrete(schedule: Schedule, steps: int) -> list[float]:
    """k-diffusion's grid: timesteps even from the last to 0, log sigma linear between the trained ones, then sigma 0."""
    t = np.linspace(schedule.steps - 1, 0, checked(schedule, steps))
    return [*np.exp(np.interp(t, np.arange(schedule.steps), np.log(schedule.sigmas))).tolist(), 0.0]


def linspace(schedule: Schedule, steps: int) -> list[float]:
    """Timesteps even from the last to 0, rounded to those trained (Lin et al. 2023, table 2, "linspace"), then sigma 0."""
    return at(schedule, np.linspace(schedule.steps - 1, 0, checked(schedule, steps)).round().tolist())


def trailing(schedule: Schedule, steps: int) -> list[float]:
    """Timesteps round(T - i * T / steps) - 1 (Lin et al. 2023, table 2, "trailing"), then sigma 0. Suits few steps and zero_snr."""
    steps, last = checked(schedule, steps), schedule.steps
    return at(schedule, [round(last - i * last / steps) - 1 for i in range(steps)])


def sgm_uniform(schedule: Schedule, steps: int) -> list[float]:
    """SDXL's own grid (generative-models): the floor of timesteps even from the last down to, not including, 0; then sigma 0."""
    return at(schedule, np.floor(np.linspace(schedule.steps - 1, 0, checked(schedule, steps), endpoint=False)).tolist())


def simple(schedule: Schedule, steps: int) -> list[float]:
    """ComfyUI's "simple": every (T / steps)-th trained level from the top, T - 1 - floor(i * T / steps); then sigma 0."""
    steps, last = checked(schedule, steps), schedule.steps
    return at(schedule, [last - 1 - i * last // steps for i in range(steps)])


def karras(schedule: Schedule, steps: int, *, rho: float = 7.0) -> list[float]:
    """sigma^(1 / rho) even from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0, 1, checked(schedule, steps))
    high, low = schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho)
    return [*((high + ramp * (low - high)) ** rho).tolist(), 0.0]


def polyexponential(schedule: Schedule, steps: int, *, rho: float = 1.0) -> list[float]:
    """log sigma a power of an even ramp: rho 1 is `exponential`, above 1 spends more steps at low noise, below 1 at high; then 0."""
    ramp = np.linspace(1, 0, checked(schedule, steps)) ** rho
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    return [*np.exp(low + ramp * (high - low)).tolist(), 0.0]


def exponential(schedule: Schedule, steps: int) -> list[float]:
    """log sigma even from sigma_max to sigma_min, then 0: the time that DPM-Solver calls logSNR."""
    return polyexponential(schedule, steps, rho=1.0)


def beta(schedule: Schedule, steps: int, *, alpha: float = 0.6, beta: float = 0.6) -> list[float]:
    """Timesteps at the quantiles of Beta(alpha, beta), dense at both ends (Lee et al. 2024), then 0.

    Others round the timesteps; here they stay fractional, so that no two coincide however many the steps.
    """
    p = 1 - np.linspace(0, 1, checked(schedule, steps), endpoint=False)
    return at(schedule, (beta_quantile(p, alpha, beta) * (schedule.steps - 1)).tolist())


def beta_quantile(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """x with I_x(a, b) = p, by bisection of the regularised incomplete beta function (DLMF 8.17.7, and 8.17.4 above one half)."""
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


GRIDS: dict[str, Grid] = {
    grid.__name__: grid
    for grid in (
        ddim, ddim_original, dpm_solver, discrete, trailing, linspace, karras, exponential, polyexponential, sgm_uniform, simple, beta,
        ays, ays_sdxl,
    )
}  # fmt: skip


def start(noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Pure noise [b, c, h, w] as x at noise level sigmas[0], scaled to the variance 1 + sigma^2 of a noised unit-variance latent."""
    return noise * math.sqrt(1 + sigmas[0] ** 2)


def finish(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The latent of x at noise level sigmas[-1]: x / sqrt(1 + sigma^2), x itself for a grid that ends at 0. The original DDIM, PLMS and
    DPM-Solver grids end at 0.0292, and what little noise is left is shrunk rather than removed, as they do."""
    return x / math.sqrt(1 + sigmas[-1] ** 2)


def tail(sigmas: Sequence[float], strength: float) -> list[float]:
    """The last int(steps * strength) steps of a grid: what img2img denoises. strength in (0, 1], 1 is all of it.

    Raises ValueError for a strength outside (0, 1], or too small for a single step; the message names the least that is not.
    """
    steps = len(sigmas) - 1
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}: give more than 0 and at most 1")
    kept = int(steps * strength)
    if kept == 0:
        least = math.ceil(10000 / steps) / 10000
        raise ValueError(f"strength {strength} leaves none of {steps} steps: give at least {least:g}, or more steps")
    return list(sigmas[steps - kept :])


def noised(
    x0: Tensor, noise: Tensor, sigmas: Sequence[float], *, strength: float = 1.0, original: bool = False
) -> tuple[Tensor, list[float]]:
    """(x, sigmas) to begin img2img with: the clean latent x0 noised to the first level of `tail(sigmas, strength)`, and that tail.

    original  as the first published scripts: noise of the level before the tail's first, one step noisier than what is then denoised,
              rescaled to the variance that the first level expects. At strength 1 no such level exists and the tail loses a step instead
              (the later scripts' clamp).
    x0, noise [b, c, h, w]. Raises ValueError as `tail` does.
    """
    part = tail(sigmas, strength)
    if not original:
        return x0 + noise * part[0], part
    if len(part) == len(sigmas):
        part = part[1:]
        if len(part) < 2:
            raise ValueError("one step at strength 1 has no noisier level to take the original's noise from: use original=False")
    before = sigmas[len(sigmas) - len(part) - 1]
    return (x0 + noise * before) * math.sqrt((1 + part[0] ** 2) / (1 + before**2)), part
