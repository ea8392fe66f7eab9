"""Two analytic stand-ins for a network, and the golden runs of samplers on the first."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.models.seeded import GOLDEN, golden, normal
from samplers import GRIDS, SAMPLERS, Denoiser, Guidance, Noise, Schedule, cfg, finish, noised, start

SHAPE = (2, 4, 8, 8)
SCHEDULE = Schedule()


def network(kind: str, x: Tensor, t: float, c: Tensor) -> Tensor:
    """What a perfect network predicts at timestep t of x = a x0 + s noise.

    The data are an equal mixture of N(+1, 0.25) and N(-1, 0.25), tilted by c. `kind` is "eps" or "v". Between integer
    timesteps log(alpha_bar) is linear.
    """
    alpha_bar = math.exp(np.interp(t, np.arange(SCHEDULE.steps), np.log(SCHEDULE.alphas_cumprod)))
    a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    var = a * a * 0.25 + s * s
    m = torch.tanh(a * x / var + c)
    x0 = m + (a * 0.25 / var) * (x - a * m)
    eps = (x - a * x0) / s
    return eps if kind == "eps" else a * eps - s * x0


def denoiser(kind: str, scale: float, timesteps: list[float] | None = None) -> Denoiser:
    """The guided denoiser of the golden runs. `timesteps` gets every timestep of a network call, rounded to float32."""
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
    numbers = count()
    return lambda shape: normal(f"noise{next(numbers)}", shape)


def slope(error: Callable[[int], float], steps: tuple[int, ...]) -> float:
    """Order of convergence: minus the slope of log error over log steps, by least squares."""
    return -float(np.polyfit(np.log(steps), np.log([error(n) for n in steps]), 1)[0])


TIMESTEPS: dict[str, list[float]] = json.loads((GOLDEN / "samplers_timesteps.json").read_text())
STARTS = ("ddim/", "plms/", "dpmpp_2m_stability/", "k/", "img2img/ddim")
RUNS = [key for key in golden("samplers") if key.startswith(STARTS) and "/sigmas/" not in key]


def noised_latent() -> tuple[Tensor, list[float]]:
    """Where the golden run of image to image begins, and the sigmas that are left to it."""
    latent, noise = normal("init_latent", SHAPE), normal("enc_noise", SHAPE)
    return noised(latent, noise, GRIDS["ddim"](SCHEDULE, 50), strength=0.6, original=True)


def run(key: str) -> tuple[Tensor, list[float]]:
    """(result, timesteps of the network calls) of the run that a golden key names."""
    first, *rest = key.split("/")
    scale = float(re.findall(r"cfg([\d.]+)", key)[0])
    options: dict[str, Any] = {}
    name, kind, x_T = first, "eps", normal("x_T", SHAPE)
    if first == "k":
        name, grid = rest[:2]
        sigmas = GRIDS[grid](SCHEDULE, 10)
        x = x_T * sigmas[0]  # k-diffusion leaves out the unit variance of the data
    elif first == "img2img":
        name, (x, sigmas) = "ddim", noised_latent()
    else:
        name, kind = first.removesuffix("_stability"), rest[0]
        sigmas = GRIDS["dpm_solver" if name == "dpmpp_2m" else "ddim"](SCHEDULE, int(rest[1].removeprefix("steps")))
        x = start(x_T, sigmas)
        if name == "ddim":
            options["eta"] = float(rest[3].removeprefix("eta"))
    timesteps: list[float] = []
    x = SAMPLERS[name](denoiser(kind, scale, timesteps), x, sigmas, noise=numbered(), **options)
    return finish(x, sigmas), timesteps
