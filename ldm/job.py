"""Which pictures to make, whatever the task: prompts, seeds and sampling, with what every task does with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import precision
from ldm.conditioning import Cond, Sizes
from ldm.denoiser import guided
from ldm.errors import ArgumentError, NonFinite
from ldm.images import to_pil
from ldm.model import LatentDiffusion
from ldm.prompts import chunks_needed
from ldm.sampling import Sampling, require_known, require_seed, require_whole
from samplers import SAMPLERS, finish, noised, seeded, start
from samplers.core import Denoiser, Noise, OnStep, Step


@dataclass(frozen=True)
class Part:
    """Pictures of a job that are made at once."""

    prompts: list[str]
    noise: Noise  # of each picture's own seed
    chunks: int  # pieces in which all their prompts are read


@dataclass(frozen=True)
class Job:
    """Which pictures to make, whatever the task: the keywords that every task takes besides its own and those of `Sampling`. Raises ArgumentError."""

    prompts: str | Sequence[str]  # one for each picture, or one for all
    seeds: Sequence[int] = ()  # one for each picture, 0 to 2^64 - 1, of which torch uses the low 32 bits; a picture does not depend on its batch
    negative: str | None = None  # what to steer away from; None: what the model was trained to steer away from when nothing is said
    batch: int | None = None  # pictures made at once; None: all
    on_step: OnStep | None = None  # told before each update
    sampling: Sampling = field(default_factory=Sampling)

    @staticmethod
    def of(prompts: str | Sequence[str], keywords: dict[str, Any]) -> Job:
        """A job and its sampling from the keywords of a task's caller. An unknown one is an error that names the nearest."""
        mine, theirs = ([each.name for each in fields(kind)] for kind in (Job, Sampling))
        mine = mine[1:-1]
        for name in keywords:
            require_known("option", name, [*mine, *theirs])
        return Job(prompts, **{k: v for k, v in keywords.items() if k in mine}, sampling=Sampling(**{k: v for k, v in keywords.items() if k in theirs}))

    def __post_init__(self) -> None:
        for seed in self.seeds:
            require_seed(seed)
        if not len(self.seeds):
            raise ArgumentError("seeds: none given; give one for each picture", key="seeds")
        if not isinstance(self.prompts, str) and len(self.prompts) != len(self.seeds):
            raise ArgumentError(f"seeds: {len(self.seeds)} for {len(self.prompts)} prompts; give one for each picture", key="seeds")
        if self.batch is not None:
            require_whole("batch", self.batch, 1, 10**6)

    def parts(self, model: LatentDiffusion) -> Iterator[Part]:
        """At most `batch` pictures at a time. Prompts that are read in fewer pieces are not drawn out to the length of others: that would change their pictures."""
        prompts = [self.prompts] * len(self.seeds) if isinstance(self.prompts, str) else list(self.prompts)
        chunks = [self._chunks(model, prompt) for prompt in prompts]
        for count, group in groupby(range(len(prompts)), key=lambda k: chunks[k]):
            alike = list(group)
            for i in range(0, len(alike), self.batch or len(alike)):
                part = alike[i : i + (self.batch or len(alike))]
                yield Part([prompts[k] for k in part], seeded([int(self.seeds[k]) for k in part], model.device), count)

    def _chunks(self, model: LatentDiffusion, prompt: str) -> int:
        """Pieces in which this prompt and the negative one are read."""
        s = self.sampling
        texts = [prompt, self.negative or ""]
        return 1 if s.truncate or not model.config.text else chunks_needed(model.text, texts, weighting=s.weighting, embeddings=s.embeddings)

    def told(self, model: LatentDiffusion, part: Part, size: tuple[int, int], **told: Any) -> list[Cond]:
        """[uncond, cond] of these pictures, for `guided`. `told`: further keywords of `LatentDiffusion.condition`."""
        s = self.sampling
        sizes = s.sizes or Sizes() if model.config.unet.vector_dim is not None else s.sizes
        text = {"clip_skip": s.clip_skip, "weighting": s.weighting, "embeddings": s.embeddings, "chunks": part.chunks}
        uncond = model.condition([self.negative] * len(part.prompts), size, sizes=sizes and sizes.negative(), **told, **text)
        return [uncond, model.condition(part.prompts, size, sizes=sizes, **told, **text)]

    def guided(self, model: LatentDiffusion, conds: Sequence[Cond]) -> Denoiser:
        """The model under these conditions, [uncond, cond], as a sampler asks it."""
        return guided(model, conds, self.sampling.guidance)

    def solve(self, denoise: Denoiser, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Tensor:
        """From x at noise level sigmas[0] to x at sigmas[-1]. Raises NonFinite, naming the step, as soon as a value is NaN or infinite."""

        def checked(step: Step) -> None:
            if not torch.isfinite(step.x0).all():
                raise NonFinite(f"step {step.index + 1} of {step.total} (sigma {step.sigma:.4g}): NaN or infinity; use float32 or bfloat16, or check the weights")
            if self.on_step:
                self.on_step(step)

        keywords = {} if self.sampling.eta is None else {"eta": self.sampling.eta}
        return SAMPLERS[self.sampling.sampler](denoise, x, sigmas, noise=noise, on_step=checked, **keywords)

    def draw(self, model: LatentDiffusion, denoise: Denoiser, first: Tensor, noise: Noise) -> Tensor:
        """Latents from nothing but noise, `first` [b, c, h, w]; `noise` is what the sampler draws from on the way."""
        sigmas = self.sampling.sigmas(model.schedule)
        return finish(self.solve(denoise, start(first, sigmas), sigmas, noise), sigmas)

    def redraw(self, model: LatentDiffusion, denoise: Denoiser, latent: Tensor, strength: float, first: Tensor, noise: Noise) -> Tensor:
        """Latents that begin as these, noised by `first` to the level where int(steps * strength) steps are left (SDEdit, Meng et al. 2022)."""
        x, rest = noised(latent, first, self.sampling.sigmas(model.schedule), strength=strength)
        return finish(self.solve(denoise, x, rest, noise), rest)

    def pictures(self, model: LatentDiffusion, latent: Tensor) -> list[Image.Image]:
        """Scaled latents [b, c, h, w] -> pictures. Raises NonFinite for latents or pictures with NaN or infinity."""
        return to_pil(precision.decode(model, latent, tile=self.sampling.tile))
