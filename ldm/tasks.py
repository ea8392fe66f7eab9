"""Text, and pictures where a task starts from one, to pictures: `txt2img img2img`."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm.denoiser import guided
from ldm.errors import ArgumentError, NonFinite
from ldm.images import fit, from_pil, size_for, to_pil, to_rgb
from ldm.model import LatentDiffusion
from samplers import DEFAULT_GRID, GRIDS, SAMPLERS, Guidance, Schedule, cfg, finish, noised, seeded, start, tail
from samplers.core import Denoiser, Noise, OnStep, Step

MAX_CFG = 100.0


@dataclass(frozen=True)
class Sampling:
    """How pictures are sampled, checked when made: the keywords that every task takes besides its own. Raises ArgumentError."""

    sampler: str = "dpmpp_2m"  # a name in samplers.SAMPLERS
    grid: str | None = None  # a name in samplers.GRIDS; None: the sampler's own, as in samplers.DEFAULT_GRID
    steps: int = 25  # of the grid, 1 to 1000; more are slower and closer to what the model has learnt
    cfg: float = 7.5  # guidance scale: 1 ignores the negative prompt at half the cost, more follows the prompt more closely
    rescale: float = 0.0  # guidance rescale, 0 to 1: takes back the contrast that guidance adds
    interval: tuple[float, float] | None = None  # (low, high) sigmas between which there is guidance; None: everywhere
    eta: float | None = None  # share of fresh noise, for samplers that have one; None: the sampler's own
    clip_skip: int = 1  # text layer read, counted from the one the model was trained with

    def __post_init__(self) -> None:
        require_known("sampler", self.sampler, SAMPLERS)
        if self.grid is not None:
            require_known("grid", self.grid, GRIDS)
        _require_whole("steps", self.steps, 1, 1000, " (the model has 1000 training steps)")
        _require_number("cfg", self.cfg, -MAX_CFG, MAX_CFG)
        _require_number("rescale", self.rescale, 0, 1)
        _require_whole("clip_skip", self.clip_skip, 1, 100)
        if self.interval is not None:
            _require_interval(self.interval)
        if self.eta is not None:
            _require_number("eta", self.eta, 0, MAX_CFG)
            if not _takes_eta(self.sampler):
                raise ArgumentError(f"eta: sampler {self.sampler} has none; leave it out, or use {', '.join(filter(_takes_eta, SAMPLERS))}", key="eta")
        self.sigmas(Schedule())  # some counts of steps do not suit every grid

    @property
    def grid_name(self) -> str:
        """The grid in use."""
        return self.grid or DEFAULT_GRID[self.sampler]

    @property
    def guidance(self) -> Guidance:
        """What combines [uncond, cond]."""
        return cfg(self.cfg, self.rescale, self.interval)

    def sigmas(self, schedule: Schedule) -> list[float]:
        """The noise levels to visit, descending."""
        try:
            return GRIDS[self.grid_name](schedule, self.steps)
        except ValueError as error:
            raise ArgumentError(f"steps: {error}", key="steps") from None

    def solve(self, denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise, on_step: OnStep | None = None) -> Tensor:
        """Run the sampler. Raises NonFinite, naming the step, as soon as a value is NaN or infinite."""

        def checked(step: Step) -> None:
            if not torch.isfinite(step.x0).all():
                raise NonFinite(f"step {step.index + 1} of {step.total} (sigma {step.sigma:.4g}): NaN or infinity; use float32 or bfloat16, or check the weights")
            if on_step:
                on_step(step)

        keywords = {} if self.eta is None else {"eta": self.eta}
        return SAMPLERS[self.sampler](denoise, x, sigmas, noise=noise, on_step=checked, **keywords)


@torch.no_grad()
def txt2img(
    model: LatentDiffusion,
    prompts: str | Sequence[str],
    *,
    seeds: Sequence[int],
    negative: str = "",
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    on_step: OnStep | None = None,
    **sampling: Any,
) -> list[Image.Image]:
    """Pictures of what prompts say (Rombach et al. 2022, section 3; Ho & Salimans 2022 for the guidance).

    prompts        one for each picture, or one for all
    seeds          one for each picture, 0 to 2^64 - 1, of which torch uses the low 32 bits; a picture does not depend on its batch
    negative       what to steer away from
    height, width  pixels, multiples of 8; the model's own size if not given
    batch          pictures made at once: all, if not given
    sampling       fields of `Sampling`: sampler, grid, steps, cfg, rescale, interval, eta, clip_skip
    Raises ArgumentError, and NonFinite rather than give a black picture.
    """
    options = _sampling(sampling)
    size = model.config.size if height is None else height, model.config.size if width is None else width
    _require_text_only(model)
    sigmas = options.sigmas(model.schedule)
    images = []
    for part, part_seeds in _batches(prompts, seeds, batch):
        cond = model.condition(part, size, clip_skip=options.clip_skip)
        uncond = model.condition([negative] * len(part), size, clip_skip=options.clip_skip)
        denoise = guided(model, [uncond, cond], options.guidance)
        noise = seeded(part_seeds, model.device)
        x = start(noise(model.latent_shape(len(part), *size)), sigmas)
        x = finish(options.solve(denoise, x, sigmas, noise, on_step), sigmas)
        images += decode(model, x)
    return images


@torch.no_grad()
def img2img(
    model: LatentDiffusion,
    init: Image.Image,
    prompts: str | Sequence[str],
    *,
    seeds: Sequence[int],
    strength: float = 0.75,
    negative: str = "",
    height: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    on_step: OnStep | None = None,
    **sampling: Any,
) -> list[Image.Image]:
    """Pictures that begin as `init`, noised, and end as prompts say (SDEdit, Meng et al. 2022).

    init           any mode; scaled to cover height x width and cut evenly
    strength       share of the steps that are run: 0 takes init through the VAE and back, 1 keeps next to nothing of it
    height, width  pixels, multiples of 8; init's own, rounded, if not given; given one, the other follows init's shape
    The rest as for `txt2img`. The latent of init is a sample of the VAE's posterior, drawn from each picture's own noise as the original code does.
    """
    options = _sampling(sampling)
    require_strength(strength, options)
    _require_text_only(model)
    init = to_rgb(init)
    width, height = size_for(init, width, height)
    model.latent_shape(1, height, width)  # refuses a size before it is scaled to
    image = from_pil(fit(init, width, height)).to(model.device, model.dtype)
    sigmas = options.sigmas(model.schedule)
    images = []
    for part, part_seeds in _batches(prompts, seeds, batch):
        if strength == 0:
            images += decode(model, model.vae.encode(image).expand(len(part), -1, -1, -1))
            continue
        cond = model.condition(part, (height, width), clip_skip=options.clip_skip)
        uncond = model.condition([negative] * len(part), (height, width), clip_skip=options.clip_skip)
        denoise = guided(model, [uncond, cond], options.guidance)
        noise = seeded(part_seeds, model.device)
        shape = model.latent_shape(len(part), height, width)
        latent = model.vae.encode(image, noise(shape)).float()
        x, rest = noised(latent, noise(shape), sigmas, strength=strength)
        x = finish(options.solve(denoise, x, rest, noise, on_step), rest)
        images += decode(model, x)
    return images


@torch.no_grad()
def decode(model: LatentDiffusion, latent: Tensor) -> list[Image.Image]:
    """Scaled latents [b, c, h, w] -> pictures. Raises NonFinite for latents or pictures with NaN or infinity."""
    if not torch.isfinite(latent).all():
        raise NonFinite("the last step gave NaN or infinity; use float32 or bfloat16, or check the weights")
    return to_pil(model.vae.decode(latent.to(model.dtype)))


# --- checks ---------------------------------------------------------------------------------------------------------


def require_seed(seed: Any) -> int:
    """The seed, if it is one. Raises ArgumentError."""
    return _require_whole("seed", seed, 0, 2**64 - 1)


def require_strength(strength: Any, options: Sampling) -> None:
    """Raises ArgumentError for a strength outside [0, 1], or above 0 but too small for a single step; the message names the least that is not."""
    _require_number("strength", strength, 0, 1)
    if strength > 0:
        try:
            tail(options.sigmas(Schedule()), strength)
        except ValueError as error:
            raise ArgumentError(f"strength: {str(error).removeprefix('strength ')}", key="strength") from None


def _sampling(options: dict[str, Any]) -> Sampling:
    for name in options:
        require_known("option", name, [field.name for field in fields(Sampling)])
    return Sampling(**options)


def _batches(prompts: str | Sequence[str], seeds: Sequence[int], batch: int | None) -> Iterator[tuple[list[str], list[int]]]:
    """(prompts, seeds) of at most `batch` pictures at a time."""
    seeds = [require_seed(seed) for seed in seeds]
    if isinstance(prompts, str):
        prompts = [prompts] * len(seeds)
    if len(prompts) != len(seeds):
        raise ArgumentError(f"seeds: {len(seeds)} for {len(prompts)} prompts; give one for each picture", key="seeds")
    if not seeds:
        raise ArgumentError("seeds: none given; give one for each picture", key="seeds")
    batch = len(seeds) if batch is None else _require_whole("batch", batch, 1, 10**6)
    return ((list(prompts[i : i + batch]), seeds[i : i + batch]) for i in range(0, len(seeds), batch))


def _require_text_only(model: LatentDiffusion) -> None:
    """These tasks have text and noise to give: a model that needs more is for another task."""
    if not model.config.text or model.config.concat:
        needs = ", ".join(model.config.concat) or "an image instead of text"
        raise ArgumentError(f"this model ({model.config.name}) needs {needs}: it is not for text alone")


def require_known(name: str, value: Any, known: Collection[str]) -> None:
    """Raises ArgumentError, with the nearest match, for a value that is not among those known."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        raise ArgumentError(f"{name}: {str(value)[:30]!r} is unknown{f'; {near[0]}?' if near else '.'} All: {' '.join(known)}", key=name)


def _require_whole(name: str, value: Any, low: int, high: int, why: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low:
        raise ArgumentError(f"{name}: {value!r}; give a whole number from {low} to {high}", key=name)
    if value > high:
        raise ArgumentError(f"{name}: {value}; give at most {high}{why}", key=name)
    return int(value)


def _require_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and low <= value <= high):
        raise ArgumentError(f"{name}: {value!r}; give a number from {low:g} to {high:g}", key=name)


def _require_interval(interval: Any) -> None:
    levels = tuple(interval) if isinstance(interval, Sequence) else ()
    if len(levels) != 2 or not all(isinstance(level, Real) for level in levels) or not 0 <= levels[0] < levels[1]:
        raise ArgumentError(f"interval: {interval!r}; give two sigmas, 0 <= low < high", key="interval")


def _takes_eta(sampler: str) -> bool:
    return "eta" in inspect.signature(SAMPLERS[sampler]).parameters
