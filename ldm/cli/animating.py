"""`ldm interpolate`: the frames between prompts and seeds, and the animation of them."""

from __future__ import annotations

import argparse
from dataclasses import fields

from ldm import images, tasks
from ldm.cli import machine, making, models, settings, terminal
from ldm.cli.commands import Drawing
from ldm.cli.files import Readers
from ldm.cli.place import Place
from ldm.errors import ArgumentError, printable
from ldm.sampling import Sampling, require_whole

MAX_FRAMES = 10_000


def make(args: argparse.Namespace, readers: Readers) -> None:
    """Write the pictures on the way between prompts, or seeds, and an animation of them."""
    settings.require_counts(args)
    sampling = settings.sampling(args)
    settings.check(args)
    prompts = settings.prompts_of(args)
    require_whole("frames", args.frames, 2, MAX_FRAMES)
    images.require_fps(args.fps)
    seeds = settings.checked_seeds(args.seeds, "seeds") if args.seeds else [settings.random_seed(1)]
    _require_stations(len(prompts), len(seeds))
    width, height = settings.size(args)
    device = machine.device_of(args.device)
    dtype = machine.dtype_of(args.dtype, device)
    embeddings = models.check(args, device, readers)
    pixels = (width or 512) * (height or 512) * args.frames
    place = Place.checked(args.out, mkdir=args.mkdir, overwrite=args.overwrite, pixels=2 * pixels)
    if args.seeds is None:
        terminal.say(f"ldm: seed {seeds[0]}")  # without it the pictures could not be made again
    loaded = models.load(args, device, dtype, readers)
    size = width or loaded.model.config.size, height or loaded.model.config.size
    machine.check_size(loaded.model, size, min(args.batch, args.frames), args.tile)
    machine.warn_of_size(loaded.model, size)

    sampling = settings.sampling(args, embeddings)
    keywords = {field.name: getattr(sampling, field.name) for field in fields(Sampling)}
    with terminal.progress(f"{args.frames} frames") as watch:
        on_step = place.previewing(loaded.model, args.preview, watch) if args.preview else watch
        frames = tasks.interpolate(
            loaded.model, prompts, seeds=seeds, frames=args.frames, width=width, height=height, batch=args.batch, negative=args.negative, on_step=on_step, **keywords
        )  # fmt: skip
    facts = making.describe(making.Cell(args, sampling, Drawing(tasks.interpolate, size), seeds), sampling, loaded)
    facts |= {"prompt": "\n".join(prompts), "seed": " ".join(map(str, seeds))}
    written = [
        making.save(frame, flag, facts | {"frame": f"{number} of {args.frames}"}, args, place)
        for number, (frame, flag) in enumerate(zip(frames, making.judged(loaded, frames), strict=True), 1)
    ]
    terminal.show(printable(str(place.save_animation(written, args.animation, args.fps))))


def _require_stations(prompts: int, seeds: int) -> None:
    """Raises ArgumentError unless there is a way to go, with as many seeds as prompts or one of either."""
    stations = max(prompts, seeds)
    if stations < 2:
        raise ArgumentError("--seeds: one prompt and one seed are no way; give several prompts, or several seeds: --seeds 1,2")
    if not {prompts, seeds} <= {1, stations}:
        raise ArgumentError(f"--seeds: {seeds} with {prompts} prompts; give one, or {prompts}")
