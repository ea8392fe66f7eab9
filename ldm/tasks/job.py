"""Which pictures to make, whatever the task: prompts, seeds and sampling, with what every task does with them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from numbers import Real
from typing import Any

from PIL import Image
from torch import Tensor

from ldm.conditioning.cond import Cond, Sizes
from ldm.conditioning.prompts import Embedding, chunks_needed
from ldm.denoiser import guided
from ldm.errors import ArgumentError, NonFinite, require_known, require_number, require_whole
from ldm.images import to_pil
from ldm.limits import precision
from ldm.model import LatentDiffusion
from samplers import DEFAULT_GRID, GRIDS, SAMPLERS, Guidance, Schedule, cfg, finish, noised, seeded, start, tail
from samplers.core import Denoiser, Noise, OnStep, Step, calls_of, watched

MAX_CFG = 100.0


@dataclass(frozen=True)
class Sampling:
    """The keywords that every task takes besides its own. Raises ArgumentError."""

    sampler: str = "dpmpp_2m"  # a name in samplers.SAMPLERS
    grid: str | None = None  # a name in samplers.GRIDS; None: see grid_name
    steps: int = 25  # of the grid, 1 to 1000; more are slower and closer to what the model has learnt
    cfg: float = 7.5  # guidance scale: 1 ignores the negative prompt at half the cost, more follows the prompt closer
    rescale: float = 0.0  # guidance rescale, 0 to 1: takes back the contrast that guidance adds
    interval: tuple[float, float] | None = None  # (low, high) sigmas between which there is guidance; None: everywhere
    eta: float | None = None  # share of fresh noise, for samplers that have one; None: the sampler's own
    clip_skip: int = 1  # text layer read, counted from the one the model was trained with
    weighting: bool = False  # (words:1.3) in a prompt weigh more, [words] less; off: they are read as they stand
    truncate: bool = False  # a prompt too long for the text tower is cut; off: it is read in pieces
    embeddings: tuple[Embedding, ...] = ()  # words of a textual inversion's own
    sizes: Sizes | None = None  # the picture's past, for SDXL; None: that it has always had this size
    tile: int | None = None  # side in pixels of the tiles in which the VAE works; 0: none; None: above 1024 x 1024

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
                others = ", ".join(filter(_takes_eta, SAMPLERS))
                raise ArgumentError(f"eta: sampler {self.sampler} has none; leave it out, or use {others}", key="eta")
        self.sigmas(Schedule())  # some counts of steps do not suit every grid

    def grid_name(self, schedule: Schedule) -> str:
        """The grid in use: the one that was named, or the sampler's own, as in samplers.DEFAULT_GRID.

        With zero terminal SNR it is trailing (Lin et al. 2023, section 3.3): DDIM's leaves out the last level, where
        nothing is seen of the picture yet; Karras' spends two fifths of its steps on a hundredth of the timesteps.
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

    @property
    def options(self) -> dict[str, Any]:
        """The sampler's own keywords."""
        return {} if self.eta is None else {"eta": self.eta}

    def calls(self, sigmas: Sequence[float]) -> int:
        """Network calls that the sampler makes on this grid."""
        return calls_of(SAMPLERS[self.sampler], sigmas, **self.options)


def require_seed(seed: Any) -> int:
    """The seed, if it is one. Raises ArgumentError."""
    return require_whole("seed", seed, 0, 2**64 - 1)


def require_strength(strength: Any, options: Sampling, name: str = "strength") -> None:
    """Raises ArgumentError for a strength outside [0, 1], or too small for a single step; it names the least."""
    require_number(name, strength, 0, 1)
    if strength > 0:
        try:
            tail(options.sigmas(Schedule()), strength, name)
        except ValueError as error:
            raise ArgumentError(str(error), key=name) from None


def _require_interval(interval: Any) -> None:
    levels = tuple(interval) if isinstance(interval, Sequence) else ()
    if len(levels) != 2 or not all(isinstance(level, Real) for level in levels) or not 0 <= levels[0] < levels[1]:
        raise ArgumentError(f"interval: {interval!r}; give two sigmas, 0 <= low < high", key="interval")


def _takes_eta(sampler: str) -> bool:
    return "eta" in inspect.signature(SAMPLERS[sampler]).parameters


@dataclass(frozen=True)
class Part:
    """Pictures of a job that are made at once."""

    prompts: list[str]
    noise: Noise  # of each picture's own seed
    chunks: int  # pieces in which all their prompts are read


