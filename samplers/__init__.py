"""Noise schedules, grids, solvers and guidance: functions of tensors and floats, which know nothing of networks, text or files.

Every solver is `(denoise, x, sigmas) -> x` (see `core.Sampler`); `SAMPLERS` and `GRIDS` name them all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from samplers.adams import lms, plms
from samplers.core import Denoiser, Noise, OnStep, Sampler, Step
from samplers.ddim import ddim, ddpm, lcm
from samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from samplers.euler import dpm_2, dpm_2_ancestral, euler, euler_ancestral, heun
from samplers.grids import AYS_SD1, AYS_SDXL, GRIDS, Grid, karras
from samplers.guidance import Combine, Guidance, cfg, keep_known
from samplers.noise import seeded
from samplers.schedule import Schedule, finish, noised, start, tail
from samplers.unipc import unipc

SAMPLERS: dict[str, Sampler] = {
    sampler.__name__: sampler
    for sampler in (
        ddim, ddpm, plms, euler, euler_ancestral, heun, dpm_2, dpm_2_ancestral, lms, dpmpp_2s_ancestral, dpmpp_2m, dpmpp_sde, dpmpp_2m_sde,
        dpmpp_3m_sde, unipc, lcm,
    )
}  # fmt: skip

# The grid each sampler is used with unless another is asked for. The originals keep the spacing they were published with; a consistency
# model starts at the noisiest level, which `trailing` has for any count; the k-diffusion family has Karras' levels, the least error at 10 to 30 steps.
DEFAULT_GRID: dict[str, str] = dict.fromkeys(SAMPLERS, "karras") | {
    "ddim": "ddim",
    "ddpm": "ddim",
    "plms": "ddim",
    "lcm": "trailing",
}


def calls(name: str, sigmas: Sequence[float]) -> int:
    """Network calls that SAMPLERS[name] makes on this grid, counted by running it on a single number. Raises KeyError for an unknown name."""
    count = 0

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        nonlocal count
        count += 1
        return x * 0

    SAMPLERS[name](denoise, torch.zeros(1, 1, 1, 1), sigmas, noise=lambda shape: torch.zeros(tuple(shape)))
    return count


__all__ = [
    "AYS_SD1", "AYS_SDXL", "DEFAULT_GRID", "GRIDS", "SAMPLERS", "Combine", "Denoiser", "Grid", "Guidance", "Noise", "OnStep", "Sampler", "Schedule",
    "Step", "calls", "cfg", "ddim", "ddpm", "dpm_2", "dpm_2_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s_ancestral", "dpmpp_3m_sde", "dpmpp_sde",
    "euler", "euler_ancestral", "finish", "heun", "karras", "keep_known", "lcm", "lms", "noised", "plms", "seeded", "start", "tail", "unipc",
]  # fmt: skip
