"""Two analytic stand-ins for a network: the mixture behind the golden sampler runs, and its exact denoiser in sigma."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from samplers import Denoiser, Guidance, Noise, Schedule, cfg
from tests.made.seeded import normal

SHAPE = (2, 4, 8, 8)
SCHEDULE = Schedule()


def network(kind: str, x: Tensor, t: float, c: Tensor) -> Tensor:
    """What a perfect network says at timestep t of x = a x0 + s noise: data are an equal mixture of N(+1, 0.25) and N(-1, 0.25), tilted by c.

    kind is "eps" or "v". Between integer timesteps log(alpha_bar) is linear.
    """
    alpha_bar = math.exp(np.interp(t, np.arange(SCHEDULE.steps), np.log(SCHEDULE.alphas_cumprod)))
    a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    var = a * a * 0.25 + s * s
    m = torch.tanh(a * x / var + c)
    x0 = m + (a * 0.25 / var) * (x - a * m)
    eps = (x - a * x0) / s
    return eps if kind == "eps" else a * eps - s * x0


def denoiser(kind: str, scale: float, timesteps: list[float] | None = None) -> Denoiser:
    """The guided denoiser of the golden runs. Every timestep the network is asked for, rounded to float32, is appended to `timesteps`."""
    conditions = (0.5 * normal("uncond", SHAPE), 0.5 * normal("cond", SHAPE))
    guidance: Guidance = cfg(scale)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        t = float(np.float32(SCHEDULE.timestep(sigma)))
        if timesteps is not None:
            timesteps.append(t)
        norm = math.sqrt(1 + sigma * sigma)

        def x0(c: Tensor) -> Tensor:
            out = network(kind, x / norm, t, c)
            return x - out * sigma if kind == "eps" else x / (norm * norm) - out * (sigma / norm)

        return guidance([x0(conditions[i]) for i in guidance.needs(sigma)], sigma)

    return denoise


def exact(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x] for x = x0 + sigma * noise and the same mixture without conditioning: smooth, in any dtype."""
    var = 0.25 + sigma * sigma
    m = torch.tanh(x / var)
    return m + (0.25 / var) * (x - m)


def numbered() -> Noise:
    """The step noise of the golden runs: normal("noise0"), normal("noise1"), ... in the order drawn."""
    count = 0

    def noise(shape: tuple[int, ...]) -> Tensor:
        nonlocal count
        count += 1
        return normal(f"noise{count - 1}", shape)

    return noise


def slope(error: Callable[[int], float], steps: tuple[int, ...]) -> float:
    """Order of convergence: minus the slope of log error over log steps, by least squares."""
    return -float(np.polyfit(np.log(steps), np.log([error(n) for n in steps]), 1)[0])
