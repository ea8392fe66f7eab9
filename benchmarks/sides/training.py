"""How each side trains on the same weights: ours through `ldm.train`, diffusers as its example scripts do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import forget_peak, peak_memory, reserved_peak, resident
from benchmarks.models.seeded import normal, weight
from benchmarks.sides import cells
from benchmarks.sides.cells import SIZE_NUMBERS
from benchmarks.sides.process import Answer, failed, serve
from ldm.conditioning import Sizes
from ldm.config import ModelConfig
from ldm.train.checkpointing import checkpoint_blocks
from ldm.train.data.batch import Batch
from ldm.train.draws import Draws
from ldm.train.loop import Record, Watchers, fit
from ldm.train.modes import trainee
from ldm.train.ranks import Ranks
from ldm.train.recipe import Method, Optimizer, Recipe, Run, Watch

RANK = 4  # of a LoRA, its alpha too: the scripts' default
LEARNS = ("to_q", "to_k", "to_v", "to_out.0")  # what the scripts give low-rank factors
TARGETS = r"\.attn[12]\.to_(q|k|v|out\.0)$"  # the same, as a recipe says it
CLIP, WEIGHT_DECAY, BETAS, EPS = 1.0, 1e-2, (0.9, 0.999), 1e-8  # the scripts' defaults
ENDLESS = 10**9  # updates, and updates between two states: the run ends when nobody asks for the next
NO_SPREAD = -30.0  # log variance of a latent that is always its mean


@dataclass(frozen=True)
class Job:
    """One side, training one thing."""

    side: str  # a name in SIDES
    family: str
    tiny: bool  # a narrow model of this family
    method: Literal["full", "lora"]
    checkpointing: bool  # activations are computed again instead of kept
    size: int  # pixels along a side
    batch: int
    rate: float  # of learning
    folder: str  # the weights, as diffusers stores them
    dtype: Literal["float32", "bfloat16", "float16"]  # of the arithmetic
    device: str
    threads: int | None  # None: torch's own choice


class Pace(Protocol):
    """Who asks a side for updates."""

    def note(self, **seen: Any) -> None:
        """What the next `wait` passes on: trained, before the first update; then loss, grad_norm."""

    def wait(self) -> None:
        """Between two updates, without gradients: report the last one, and wait for the next. Raises Ended."""


class Ended(Exception):
    """Nobody asks for another update."""


def config_of(family: str, *, tiny: bool) -> ModelConfig:
    """The family with a narrow autoencoder and text towers of one block: latents and text are given."""
    own = cells.config_of(family, tiny=tiny)
    text = tuple(replace(tower, layers=tower.skip + 1) for tower in own.text)
    return replace(own, vae=replace(own.vae, channels=32), text=text)


@dataclass(frozen=True)
class Given:
    """One batch."""

    index: tuple[int, ...]  # the examples' numbers, which their randomness is drawn from
    latent: Tensor  # [b, c, h, w], scaled
    noise: Tensor  # [b, c, h, w]
    t: Tensor  # [b] int64
    context: Tensor  # [b, 77, d]
    pooled: Tensor | None  # [b, d], for SDXL


def given(job: Job, number: int) -> Given:
    """Batch `number`: seeded latents and text, and the noise and timesteps that `ldm.train` draws for them."""
    config, b = config_of(job.family, tiny=job.tiny), job.batch
    side, width = job.size // config.vae.factor, config.unet.vector_dim
    index = tuple(range(number * b, (number + 1) * b))
    draws = Draws(Run().seed, index)
    latent = normal(f"latent {number}", (b, config.vae.z_channels, side, side))
    noise, t = draws.normal("noise", latent.shape[1:]), draws.integers("timestep", config.schedule.steps)
    context = normal(f"context {number}", (b, config.text[0].length, config.unet.context_dim))
    pooled = None if width is None else normal(f"pooled {number}", (b, width - 256 * SIZE_NUMBERS))
    return Given(index, latent, noise, t, context, pooled)


def start(name: str, factor: nn.Parameter) -> None:
    """The seeded start of a low-rank factor, by our name of it; `up` is 0 on both sides."""
    with torch.no_grad():
        factor.copy_(weight(name, factor.shape))


def ldm(job: Job, pace: Pace) -> None:
    """`ldm train` from the model on: the recipe's mode, and the loop."""
    import weights

    model = weights.load(job.folder, device=job.device)
    recipe = Recipe(
        "benchmark",
        method=Method(job.method, rank=RANK, targets=TARGETS if job.method == "lora" else ""),
        optimizer=Optimizer(lr=job.rate, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, clip=CLIP),
        run=Run(steps=ENDLESS, batch=job.batch, micro=job.batch, dtype=job.dtype, save_every=ENDLESS),
        watch=Watch(log_every=1),
    )
    made = trainee(model, recipe)
    made.task.to(job.device)
    for name, p in made.parameters.items():
        if name.endswith(".lora.down"):
            start(name, p)

    def micro(number: int) -> Batch:
        one = given(job, number)
        mean = one.latent / model.config.vae.scale
        moments = torch.cat([mean, torch.full_like(mean, NO_SPREAD)], dim=1)
        pace.wait()  # the loop has just forgotten the last update's gradients
        text: dict[str, Any] = {"context": one.context, "pooled": one.pooled}
        captions, sizes, ones = ("",) * job.batch, (Sizes(),) * job.batch, torch.ones(job.batch)
        return Batch(one.index, captions, (job.size, job.size), sizes, ones, moments=moments, **text)

    def log(record: Record) -> None:
        pace.note(loss=record["loss"], grad_norm=record["grad_norm"])

    pace.note(trained=sum(p.numel() for p in made.parameters.values()))
    with checkpoint_blocks(made.task) if job.checkpointing else nullcontext():
        ranks, watchers = Ranks(device=job.device), Watchers(log=log)
        fit(made.task, made.parameters, micro, recipe, Path(job.folder), ranks=ranks, watchers=watchers)


