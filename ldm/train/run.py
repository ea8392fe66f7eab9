"""One run, from a recipe to weights on the disk."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.prompts import Embedding, is_read
from ldm.disk import write_text
from ldm.errors import ArgumentError, FileError
from ldm.model import LatentDiffusion
from ldm.train import shipped
from ldm.train.checkpointing import checkpoint_blocks
from ldm.train.data.batch import Batch
from ldm.train.data.examples import Examples
from ldm.train.data.opening import require_path
from ldm.train.loop import DTYPES, SILENT, Fitted, Watchers, accumulation, fit, require_same
from ldm.train.modes import Trainee, ready, trainee
from ldm.train.optim import kind_of, last_rate
from ldm.train.ranks import Ranks, all_agree, gathered, ranks
from ldm.train.reading import to_toml
from ldm.train.recipe import Recipe
from ldm.train.results import save_results
from ldm.train.start import Files, begin, complete_prior
from ldm.train.state import State, latest_state, only_run
from ldm.train.watch.log import Log, writers
from ldm.train.watch.report import write_report
from ldm.train.watch.validate import first_batch, save_pictures, validation_loss, validation_pictures

SECTIONS = ("model", "data", "objective", "method", "optimizer", "run")
FREE = r"(run\.(steps|out|device|compile|parallel|checkpointing|save_every|keep|formats|save_dtype)|model\.(start|vae|vision)|data\.(path|prior|bad_limit)|method\.teachers)"  # keys that may change when a run goes on


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    fitted: Fitted
    paths: tuple[Path, ...]  # what was written: weights, then the report; none where it was stopped
    bad: tuple[str, ...]  # pictures that could not be used, each with its reason
    rank: int = 0  # whose end this is: the first writes


def directory(recipe: Recipe) -> Path:
    """Where the run keeps everything."""
    return Path(recipe.run.out or Path("runs") / recipe.name)


def train(
    recipe: Recipe,
    files: Files,
    *,
    device: str,
    allow_data_change: bool = False,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> Ended:
    """Train as the recipe says, or go on with the run that its directory holds; write what was learnt, and the report of it.

    device             "cpu" or "cuda"; of several ranks (torchrun) each takes its own
    allow_data_change  go on although pictures or captions are others than the state's run saw
    stop               asked after every update: whether to save the state and end
    Raises ArgumentError, FileError, NonFinite, OutputError.
    """
    out = directory(recipe)
    require_there(recipe)
    if recipe.optimizer.lr_from:
        recipe = replace(
            recipe, optimizer=replace(recipe.optimizer, lr=last_rate(Path(recipe.optimizer.lr_from)), lr_from="")
        )
    with ranks(device) as place, only_run(out) if place.rank == 0 else nullcontext():
        accumulation(recipe, place.world)
        say = say if place.rank == 0 else lambda line: None
        begun = _begin(recipe, files, place, out, say)
        return _run(begun, recipe, files, place, out, allow_data_change, stop)


def require_there(recipe: Recipe) -> None:
    """Raise ArgumentError or FileError for files, directories and packages that the recipe names and that are not there, before anything is read."""
    kind_of(recipe.optimizer.kind)
    writers(recipe.watch)
    named = {"start": [recipe.model.start], "vae": [recipe.model.vae], "vision": [recipe.model.vision]}
    for key, paths in [
        *((f"model.{key}", paths) for key, paths in named.items()),
        ("method.teachers", recipe.method.teachers),
    ]:
        for path in paths:
            if path and not Path(path).exists():
                raise ArgumentError(
                    f"{key}: {path[-80:]} does not exist; give a file of weights or a diffusers folder", key=key
                )
    if not recipe.method.kind.startswith("shipped"):
        require_path(recipe.data)


@dataclass(frozen=True)
class _Begun:
    """What the loop is given."""

    trainee: Trainee
    micro: Callable[[int], Batch]
    examples: Examples | None  # None: rendered as they are needed


def _begin(recipe: Recipe, files: Files, place: Ranks, out: Path, say: Callable[[str], None]) -> _Begun:
    if recipe.method.kind.startswith("shipped"):
        return _begin_shipped(recipe, files, place, out, say)
    model, data = begin(recipe, files), recipe.data
    if data.prior_pictures:
        complete_prior(recipe, files, place, say)
    model = model.to(place.device)
    if recipe.method.kind == "vae" or model.vision is not None:  # nobody reads captions: none need be written
        data = replace(data, caption=data.caption or "-")
    examples = Examples(data, recipe.run, model, cache=out / "cache")
    if recipe.method.kind == "inversion" and model.text:
        require_said(recipe, model, examples)
    examples.encode(place.rank, place.world, told(say))
    all_agree("here", place)
    return _Begun(
        trainee(model, recipe, [files.load(path) for path in recipe.method.teachers]), examples.micro, examples
    )


def _begin_shipped(recipe: Recipe, files: Files, place: Ranks, out: Path, say: Callable[[str], None]) -> _Begun:
    if recipe.method.kind == "shipped-vae":
        return _Begun(ready(shipped.vae_trainee(recipe), recipe), numbered(recipe), None)
    if not recipe.model.vae:
        raise ArgumentError(
            "model.vae: is missing; run 'ldm train blocks-vae' first and give its model.safetensors", key="model.vae"
        )
    vae = files.load(recipe.model.vae).vae
    say(f"encoding {recipe.data.scenes} pictures")
    made = shipped.diffusion_trainee(recipe, vae, out / "latents.safetensors", device=place.device)
    return _Begun(ready(made, recipe), numbered(recipe), None)


def require_said(recipe: Recipe, model: LatentDiffusion, examples: Examples) -> None:
    """Raise ArgumentError for a caption in which the new word is not, or not among the tokens that are read: it would teach nothing."""
    token, vectors = recipe.method.token, recipe.method.vectors
    word = Embedding(token, {tower.config.width: torch.zeros(vectors, tower.config.width) for tower in model.text})
    if without := examples.without(lambda caption: is_read(model.text, caption, word)):
        raise ArgumentError(
            f"method.token: {token[:30]!r} is not in what is read of the caption of {without[-60:]}; say it in data.caption, or early in every caption",
            key="method.token",
        )


def told(say: Callable[[str], None], seconds: float = 10.0) -> Callable[[str, int, int], None]:
    """An `on_progress` that says how far encoding is, now and then."""
    last = 0.0

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > seconds:
            last = time.monotonic()
            say(f"encoded {done} of {total} {what}")

    return on_progress


def numbered(recipe: Recipe) -> Callable[[int], Batch]:
    """Micro-batches of nothing but numbers, for tasks that make their own pictures."""
    size = recipe.run.micro

    def micro(number: int) -> Batch:
        index = tuple(range(number * size, (number + 1) * size))
        side = shipped.BLOCKS.size
        return Batch(index, ("",) * size, (side, side), (), torch.ones(size))

    return micro


def _run(
    begun: _Begun,
    recipe: Recipe,
    files: Files,
    place: Ranks,
    out: Path,
    allow_data_change: bool,
    stop: Callable[[], bool],
) -> Ended:
    made, examples = begun.trainee, begun.examples
    made.task.to(place.device)
    same = identity(recipe, files, examples)
    state = going_on(latest_state(out / "states"), same, out, allow_data_change)
    if not all_agree([state and state.step, same], place):
        raise FileError(
            "the ranks see other weights, pictures or states here; give all of them the same files, on a disk that they share",
            path=out,
        )
    if place.rank == 0:
        write_text(out / "recipe.toml", to_toml(recipe))
    with ExitStack() as stack:
        if recipe.run.checkpointing:
            stack.enter_context(checkpoint_blocks(made.task))
        log = (
            stack.enter_context(Log(out, recipe.run.steps, recipe.watch, recipe.name, done=state.step if state else 0))
            if place.rank == 0
            else None
        )
        validate = validator(
            made, recipe, [] if examples is None else examples.held_out(recipe.watch.pictures), out, place, log
        )
        if state is None and recipe.watch.every:
            validate(0, {name: p.detach() for name, p in made.parameters.items()})
        if recipe.run.compile:
            compile_what_learns(made.model, recipe.method.kind)
        told = SILENT if log is None else Watchers(log=log.write, event=log.event, tick=log.tick)
        fitted = fit(
            made.task,
            made.parameters,
            begun.micro,
            recipe,
            out,
            identity=same,
            state=state,
            ranks=place,
            watchers=replace(told, validate=validate, stop=stop),
        )
        paths: list[Path] = []
        if not fitted.stopped:
            paths = save_results(made, fitted.averaged, recipe, out, files, place)
            validate(fitted.step, {name: value.to(place.device) for name, value in fitted.averaged.items()})
    if paths and place.rank == 0:
        paths += write_report(out, recipe)
    all_agree("here", place)
    return Ended(
        fitted,
        tuple(paths),
        () if examples is None else tuple(f"{each.id}: {each.why}" for each in examples.bad),
        place.rank,
    )


def validator(
    made: Trainee, recipe: Recipe, held_out: Sequence[Batch], out: Path, place: Ranks, log: Log | None
) -> Callable[[int, Mapping[str, Tensor]], None]:
    """A function of a step and weights that tells their loss on what is held out and draws the validation pictures; every rank calls it, that with a log writes.

    Raises ArgumentError for pictures that cannot be drawn: now, and not after the last update.
    """
    draws = recipe.watch.prompts if made.model.vision is None else held_out
    words = {"embeddings": made.embeddings} if made.embeddings else {}
    if draws and made.model.config.concat:
        first_batch(made.model, held_out)

    def validate(step: int, weights: Mapping[str, Tensor]) -> None:
        with (
            made.wearing(weights),
            gathered(made.task),
            torch.autocast(
                torch.device(place.device).type, DTYPES[recipe.run.dtype], enabled=recipe.run.dtype != "float32"
            ),
        ):
            seen = validation_loss(made.task, held_out, recipe, made.task.levels)
            pictures = validation_pictures(made.model, recipe, held_out, **words) if draws else []
        if log is not None:
            save_pictures(pictures, recipe, out, step)
            if seen:
                log.write({"step": step, **seen})

    return validate


def compile_what_learns(model: LatentDiffusion, kind: str) -> None:
    """`torch.compile` of the network that such a run trains, in place."""
    for network in (model.vae.encoder, model.vae.decoder) if kind in ("vae", "shipped-vae") else (model.unet,):
        network.compile()


def going_on(state: State | None, same: Mapping[str, Any], out: Path, allow_data_change: bool) -> State | None:
    """The state, if it is of this run. Raises ArgumentError, naming what differs; of the data unless `allow_data_change`."""
    if state is None:
        return None
    then = state.facts["identity"]
    if then.get("pictures") != same.get("pictures"):
        if not allow_data_change:
            raise ArgumentError(
                f"{str(out)[-60:]}: holds a run whose pictures or captions were others; use another run.out, or go on with --allow-data-change",
                key="data.path",
            )
        then = {**then, "pictures": same.get("pictures")}
        state = replace(state, facts={**state.facts, "identity": then})
    require_same(then, same, out)
    return state


def identity(recipe: Recipe, files: Files, examples: Examples | None) -> dict[str, Any]:
    """What must be the same for a state to go on: the recipe but for FREE keys, the weights that it starts from, the data."""
    sections = {name: getattr(recipe, name) for name in SECTIONS}
    told = {f"{name}.{key}": value for name, section in sections.items() for key, value in asdict(section).items()}
    start = [recipe.model.vae, recipe.model.vision, *recipe.method.teachers]
    if not recipe.method.kind.startswith("shipped"):  # which starts from nothing
        start.append(recipe.model.start or files.embedded())
    made = {key: value for key, value in told.items() if not re.fullmatch(FREE, key)}
    return json.loads(
        json.dumps(
            made
            | {
                "start": [files.digest(Path(path)) for path in start if path],
                "pictures": None if examples is None else examples.facts,
            }
        )
    )
