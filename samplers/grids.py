"""Time grids as descending lists of sigmas, and `GRIDS`, which names them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from samplers.fitted import ays, ays_sdxl, beta
from samplers.schedule import Schedule, at, checked

Grid = Callable[..., list[float]]  # (schedule, steps) -> descending sigmas, one more than steps; some take keywords


def ddim(schedule: Schedule, steps: int) -> list[float]:
    """The original DDIM spacing with exactly the steps asked for: t = i * (T // steps) + 1, then sigma of t = 0, not 0.

    Where steps divides T these are the original's own; diffusers calls it "leading", offset 1. It leaves out the
    noisiest levels, the more the fewer the steps (1 step starts at t = 1), and of more than T / 2 steps it has only
    t = steps ... 1. steps = T has no room for the offset: t = T - 1 ... 0, then 0.
    """
    steps, last = checked(schedule, steps), schedule.steps
    if steps == last:
        return at(schedule, range(last - 1, -1, -1))
    return [schedule.sigmas[i * (last // steps) + 1] for i in reversed(range(steps))] + [schedule.sigma_min]


def ddim_original(schedule: Schedule, steps: int) -> list[float]:
    """The original DDIM spacing with its own count: t = range(0, T, T // steps) + 1, then sigma of t = 0.

    30 steps become 31. Raises ValueError, naming counts that work, where the original runs off the end of its table
    (t = T: 3, 9, 27, 36, ... steps).
    """
    steps, last = checked(schedule, steps), schedule.steps

    def timesteps(count: int) -> range:
        return range(1, last + 1, last // count)

    if timesteps(steps)[-1] >= last:
        good = [n for n in range(1, last + 1) if timesteps(n)[-1] < last]
        near = [n for n in good if n < steps][-1:] + [n for n in good if n > steps][:1]
        raise ValueError(
            f"ddim_original has no {steps} steps, its first timestep would be {last}: "
            f"use {' or '.join(map(str, near))}, or the grid ddim"
        )
    return [schedule.sigmas[t] for t in reversed(timesteps(steps))] + [schedule.sigma_min]


def dpm_solver(schedule: Schedule, steps: int) -> list[float]:
    """The original DPM-Solver spacing (Lu et al. 2022): times even from 1 to 1 / T, down to timestep 0.

    The timestep of a time is (time - 1 / T) * T. Times are rounded to float32 at every step, as the original's, so that
    the timesteps agree with it to the last bit.
    """
    last = schedule.steps
    times = torch.linspace(1, 1 / last, checked(schedule, steps) + 1, dtype=torch.float32)
    return [schedule.sigma(min(max(t, 0.0), last - 1.0)) for t in ((times - 1 / last) * last).tolist()]


def discrete(schedule: Schedule, steps: int) -> list[float]:
    """k-diffusion's grid: timesteps even from the last to 0, log sigma linear between trained ones, then sigma 0."""
    t = np.linspace(schedule.steps - 1, 0, checked(schedule, steps))
    return [*np.exp(np.interp(t, np.arange(schedule.steps), np.log(schedule.sigmas))).tolist(), 0.0]


def linspace(schedule: Schedule, steps: int) -> list[float]:
    """Timesteps even from the last to 0, rounded to trained ones (Lin et al. 2023, table 2, "linspace"), then 0."""
    return at(schedule, np.linspace(schedule.steps - 1, 0, checked(schedule, steps)).round().tolist())


def trailing(schedule: Schedule, steps: int) -> list[float]:
    """Timesteps round(T - i * T / steps) - 1 (Lin et al. 2023, "trailing"), then 0. Suits few steps and zero_snr."""
    steps, last = checked(schedule, steps), schedule.steps
    return at(schedule, [round(last - i * last / steps) - 1 for i in range(steps)])


def sgm_uniform(schedule: Schedule, steps: int) -> list[float]:
    """SDXL's own grid (generative-models): the floor of timesteps even from the last to 0, without 0; then sigma 0."""
    timesteps = np.linspace(schedule.steps - 1, 0, checked(schedule, steps), endpoint=False)
    return at(schedule, np.floor(timesteps).tolist())


def simple(schedule: Schedule, steps: int) -> list[float]:
    """ComfyUI's "simple": every (T / steps)-th trained level from the top, T - 1 - floor(i * T / steps); then 0."""
    steps, last = checked(schedule, steps), schedule.steps
    return at(schedule, [last - 1 - i * last // steps for i in range(steps)])


def karras(schedule: Schedule, steps: int, *, rho: float = 7.0) -> list[float]:
    """sigma^(1 / rho) even from sigma_max to sigma_min, then 0 (Karras et al. 2022, eq. 5)."""
    ramp = np.linspace(0, 1, checked(schedule, steps))
    high, low = schedule.sigma_max ** (1 / rho), schedule.sigma_min ** (1 / rho)
    return [*((high + ramp * (low - high)) ** rho).tolist(), 0.0]


def polyexponential(schedule: Schedule, steps: int, *, rho: float = 1.0) -> list[float]:
    """log sigma a power of an even ramp, then 0: rho 1 is `exponential`, more spends more steps at low noise."""
    ramp = np.linspace(1, 0, checked(schedule, steps)) ** rho
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    return [*np.exp(low + ramp * (high - low)).tolist(), 0.0]


def exponential(schedule: Schedule, steps: int) -> list[float]:
    """log sigma even from sigma_max to sigma_min, then 0: the time that DPM-Solver calls logSNR."""
    return polyexponential(schedule, steps, rho=1.0)


GRIDS: dict[str, Grid] = {
    grid.__name__: grid
    for grid in (
        ddim, ddim_original, dpm_solver, discrete, trailing, linspace, karras, exponential, polyexponential,
        sgm_uniform, simple, beta, ays, ays_sdxl,
    )
}  # fmt: skip
