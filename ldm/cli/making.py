"""From a checked command line to pictures on the disk."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from ldm import tasks
from ldm.cli import arguments, files, models, settings, terminal
from ldm.cli.arguments import Axis, cells_of
from ldm.cli.commands import Drawing
from ldm.cli.files import Inputs, Readers
from ldm.cli.models import Models
from ldm.cli.place import Place
from ldm.errors import ArgumentError, printable
from ldm.pictures import sheets, write
from ldm.tasks.job import Sampling, require_whole


@dataclass(frozen=True)
class Item:
    """One picture to make of every combination: a prompt and how far its seed is from the first."""

    prompt: str
    offset: int


@dataclass(frozen=True)
class Cell:
    """One combination of what --grid-of varies, all checked."""

    args: argparse.Namespace
    sampling: Sampling
    drawing: Drawing
    seeds: list[int]  # by offset


Plan = Callable[..., Drawing]  # (args, inputs, sampling) -> what to draw; may raise ArgumentError


def make(args: argparse.Namespace, plan: Plan, readers: Readers) -> None:
    """Check everything, then load the model, then draw batch by batch, writing each picture as soon as it is done."""
    axes: Sequence[Axis] = args.axes
    settings.require_counts(args)
    settings.sampling(args)  # a wrong option is named before a file is opened
    settings.check(args)
    prompts = settings.prompts_of(args) if hasattr(args, "prompt") else [""]
    random = args.seed is None and not any(axis.dest == "seed" for axis in axes)
    if random:
        args.seed = settings.random_seed(args.n)
    if args.n > 1 and any(axis.dest == "seed" for axis in axes):
        raise ArgumentError("--grid-of: seed together with --n; name all the seeds in --grid-of")
    device = models.device_of(args.device)
    dtype = models.dtype_of(args.dtype, device)
    inputs = files.pictures(args)
    cells = [_cell(args, changed, plan, inputs) for changed in cells_of(axes)]
    items = [Item(prompt, offset) for prompt in prompts for offset in range(args.n)]
    if len(cells) * len(items) > settings.MAX_PICTURES:
        raise ArgumentError(
            f"{len(cells)} combinations of {len(items)} pictures are {len(cells) * len(items)}; the limit is {settings.MAX_PICTURES}"
        )
    embeddings = models.check(args, device, readers)
    place = Place.checked(
        args.out,
        mkdir=args.mkdir,
        overwrite=args.overwrite,
        pixels=sum(_pixels(cell.drawing) for cell in cells) * len(items),
    )
    if random:
        terminal.say(f"ldm: seed {args.seed}")  # without it the picture could not be made again
    loaded = models.load(args, device, dtype, readers)
    for cell in cells:
        models.check_size(
            loaded.model, _size(cell.drawing, loaded, enlarged=True), min(args.batch, len(items)), args.tile
        )
        if cell.drawing.anew:
            models.warn_of_size(loaded.model, _size(cell.drawing, loaded, enlarged=False))

    kept: list[list[Image.Image]] = []  # by cell and item, where a sheet shows them
    total = len(cells) * len(items)
    for k, cell in enumerate(cells):
        sampling = settings.sampling(cell.args, embeddings)
        pictures = _pictures(cell, sampling, items, loaded, place, k * len(items), total)
        kept.append([picture if args.sheet or axes else None for picture in pictures])
    if args.sheet or axes:
        for sheet, item in _sheets(kept, items, cells, axes):
            facts = describe(cells[0], cells[0].sampling, loaded) | {
                "prompt": "\n".join(dict.fromkeys(each.prompt for each in item)),
                "seed": str(cells[0].seeds[item[0].offset]),
            }
            if len(item) > 1:
                facts["seeds"] = " ".join(dict.fromkeys(str(cells[0].seeds[each.offset]) for each in item))
            for axis in axes:  # the value of the first picture is not that of the sheet
                facts.pop({"rescale": "cfg_rescale", "width": "size", "height": "size"}.get(axis.dest, axis.dest), None)
            if axes:
                facts["grid_of"] = "; ".join(f"{axis.name}={','.join(axis.texts)}" for axis in axes)
            terminal.show(printable(str(place.save(sheet, facts, "-sheet"))))


def _cell(args: argparse.Namespace, changed: dict[str, Any], plan: Plan, inputs: Inputs) -> Cell:
    """The arguments with what a combination changes, checked."""
    args = argparse.Namespace(**vars(args) | changed)
    sampling = settings.sampling(args)
    return Cell(args, sampling, plan(args, inputs, sampling), settings.seeds_of(args.seed, args.n))


def _pictures(
    cell: Cell, sampling: Sampling, items: Sequence[Item], loaded: Models, place: Place, done: int, total: int
) -> Iterator[Image.Image]:
    """Draw one combination batch by batch, write every picture, and give it."""
    args = cell.args
    facts = describe(cell, sampling, loaded)
    keywords = {field.name: getattr(sampling, field.name) for field in fields(Sampling)}
    if loaded.refiner is not None:
        keywords["refiner"] = loaded.refiner
    for first in range(0, len(items), args.batch):
        part = items[first : first + args.batch]
        title = f"{done + first + 1}-{done + first + len(part)} of {total}" if total > 1 else ""
        with terminal.progress(title) as watch:
            on_step = place.previewing(loaded.model, args.preview, sampling, watch) if args.preview else watch
            pictures = cell.drawing.draw(
                loaded.model, [item.prompt for item in part], seeds=[cell.seeds[item.offset] for item in part], negative=getattr(args, "negative", None),
                on_step=on_step, **keywords,
            )  # fmt: skip
        for item, picture, flag in zip(part, pictures, judged(loaded, pictures), strict=True):
            here = {"prompt": item.prompt} if hasattr(args, "prompt") else {}
            picture = save(picture, flag, facts | here | {"seed": str(cell.seeds[item.offset])}, args, place)
            yield picture


def judged(loaded: Models, pictures: Sequence[Image.Image]) -> list[bool | None]:
    """Which pictures the safety checker flags; None for each where there is none."""
    return [None] * len(pictures) if loaded.checker is None else loaded.checker(pictures)


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
        terminal.say(
            f"ldm: {path}: flagged by the safety checker"
            + ("" if args.keep_flagged else " and blacked; --keep-flagged keeps such pictures")
        )
    return picture


# --- sheets ---------------------------------------------------------------------------------------------------------


def _sheets(
    kept: Sequence[Sequence[Image.Image]], items: Sequence[Item], cells: Sequence[Cell], axes: Sequence[Axis]
) -> Iterator[tuple[Image.Image, Sequence[Item]]]:
    """Each sheet with the items on it: one of all pictures; with one axis a row for each item; with two axes one for each item."""
    labels = _labels(items, cells[0].seeds)
    if not axes:
        yield sheets.sheet(kept[0], labels), items
    elif len(axes) == 1:
        rows = [[pictures[i] for pictures in kept] for i in range(len(items))]
        yield sheets.table(rows, axes[0].labels, labels if len(items) > 1 else ()), items
    else:
        across, down = axes
        for i, item in enumerate(items):
            rows = [
                [kept[x * len(down.values) + y][i] for x in range(len(across.values))] for y in range(len(down.values))
            ]
            yield sheets.table(rows, across.labels, down.labels), [item]


def _labels(items: Sequence[Item], seeds: Sequence[int]) -> list[str]:
    """What tells the items apart: their prompts, their seeds, or both."""
    prompts, offsets = ({getattr(item, name) for item in items} for name in ("prompt", "offset"))
    labels = []
    for item in items:
        seed = f"seed {seeds[item.offset]}"
        labels.append(seed if len(prompts) == 1 else item.prompt if len(offsets) == 1 else f"{item.prompt} ({seed})")
    return labels


# --- sizes and metadata ---------------------------------------------------------------------------------------------


def _size(drawing: Drawing, loaded: Models, *, enlarged: bool) -> tuple[int, int]:
    side, scale = loaded.model.config.size, drawing.scale if enlarged else 1
    return tuple(int((given or side) * scale) for given in drawing.size)


def _pixels(drawing: Drawing) -> int:
    """How many there will be about, as far as is known without a model."""
    width, height = ((given or 512) * drawing.scale for given in drawing.size)
    return int(width * height)


def describe(cell: Cell, sampling: Sampling, loaded: Models) -> dict[str, str]:
    """What made a picture, but for its prompt and seed: the text chunks of the PNG. No time and no path, so that the same command gives the same bytes."""
    args, plain = cell.args, Sampling()
    width, height = _size(cell.drawing, loaded, enlarged=False)
    facts = {"task": args.command}
    if getattr(args, "negative", None) is not None:
        facts["negative_prompt"] = args.negative
    facts |= {
        "sampler": sampling.sampler,
        "grid": sampling.grid_name(loaded.model.schedule),
        "steps": str(sampling.steps),
        "cfg": repr(sampling.cfg),
        "size": f"{width}x{height}",
    }
    facts |= {"version": arguments.version()} | loaded.facts
    if sampling.interval:
        facts["cfg_interval"] = " ".join(map(repr, sampling.interval))
    for name, key in (
        ("rescale", "cfg_rescale"),
        ("eta", "eta"),
        ("clip_skip", "clip_skip"),
        ("truncate", "truncate"),
        ("tile", "tile"),
    ):
        if getattr(sampling, name) != getattr(plain, name):
            facts[key] = str(getattr(sampling, name)).lower()
    if hasattr(args, "weighting"):
        facts["weighting"] = str(sampling.weighting).lower()
    for name in ("original", "target"):
        if (pair := getattr(args, name, None)) is not None:
            facts[f"{name}_size"] = f"{pair[1]}x{pair[0]}"
    if getattr(args, "crop", None) is not None:
        facts["crop"] = "{},{}".format(*args.crop)
    for name in ("aesthetic", "negative_aesthetic"):
        if getattr(args, name, None) is not None:
            facts[name] = repr(getattr(args, name))
    return facts | dict(cell.drawing.facts)


MAX_FRAMES = 10_000


def animate(args: argparse.Namespace, readers: Readers) -> None:
    """Write the pictures on the way between prompts, or seeds, and an animation of them."""
    settings.require_counts(args)
    sampling = settings.sampling(args)
    settings.check(args)
    prompts = settings.prompts_of(args)
    require_whole("frames", args.frames, 2, MAX_FRAMES)
    write.require_fps(args.fps)
    seeds = settings.checked_seeds(args.seeds, "seeds") if args.seeds else [settings.random_seed(1)]
    _require_stations(len(prompts), len(seeds))
    width, height = settings.size(args)
    device = models.device_of(args.device)
    dtype = models.dtype_of(args.dtype, device)
    embeddings = models.check(args, device, readers)
    pixels = (width or 512) * (height or 512) * args.frames
    place = Place.checked(args.out, mkdir=args.mkdir, overwrite=args.overwrite, pixels=2 * pixels)
    if args.seeds is None:
        terminal.say(f"ldm: seed {seeds[0]}")  # without it the pictures could not be made again
    loaded = models.load(args, device, dtype, readers)
    size = width or loaded.model.config.size, height or loaded.model.config.size
    models.check_size(loaded.model, size, min(args.batch, args.frames), args.tile)
    models.warn_of_size(loaded.model, size)

    sampling = settings.sampling(args, embeddings)
    keywords = {field.name: getattr(sampling, field.name) for field in fields(Sampling)}
    with terminal.progress(f"{args.frames} frames") as watch:
        on_step = place.previewing(loaded.model, args.preview, sampling, watch) if args.preview else watch
        frames = tasks.interpolate(
            loaded.model, prompts, seeds=seeds, frames=args.frames, width=width, height=height, batch=args.batch, negative=args.negative, on_step=on_step, **keywords
        )  # fmt: skip
    facts = describe(Cell(args, sampling, Drawing(tasks.interpolate, size), seeds), sampling, loaded)
    facts |= {"prompt": "\n".join(prompts), "seed": " ".join(map(str, seeds))}
    written = [
        save(frame, flag, facts | {"frame": f"{number} of {args.frames}"}, args, place)
        for number, (frame, flag) in enumerate(zip(frames, judged(loaded, frames), strict=True), 1)
    ]
    terminal.show(printable(str(place.save_animation(written, args.animation, args.fps))))


def _require_stations(prompts: int, seeds: int) -> None:
    """Raises ArgumentError unless there is a way to go, with as many seeds as prompts or one of either."""
    stations = max(prompts, seeds)
    if stations < 2:
        raise ArgumentError(
            "--seeds: one prompt and one seed are no way; give several prompts, or several seeds: --seeds 1,2"
        )
    if not {prompts, seeds} <= {1, stations}:
        raise ArgumentError(f"--seeds: {seeds} with {prompts} prompts; give one, or {prompts}")
