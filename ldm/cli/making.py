"""From a checked command line to pictures on the disk."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from ldm.cli import metadata, models, settings, terminal
from ldm.cli.models import Models
from ldm.cli.place import Place
from ldm.cli.settings import Item
from ldm.errors import ArgumentError, printable
from ldm.tasks.job import Sampling


@dataclass(frozen=True)
class Drawing:
    """One way to draw pictures, checked as far as it can be without a model."""

    task: Callable[..., list[Image.Image]]  # (model, *inputs, prompts, **keywords and those of a job) -> pictures
    keywords: dict[str, Any]  # of this task alone
    size: tuple[int | None, int | None]  # (width, height) of the picture, before it is enlarged; None: the model's own
    inputs: tuple[Any, ...] = ()  # what it begins with
    scale: float = 1  # by which it is enlarged
    anew: bool = True  # all of it is drawn at once from what the prompt says, so that a size beyond the training shows


Plan = Callable[[argparse.Namespace, Sampling], Drawing]  # checks the command's own options; may raise ArgumentError


@dataclass(frozen=True)
class Cell:
    """One combination of what --grid-of varies, all checked."""

    args: argparse.Namespace
    drawing: Drawing
    seeds: list[int]  # by offset


def make(args: argparse.Namespace, plan: Plan) -> None:
    """Check everything, then load the model, then draw batch by batch, writing each picture as soon as it is done."""
    axes, combinations = _compared(args)
    settings.require_counts(args)
    settings.checked(args)  # a wrong option is named before a file is opened
    prompts = settings.prompts_of(args) if hasattr(args, "prompt") else [""]
    seed_varies = any(axis.dest == "seed" for axis in axes)
    random = args.seed is None and not seed_varies
    if random:
        args.seed = settings.random_seed(args.n)
    if args.n > 1 and seed_varies:
        raise ArgumentError("--grid-of: seed together with --n; name all the seeds in --grid-of")
    device = models.device_of(args.device)
    dtype = models.dtype_of(args.dtype, device)
    cells = [_cell(args, changed, plan) for changed in combinations]
    items = [Item(prompt, offset) for prompt in prompts for offset in range(args.n)]
    total = len(cells) * len(items)
    if total > settings.MAX_PICTURES:
        raise ArgumentError(
            f"{len(cells)} combinations of {len(items)} pictures are {total}; the limit is {settings.MAX_PICTURES}"
        )
    embeddings = models.check(args, device)
    pixels = sum(_pixels(cell.drawing) for cell in cells) * len(items)
    place = Place.checked(args.out, mkdir=args.mkdir, overwrite=args.overwrite, pixels=pixels)
    if random:
        terminal.say(f"ldm: seed {args.seed}")  # without it the picture could not be made again
    loaded = models.load(args, device, dtype)
    for cell in cells:
        large = _size(cell.drawing, loaded, cell.drawing.scale)
        models.check_size(loaded.model, large, min(args.batch, len(items)), args.tile)
        if cell.drawing.anew:
            models.warn_of_size(loaded.model, _size(cell.drawing, loaded))

    shown = args.sheet or axes
    kept: list[list[Image.Image]] = []  # by cell and item, where a sheet shows them
    for k, cell in enumerate(cells):
        sampling = settings.sampling(cell.args, embeddings)
        pictures = _pictures(cell, sampling, items, loaded, place, k * len(items), total)
        kept.append([picture for picture in pictures if shown])
    if shown:
        from ldm.cli import comparing

        facts = _facts(cells[0], settings.sampling(cells[0].args), loaded)
        comparing.write_sheets(kept, items, cells[0].seeds, axes, facts, place)


def _compared(args: argparse.Namespace) -> tuple[Sequence[Any], list[dict[str, Any]]]:
    """What --grid-of varies, and what each combination sets: nothing, where nothing varies."""
    if not args.grid_of:
        return (), [{}]
    from ldm.cli import comparing

    axes = comparing.axes_of(args.grid_of, args.command)
    return axes, [*comparing.cells_of(axes)]


def _cell(args: argparse.Namespace, changed: dict[str, Any], plan: Plan) -> Cell:
    """The arguments with what a combination changes, checked."""
    args = argparse.Namespace(**vars(args) | changed)
    return Cell(args, plan(args, settings.checked(args)), settings.seeds_of(args.seed, args.n))


def _pictures(
    cell: Cell, sampling: Sampling, items: Sequence[Item], loaded: Models, place: Place, done: int, total: int
) -> Iterator[Image.Image]:
    """Draw one combination batch by batch, write every picture, and give it."""
    args, drawing = cell.args, cell.drawing
    facts = _facts(cell, sampling, loaded)
    for first in range(0, len(items), args.batch):
        part = items[first : first + args.batch]
        title = f"{done + first + 1}-{done + first + len(part)} of {total}" if total > 1 else ""
        with terminal.progress(title) as watch:
            pictures = drawing.task(
                loaded.model, *drawing.inputs, [item.prompt for item in part], **drawing.keywords,
                seeds=[cell.seeds[item.offset] for item in part],
                **common(args, sampling, loaded, place.previewing(loaded.model, args.preview, watch)),
            )  # fmt: skip
        for item, picture, flag in zip(part, pictures, loaded.judged(pictures), strict=True):
            here = {"prompt": item.prompt} if hasattr(args, "prompt") else {}
            yield save(picture, flag, facts | here | {"seed": str(cell.seeds[item.offset])}, args, place)


def common(args: argparse.Namespace, sampling: Sampling, loaded: Models, on_step: Any) -> dict[str, Any]:
    """The keywords that every task takes, but for prompts and seeds; the refiner too, where there is one."""
    keywords = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    refiner = {} if loaded.refiner is None else {"refiner": loaded.refiner}
    return keywords | refiner | {"negative": getattr(args, "negative", None), "on_step": on_step}


def save(
    picture: Image.Image, flag: bool | None, facts: dict[str, str], args: argparse.Namespace, place: Place
) -> Image.Image:
    """Write a picture, black if it is flagged and flagged ones are not kept, and say so. Returns what was written."""
    if flag is not None:
        facts = facts | {"flagged": "false" if not flag else "true, kept" if args.keep_flagged else "true, blacked"}
    if flag and not args.keep_flagged:
        picture = Image.new("RGB", picture.size)
    path = printable(str(place.save(picture, facts)))
    terminal.show(path)
    if flag:
        done = "" if args.keep_flagged else " and blacked; --keep-flagged keeps such pictures"
        terminal.say(f"ldm: {path}: flagged by the safety checker{done}")
    return picture


def _facts(cell: Cell, sampling: Sampling, loaded: Models) -> dict[str, str]:
    size = _size(cell.drawing, loaded)
    return metadata.of_picture(cell.args, sampling, size, loaded.model, loaded.facts)


def _size(drawing: Drawing, loaded: Models, scale: float = 1) -> tuple[int, int]:
    width, height = (int((given or loaded.model.config.size) * scale) for given in drawing.size)
    return width, height


def _pixels(drawing: Drawing) -> int:
    """How many there will be about, as far as is known without a model."""
    width, height = ((given or 512) * drawing.scale for given in drawing.size)
    return int(width * height)
