"""How good a model is on the way: its loss on held-out pictures under the same noise, and its pictures of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.errors import ArgumentError, OutputError
from ldm.images import to_pil
from ldm.limits.precision import decode
from ldm.model import LatentDiffusion
from ldm.pictures.write import save
from ldm.tasks.image import depth2img, variations
from ldm.tasks.inpaint import inpaint
from ldm.tasks.text import txt2img
from ldm.train.data.batch import Batch
from ldm.train.draws import Draws
from ldm.train.recipe import Watch
from ldm.train.tasks import Task, pixels

VARIATIONS = 4  # pictures of a model that varies a picture instead of reading prompts


@torch.no_grad()
def validation_loss(task: Task, batches: Iterable[Batch], watch: Watch, steps: int) -> dict[str, Any]:
    """The mean loss of held-out pictures at `watch.timesteps` levels, the middles of equal parts of the noise schedule.

    steps  of the noise schedule; 1 for an autoencoder, which has no levels
    Noise is drawn from `watch.seed`, the picture's place and the level alone, so that losses of other steps and runs
    can be compared. Returns {"validation_loss": mean, "validation_levels": [[t, mean], ...]}, in the precision of the
    caller's autocast; {} where nothing is held out.
    """
    levels = sorted({(2 * k + 1) * steps // (2 * watch.timesteps) for k in range(watch.timesteps)})
    sums, seen = [0.0] * len(levels), 0
    for batch in batches:
        batch = _first(batch, watch.pictures - seen)
        if not batch.index:
            break
        for k, t in enumerate(levels):
            # below 0: training draws none of these
            draws = Draws(watch.seed, [-1 - (seen + i) * steps - t for i in range(len(batch.index))])
            sums[k] += task.at(batch, draws, torch.full((len(batch.index),), t)).each.double().sum().item()
        seen += len(batch.index)
    if not seen:
        return {}
    means = [total / seen for total in sums]
    each = [[t, mean] for t, mean in zip(levels, means, strict=True)]
    return {"validation_loss": sum(means) / len(means), "validation_levels": each}


def _first(batch: Batch, n: int) -> Batch:
    """The first n examples of a batch, or all."""
    values = {each.name: getattr(batch, each.name) for each in fields(batch) if each.name != "size"}
    return replace(batch, **{name: value[: max(0, n)] for name, value in values.items() if value is not None})


def validation_pictures(
    model: LatentDiffusion, watch: Watch, size: int, held_out: Iterable[Batch] = (), **sampling: Any
) -> list[Image.Image]:
    """One picture for each of `watch.prompts`, of seeds from `watch.seed` on, by DPM++ 2M.

    size      pixels along a side; 0: the model's
    held_out  inpainting, depth and image-variations models start from the first picture in it: with a hole over its
              middle, from its depth alone, or from its content in `VARIATIONS` pictures
    sampling  further fields of `Sampling`, such as `embeddings`
    Raises ArgumentError for such a model where nothing is held out.
    """
    kinds = model.config.concat
    seeds = range(watch.seed, watch.seed + (len(watch.prompts) if model.vision is None else VARIATIONS))
    job = {"seeds": seeds, "batch": 1, "steps": watch.steps, "cfg": watch.cfg, "sampler": "dpmpp_2m", **sampling}
    if not seeds:
        return []
    square: dict[str, Any] = dict.fromkeys(("height", "width"), size or model.config.size)
    if model.vision is not None:
        return variations(model, _picture(model, held_out), **square, **job)
    job["negative"] = watch.negative or None
    if kinds == ("mask", "masked_image"):
        init = _picture(model, held_out)
        return inpaint(model, init, _hole(init.size), watch.prompts, **job)
    if kinds == ("depth",):
        batch = first_batch(model, held_out)
        depth = None if batch.depth is None else to_pil(2 * _stretched(batch.depth[:1]) - 1)[0]
        return depth2img(model, _picture(model, [batch]), watch.prompts, depth=depth, strength=1.0, **job)
    return txt2img(model, watch.prompts, **square, **job)


def first_batch(model: LatentDiffusion, held_out: Iterable[Batch]) -> Batch:
    """The batch whose first picture such a model starts from. Raises ArgumentError where nothing is held out."""
    batch = next(iter(held_out), None)
    if batch is None:
        what = f"validation: a model of family {model.config.name} needs a picture"
        raise ArgumentError(f"{what}; set data.held_out above 0, or leave watch.prompts out", key="held_out")
    return batch


@torch.no_grad()
def _picture(model: LatentDiffusion, held_out: Iterable[Batch]) -> Image.Image:
    """The first held-out picture; decoded, where only its latent is kept."""
    batch = first_batch(model, held_out)
    if batch.moments is None or batch.image is not None:
        return to_pil(pixels(batch)[:1])[0]
    return to_pil(decode(model, model.vae.latent(batch.moments[:1].to(model.device))))[0]


def _stretched(depth: Tensor) -> Tensor:
    """[1, 1, H, W] of any scale -> [1, 3, H, W] from 0 to 1."""
    low, high = depth.aminmax()
    return ((depth - low) / (high - low).clamp(min=1e-12)).expand(-1, 3, -1, -1)


def _hole(size: tuple[int, int]) -> Image.Image:
    """A mask that hides the middle, half as wide and as high as the picture."""
    (width, height), mask = size, Image.new("L", size)
    left, top = width // 4, height // 4
    ImageDraw.Draw(mask).rectangle((left, top, width - left - 1, height - top - 1), fill=255)
    return mask


def save_pictures(pictures: Sequence[Image.Image], watch: Watch, out: Path, step: int) -> list[Path]:
    """Write validation/step-000500/00.png, 01.png, ..., with prompt and step in each. Raises OutputError."""
    directory = out / "validation" / f"step-{step:06d}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"validation pictures cannot be written ({error.strerror}); free space, or choose another directory"
        raise OutputError(what, path=directory) from error
    prompts = [*watch.prompts, *[""] * len(pictures)]
    return [
        save(picture, directory / f"{i:02d}.png", {"prompt": prompts[i], "step": str(step)}, overwrite=True)
        for i, picture in enumerate(pictures)
    ]