@dataclass(frozen=True)
class Job:
    """Which pictures to make: keywords of every task besides its own and those of `Sampling`. Raises ArgumentError."""

    prompts: str | Sequence[str]  # one for each picture, or one for all
    seeds: Sequence[int] = ()  # one for each picture, 0 to 2^64 - 1, of which torch uses the low 32 bits
    negative: str | None = None  # what to steer away from; None: what the model was trained to steer away from
    batch: int | None = None  # pictures made at once, on which no picture depends; None: all
    on_step: OnStep | None = None  # gets every network call as a Step, before its result is used
    sampling: Sampling = field(default_factory=Sampling)

    @staticmethod
    def of(prompts: str | Sequence[str], keywords: dict[str, Any]) -> Job:
        """A job and its sampling from a task's keywords. An unknown one is an error that names the nearest."""
        own = [each.name for each in fields(Job)][1:-1]  # without prompts and sampling
        shared = [each.name for each in fields(Sampling)]
        for name in keywords:
            require_known("option", name, [*own, *shared])
        sampling = Sampling(**{name: value for name, value in keywords.items() if name in shared})
        return Job(prompts, **{name: value for name, value in keywords.items() if name in own}, sampling=sampling)

    def __post_init__(self) -> None:
        for seed in self.seeds:
            require_seed(seed)
        if not len(self.seeds):
            raise ArgumentError("seeds: none given; give one for each picture", key="seeds")
        if not isinstance(self.prompts, str) and len(self.prompts) != len(self.seeds):
            raise ArgumentError(
                f"seeds: {len(self.seeds)} for {len(self.prompts)} prompts; give one for each picture", key="seeds"
            )
        if self.batch is not None:
            require_whole("batch", self.batch, 1, 10**6)

    def parts(self, model: LatentDiffusion) -> Iterator[Part]:
        """At most `batch` pictures at a time, all read in as many pieces: empty pieces would change a picture."""
        prompts = [self.prompts] * len(self.seeds) if isinstance(self.prompts, str) else list(self.prompts)
        chunks = [self._chunks(model, prompt) for prompt in prompts]
        for count, group in groupby(range(len(prompts)), key=lambda k: chunks[k]):
            alike = list(group)
            size = self.batch or len(alike)
            for part in (alike[i : i + size] for i in range(0, len(alike), size)):
                yield Part([prompts[k] for k in part], seeded([int(self.seeds[k]) for k in part], model.device), count)

    def _chunks(self, model: LatentDiffusion, prompt: str) -> int:
        """Pieces in which this prompt and the negative one are read."""
        s = self.sampling
        if s.truncate or not model.config.text:
            return 1
        texts = [prompt, self.negative or ""]
        return chunks_needed(model.text, texts, weighting=s.weighting, embeddings=s.embeddings)

    def conds(self, model: LatentDiffusion, part: Part, size: tuple[int, int], **options: Any) -> list[Cond]:
        """[uncond, cond] of these pictures. `options`: further keywords of `LatentDiffusion.condition`."""
        s, sizes = self.sampling, self.sampling.sizes
        if sizes is None and model.config.unet.vector_dim is not None:
            sizes = Sizes()
        options |= {"clip_skip": s.clip_skip, "weighting": s.weighting}
        options |= {"embeddings": s.embeddings, "chunks": part.chunks}
        uncond = model.condition([self.negative] * len(part.prompts), size, sizes=sizes and sizes.negative(), **options)
        return [uncond, model.condition(part.prompts, size, sizes=sizes, **options)]

    def guided(self, model: LatentDiffusion, conds: Sequence[Cond]) -> Denoiser:
        """The model under these conditions, [uncond, cond], as a sampler asks it."""
        return guided(model, conds, self.sampling.guidance)

    def solve(self, denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
        """From x at noise level sigmas[0] to x at sigmas[-1]. Raises NonFinite, naming the step, at the first NaN."""
        steps = len(sigmas) - 1
        total = self.sampling.calls(sigmas) if self.on_step else steps  # which only `on_step` asks for

        def report(step: Step) -> None:
            if not step.x0.isfinite().all():
                number = step.index * steps // self.sampling.calls(sigmas) + 1
                raise NonFinite(
                    f"step {number} of {steps} (sigma {step.sigma:.4g}): NaN or infinity; "
                    "use float32 or bfloat16, or check the weights"
                )
            if self.on_step:
                self.on_step(step)

        sampler = SAMPLERS[self.sampling.sampler]
        return sampler(watched(denoise, report, total, steps), x, sigmas, noise=noise, **self.sampling.options)

    def draw(self, model: LatentDiffusion, denoise: Denoiser, first: Tensor, noise: Noise) -> Tensor:
        """Latents from nothing but noise, `first` [b, c, h, w]; `noise` is what the sampler draws from on the way."""
        sigmas = self.sampling.sigmas(model.schedule)
        return finish(self.solve(denoise, start(first, sigmas), sigmas, noise), sigmas)

    def redraw(
        self, model: LatentDiffusion, denoise: Denoiser, latent: Tensor, strength: float, first: Tensor, noise: Noise
    ) -> Tensor:
        """Latents that begin as these, noised by `first`, with int(steps * strength) steps left (SDEdit, Meng 2022)."""
        x, rest = noised(latent, first, self.sampling.sigmas(model.schedule), strength=strength)
        return finish(self.solve(denoise, x, rest, noise), rest)

    def pictures(self, model: LatentDiffusion, latent: Tensor) -> list[Image.Image]:
        """Scaled latents [b, c, h, w] -> pictures. Raises NonFinite for latents or pictures with NaN or infinity."""
        return to_pil(precision.decode(model, latent, tile=self.sampling.tile))


def size_of(model: LatentDiffusion, height: int | None, width: int | None) -> tuple[int, int]:
    """(height, width) in pixels, the model's own where none is given."""
    return model.config.size if height is None else height, model.config.size if width is None else width


def require_text_only(model: LatentDiffusion) -> None:
    """Raises ArgumentError for a model that needs more than text and noise, and names the task that gives it."""
    if not model.config.text or model.config.concat:
        needs = ", ".join(model.config.concat) or "an image instead of text"
        first = model.config.concat[0] if model.config.concat else ""
        task = {"mask": "inpaint", "depth": "depth2img", "low_res": "upscale"}.get(first, "variations")
        raise ArgumentError(f"this model ({model.config.name}) needs {needs}: it is not for text alone; use {task}")
