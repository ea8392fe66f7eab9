"""How pictures are sampled and prompts are read: options checked when made."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ldm.conditioning import Sizes
from ldm.errors import ArgumentError
from ldm.prompts import Embedding
from samplers import DEFAULT_GRID, GRIDS, SAMPLERS, Guidance, Schedule, cfg, tail

MAX_CFG = 100.0


@dataclass(frozen=True)
class Sampling:
    """The keywords that every task takes besides its own. Raises ArgumentError."""

    sampler: str = "dpmpp_2m"  # a name in samplers.SAMPLERS
    grid: str | None = None  # a name in samplers.GRIDS; None: the sampler's own, as in samplers.DEFAULT_GRID; trailing where the model has zero terminal SNR
    steps: int = 25  # of the grid, 1 to 1000; more are slower and closer to what the model has learnt
    cfg: float = 7.5  # guidance scale: 1 ignores the negative prompt at half the cost, more follows the prompt more closely
    rescale: float = 0.0  # guidance rescale, 0 to 1: takes back the contrast that guidance adds
    interval: tuple[float, float] | None = None  # (low, high) sigmas between which there is guidance; None: everywhere
    eta: float | None = None  # share of fresh noise, for samplers that have one; None: the sampler's own
    clip_skip: int = 1  # text layer read, counted from the one the model was trained with
    weighting: bool = False  # (words:1.3) in a prompt weigh more, [words] less; off: they are read as they stand
    truncate: bool = False  # a prompt too long for the text tower is cut; off: it is read in pieces
    embeddings: tuple[Embedding, ...] = ()  # words of a textual inversion's own
    sizes: Sizes | None = None  # what SDXL is told of the picture's past; None: that it has always had this size
    tile: int | None = None  # side in pixels of the tiles in which the VAE works; 0: never in tiles; None: above 1024 x 1024

    def __post_init__(self) -> None:
        require_known("sampler", self.sampler, SAMPLERS)
        if self.grid is not None:
            require_known("grid", self.grid, GRIDS)
        require_whole("steps", self.steps, 1, 1000, " (the model has 1000 training steps)")
        require_number("cfg", self.cfg, -MAX_CFG, MAX_CFG)
        require_number("rescale", self.rescale, 0, 1)
        require_whole("clip_skip", self.clip_skip, 1, 100)
        if self.interval is not None:
            _require_interval(self.interval)
        if self.tile is not None:
            require_whole("tile", self.tile, 0, 2**14)
        if self.eta is not None:
            require_number("eta", self.eta, 0, MAX_CFG)
            if not _takes_eta(self.sampler):
                raise ArgumentError(f"eta: sampler {self.sampler} has none; leave it out, or use {', '.join(filter(_takes_eta, SAMPLERS))}", key="eta")
        self.sigmas(Schedule())  # some counts of steps do not suit every grid

    def grid_name(self, schedule: Schedule) -> str:
        """The grid in use: the one that was named or, with zero terminal SNR, trailing (Lin et al. 2023, section 3.3), or else the sampler's own.

        DDIM's leaves out the last level, where nothing is seen of the picture yet; Karras' spends two fifths of its steps on the last hundredth of the timesteps.
        """
        return self.grid or ("trailing" if schedule.zero_snr else DEFAULT_GRID[self.sampler])

    @property
    def guidance(self) -> Guidance:
        """What combines [uncond, cond]."""
        return cfg(self.cfg, self.rescale, self.interval)

    def sigmas(self, schedule: Schedule) -> list[float]:
        """The noise levels to visit, descending."""
        try:
            return GRIDS[self.grid_name(schedule)](schedule, self.steps)
        except ValueError as error:
            raise ArgumentError(f"steps: {error}", key="steps") from None


# --- checks ---------------------------------------------------------------------------------------------------------


def require_seed(seed: Any) -> int:
    """The seed, if it is one. Raises ArgumentError."""
    return require_whole("seed", seed, 0, 2**64 - 1)


def require_strength(strength: Any, options: Sampling) -> None:
    """Raises ArgumentError for a strength outside [0, 1], or above 0 but too small for a single step; the message names the least that is not."""
    require_number("strength", strength, 0, 1)
    if strength > 0:
        try:
            tail(options.sigmas(Schedule()), strength)
        except ValueError as error:
            raise ArgumentError(f"strength: {str(error).removeprefix('strength ')}", key="strength") from None


def require_known(name: str, value: Any, known: Collection[str]) -> None:
    """Raises ArgumentError, with the nearest match, for a value that is not among those known."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        raise ArgumentError(f"{name}: {str(value)[:30]!r} is unknown{f'; {near[0]}?' if near else '.'} All: {' '.join(known)}", key=name)


def require_whole(name: str, value: Any, low: int, high: int, why: str = "") -> int:
    """The number, if it is a whole one from `low` to `high`. Raises ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ArgumentError(f"{name}: {value!r}; give a whole number from {low} to {high}", key=name)
    if value > high:
        raise ArgumentError(f"{name}: {value}; give at most {high}{why}", key=name)
    return int(value)


def require_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises ArgumentError for what is no finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and low <= value <= high):
        raise ArgumentError(f"{name}: {value!r}; give a number from {low:g} to {high:g}", key=name)


def _require_interval(interval: Any) -> None:
    levels = tuple(interval) if isinstance(interval, Sequence) else ()
    if len(levels) != 2 or not all(isinstance(level, Real) for level in levels) or not 0 <= levels[0] < levels[1]:
        raise ArgumentError(f"interval: {interval!r}; give two sigmas, 0 <= low < high", key="interval")


def _takes_eta(sampler: str) -> bool:
    return "eta" in inspect.signature(SAMPLERS[sampler]).parameters
