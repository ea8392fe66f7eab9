"""Noise schedules, grids, solvers and guidance: functions of tensors and floats, unaware of networks, text or files.

Every solver is `(denoise, x, sigmas) -> x` (see `core.Sampler`); `SAMPLERS` and `GRIDS` name them all. To add one, put
it into its table: `SAMPLERS["mine"] = f` is known to every task and command at once.
"""

from __future__ import annotations

from typing import Any

from samplers.adams import lms, plms
from samplers.core import Denoiser, Noise, OnStep, Sampler, Sigmas, Step, calls_of, watched
from samplers.ddim import ddim, ddpm, lcm
from samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s_ancestral, dpmpp_3m_sde, dpmpp_sde
from samplers.euler import dpm_2, dpm_2_ancestral, euler, euler_ancestral, heun
from samplers.fitted import AYS_SD1, AYS_SDXL
from samplers.grids import GRIDS, Grid, karras
from samplers.guidance import Combine, Guidance, cfg, keep_known
from samplers.noise import seeded
from samplers.schedule import Schedule, finish, noised, start, tail
from samplers.unipc import unipc

SAMPLERS: dict[str, Sampler] = {
    sampler.__name__: sampler
    for sampler in (
        ddim, ddpm, plms, euler, euler_ancestral, heun, dpm_2, dpm_2_ancestral, lms, dpmpp_2s_ancestral, dpmpp_2m,
        dpmpp_sde, dpmpp_2m_sde, dpmpp_3m_sde, unipc, lcm,
    )
}  # fmt: skip


class _DefaultGrid(dict[str, str]):
    """Sampler -> grid. A sampler without an entry has Karras' levels, the least error at 10 to 30 steps."""

    def __missing__(self, sampler: str) -> str:
        return "karras"


# The grid each sampler is used with unless another is asked for. The originals keep the spacing they were published
# with; a consistency model starts at the noisiest level, which `trailing` has for any count.
ORIGINAL = {"ddim": "ddim", "ddpm": "ddim", "plms": "ddim", "lcm": "trailing"}
DEFAULT_GRID: dict[str, str] = _DefaultGrid(dict.fromkeys(SAMPLERS, "karras") | ORIGINAL)


def calls(name: str, sigmas: Sigmas, **options: Any) -> int:
    """Network calls that SAMPLERS[name] makes on this grid; options are its own keywords. Raises KeyError."""
    return calls_of(SAMPLERS[name], sigmas, **options)


__all__ = [
    "AYS_SD1", "AYS_SDXL", "DEFAULT_GRID", "GRIDS", "SAMPLERS", "Combine", "Denoiser", "Grid", "Guidance", "Noise",
    "OnStep", "Sampler", "Schedule", "Sigmas", "Step", "calls", "cfg", "ddim", "ddpm", "dpm_2", "dpm_2_ancestral",
    "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s_ancestral", "dpmpp_3m_sde", "dpmpp_sde", "euler", "euler_ancestral",
    "finish", "heun", "karras", "keep_known", "lcm", "lms", "noised", "plms", "seeded", "start", "tail", "unipc",
    "watched",
]  # fmt: skip
