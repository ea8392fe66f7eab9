"""`ldm interpolate`: the pictures on a way between prompts, or seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import ldm.tasks as tasks
from ldm.cli import metadata, models, settings, terminal
from ldm.cli.making import common, save
from ldm.cli.place import Place
from ldm.errors import ArgumentError, printable, require_whole
from ldm.pictures import animations, write
from ldm.tasks.interpolate import MAX_FRAMES


def interpolate(args: argparse.Namespace) -> None:
    """Write the pictures on the way between prompts, or seeds, and an animation of them."""
    settings.require_counts(args)
    settings.checked(args)
    prompts = settings.prompts_of(args)
    require_whole("frames", args.frames, 2, MAX_FRAMES)
    animations.require_fps(args.fps)
    seeds = settings.checked_seeds(args.seeds, "seeds") if args.seeds else [settings.random_seed(1)]
    _require_stations(len(prompts), len(seeds))
    width, height = settings.size(args)
    device = models.device_of(args.device)
    dtype = models.dtype_of(args.dtype, device)
    embeddings = models.check(args, device)
    pixels = (width or 512) * (height or 512) * args.frames
    place = Place.checked(args.out, mkdir=args.mkdir, overwrite=args.overwrite, pixels=2 * pixels)
    if args.seeds is None:
        terminal.say(f"ldm: seed {seeds[0]}")  # without it the pictures could not be made again
    loaded = models.load(args, device, dtype)
    size = width or loaded.model.config.size, height or loaded.model.config.size
    models.check_size(loaded.model, size, min(args.batch, args.frames), args.tile)
    models.warn_of_size(loaded.model, size)

    sampling = settings.sampling(args, embeddings)
    with terminal.progress(f"{args.frames} frames") as watch:
        on_step = place.previewing(loaded.model, args.preview, watch)
        frames = tasks.interpolate(
            loaded.model, prompts, seeds=seeds, frames=args.frames, width=width, height=height, batch=args.batch,
            **common(args, sampling, loaded, on_step),
        )  # fmt: skip
    facts = metadata.of_picture(args, sampling, size, loaded.model, loaded.facts)
    facts |= {"prompt": "\n".join(prompts), "seed": " ".join(map(str, seeds))}
    written = [
        save(frame, flag, facts | {"frame": f"{number} of {args.frames}"}, args, place)
        for number, (frame, flag) in enumerate(zip(frames, loaded.judged(frames), strict=True), 1)
    ]
    terminal.show(printable(str(_save_animation(written, place, args.animation, args.fps))))


def _require_stations(prompts: int, seeds: int) -> None:
    """Raises ArgumentError unless there is a way to go, with as many seeds as prompts or one of either."""
    stations = max(prompts, seeds)
    if stations < 2:
        raise ArgumentError(
            "--seeds: one prompt and one seed are no way; give several prompts, or several seeds: --seeds 1,2"
        )
    if not {prompts, seeds} <= {1, stations}:
        raise ArgumentError(f"--seeds: {seeds} with {prompts} prompts; give one, or {prompts}")


def _save_animation(frames: Sequence[Image.Image], place: Place, kind: str, fps: float) -> Path:
    """The frames as an animation, beside what was saved."""
    if place.is_file:
        names = write.spare(place.path.with_name(f"{place.path.stem}-animation.{kind}"))
    else:
        names = write.numbered(place.path, "-animation", kind)
    path = next(names) if place.overwrite else names
    return animations.save_animation(frames, path, kind=kind, fps=fps, overwrite=place.overwrite)