def diffusers(job: Job, pace: Pace) -> None:
    """What diffusers' examples/text_to_image/train_text_to_image.py and its _lora(_sdxl).py do with encoded batches."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler

    half = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[job.dtype]
    accelerator = Accelerator(mixed_precision=half, cpu=job.device == "cpu")
    device, kind = accelerator.device, getattr(torch, job.dtype)  # the type of what is not trained
    unet = _unet(job, kind)
    if job.checkpointing:
        unet.enable_gradient_checkpointing()
    learning = [p for p in unet.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(learning, lr=job.rate, betas=BETAS, weight_decay=WEIGHT_DECAY, eps=EPS)
    unet, adam = accelerator.prepare(unet.train(), adam)
    noising = DDPMScheduler.from_pretrained(job.folder, subfolder="scheduler")
    pace.note(trained=sum(p.numel() for p in learning))
    for number in count():
        one = given(job, number)
        pace.wait()
        latent, noise, context = (tensor.to(device, kind) for tensor in (one.latent, one.noise, one.context))
        t, more = one.t.to(device), {}
        if one.pooled is not None:
            numbers = [[job.size, job.size, 0, 0, job.size, job.size]] * job.batch
            sizes = torch.tensor(numbers, device=device, dtype=kind)
            more["added_cond_kwargs"] = {"text_embeds": one.pooled.to(device, kind), "time_ids": sizes}
        with accelerator.accumulate(unet):
            eps = unet(noising.add_noise(latent, noise, t), t, context, return_dict=False, **more)[0]
            loss = F.mse_loss(eps.float(), noise.float())
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(learning, CLIP)
            adam.step()
            adam.zero_grad()
        pace.note(loss=loss.item(), grad_norm=norm.item())


def _unet(job: Job, kind: torch.dtype) -> Any:
    """Their UNet, ready to learn: in float32, or for a LoRA in `kind` with factors in float32 where that is float16."""
    from diffusers import UNet2DConditionModel
    from diffusers.training_utils import cast_training_params

    unet = UNet2DConditionModel.from_pretrained(job.folder, subfolder="unet", local_files_only=True).to(job.device)
    if job.method == "full":
        return unet
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.to(dtype=kind)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(LEARNS)))
    if job.dtype == "float16":
        cast_training_params(unet, dtype=torch.float32)
    _start_as_ours(unet, job)
    return unet


def _start_as_ours(unet: nn.Module, job: Job) -> None:
    from weights.names.diffusers import diffusers_unet

    theirs = {name: ours for ours, name in diffusers_unet(config_of(job.family, tiny=job.tiny).unet).items()}
    for name, p in unet.named_parameters():
        layer, found, _ = name.partition(".lora_A.")
        if found:
            start(f"unet.{theirs[f'{layer}.weight'].removesuffix('.weight')}.lora.down", p)


SIDES: dict[str, Callable[[Job, Pace], None]] = {"ldm": ldm, "diffusers": diffusers}


class Asked:
    """The pace of a process that makes one update for each line of its standard input.

    It answers each, and before them loading, unasked: {seconds, noted..., between, peak, device_peak}. These are the
    bytes in memory after it, and at the most since the first answer; on a GPU, the most that was reserved since.
    """

    def __init__(self, device: str, answer: Callable[[Answer], None]):
        self.device, self.answer = device, answer
        self.noted: Answer = {}
        self.loaded = False
        self.since = time.perf_counter()

    def note(self, **seen: Any) -> None:
        self.noted = seen

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        taken = {"seconds": time.perf_counter() - self.since, **self.noted, "between": resident()}
        self.answer({**taken, "peak": peak_memory(), "device_peak": reserved_peak(self.device)})
        if not self.loaded:
            forget_peak(self.device)
            self.loaded = True
        if not sys.stdin.readline():
            raise Ended
        self.since = time.perf_counter()


def answers(job: Job, answer: Callable[[Answer], None]) -> None:
    """Train until nobody asks for more, or answer why that is not possible."""
    try:
        SIDES[job.side](job, Asked(job.device, answer))
    except Ended:
        pass
    except Exception as error:
        answer(failed(error))


if __name__ == "__main__":
    serve(Job, answers)
