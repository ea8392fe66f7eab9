"""One run, from a recipe to weights on the disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.prompts import Embedding, is_read
from ldm.errors import ArgumentError, FileError
from ldm.model import LatentDiffusion
from ldm.targets import write_text
from ldm.train import shipped
from ldm.train.checkpointing import checkpoint_blocks
from ldm.train.data.batch import Batch
from ldm.train.data.examples import Examples
from ldm.train.data.opening import require_path
from ldm.train.loop import DTYPES, SILENT, Fitted, Watchers, accumulation, fit, require_same
from ldm.train.modes import Trainee, freeze, trainee
from ldm.train.optim import kind_of, last_rate
from ldm.train.ranks import Ranks, all_agree, barrier, broadcast, gathered, ranks
from ldm.train.reading import to_toml
from ldm.train.recipe import Method, Recipe, wrong_key
from ldm.train.results import save_results
from ldm.train.start import Files, begin, complete_prior
from ldm.train.state import State, latest_state, only_run
from ldm.train.watch.log import Log, writers
from ldm.train.watch.report import write_report
from ldm.train.watch.validate import first_batch, save_pictures, validation_loss, validation_pictures


@dataclass(frozen=True)
class Outcome:
    """The end of a run on one rank."""

    fitted: Fitted
    paths: tuple[Path, ...]  # files written: weights, then the report; none where it was stopped
    bad: tuple[str, ...]  # pictures that could not be used, each with its reason
    rank: int = 0


def directory(recipe: Recipe) -> Path:
    """The directory of the run's files."""
    return Path(recipe.run.out or Path("runs") / recipe.name)


def train(
    recipe: Recipe,
    files: Files,
    *,
    device: str,
    allow_data_change: bool = False,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Train as the recipe says, or go on with the run in its directory; write what was learnt, and a report.

    device             "cpu" or "cuda"; of several ranks (torchrun) each takes its own
    allow_data_change  go on although pictures or captions have changed since the state was saved
    stop               called after every update: whether to save the state and end
    Raises ArgumentError, FileError, NonFinite, OutputError.
    """
    out, settings = directory(recipe), recipe.optimizer
    require_named(recipe)
    if settings.lr_from:
        recipe = replace(recipe, optimizer=replace(settings, lr=last_rate(Path(settings.lr_from)), lr_from=""))
    with ranks(device) as place, only_run(out) if place.rank == 0 else nullcontext():
        accumulation(recipe.run, place.world)
        say = say if place.rank == 0 else lambda line: None
        begun = _begin(recipe, files, place, out, say)
        return _run(begun, recipe, files, place, out, allow_data_change, stop)


def require_named(recipe: Recipe) -> None:
    """Raise ArgumentError or FileError for missing files, directories and packages that the recipe names."""
    kind_of(recipe.optimizer.kind)
    writers(recipe.watch)
    model = recipe.model
    named = [("model.start", model.start), ("model.vae", model.vae), ("model.vision", model.vision)]
    for key, path in [*named, *(("method.teachers", path) for path in recipe.method.teachers)]:
        if path and not Path(path).exists():
            raise wrong_key(key, f"{path[-80:]} does not exist; give a file of weights or a diffusers folder")
    if not recipe.method.kind.startswith("shipped"):
        require_path(recipe.data)


@dataclass(frozen=True)
class _Begun:
    """The model and the examples that the loop begins with."""

    trainee: Trainee
    micro: Callable[[int], Batch]
    examples: Examples | None  # None: rendered as they are needed


def _begin(recipe: Recipe, files: Files, place: Ranks, out: Path, say: Callable[[str], None]) -> _Begun:
    if recipe.method.kind.startswith("shipped"):
        return _begin_shipped(recipe, files, place, out, say)
    model, data, method = begin(recipe.model, files, recipe.name), recipe.data, recipe.method
    if data.prior_pictures:
        complete_prior(data, lambda: files.load(recipe.model.start or None), place, say)
    model = model.to(place.device)
    if method.kind == "vae" or model.vision is not None:  # these read no captions: none need be written
        data = replace(data, caption=data.caption or "-")
    examples = Examples(data, recipe.run, model, cache=out / "cache")
    if method.kind == "inversion" and model.text:
        require_word(method, model, examples)
    examples.encode(place.rank, place.world, now_and_then(say))
    barrier(place)
    return _Begun(trainee(model, recipe, [files.load(path) for path in method.teachers]), examples.micro, examples)


def _begin_shipped(recipe: Recipe, files: Files, place: Ranks, out: Path, say: Callable[[str], None]) -> _Begun:
    run, cache = recipe.run, out / "latents.safetensors"
    if recipe.method.kind == "shipped-vae":
        made = shipped.vae_trainee(run, whole=recipe.optimizer.decay)
    elif recipe.model.vae:
        vae = files.load(recipe.model.vae).vae
        say(f"encoding {recipe.data.scenes} pictures")
        made = shipped.diffusion_trainee(run, vae, recipe.data.scenes, cache, device=place.device)
    else:
        raise wrong_key("model.vae", "is missing; run 'ldm train blocks-vae' first and give its model.safetensors")
    return _Begun(freeze(made, recipe), numbered(run.micro), None)


def require_word(method: Method, model: LatentDiffusion, examples: Examples) -> None:
    """Raise ArgumentError for a caption that teaches nothing: the new word is not among the tokens that are read."""
    widths = [tower.width for tower in model.config.text]
    word = Embedding(method.token, {width: torch.zeros(method.vectors, width) for width in widths})
    if without := examples.without(lambda caption: is_read(model.text, caption, word)):
        what = f"{method.token[:30]!r} is not in what is read of the caption of {without[-60:]}"
        raise wrong_key("method.token", f"{what}; say it in data.caption, or early in every caption")


def now_and_then(say: Callable[[str], None], seconds: float = 10.0) -> Callable[[str, int, int], None]:
    """An `on_progress` for encoding that calls `say` at most once in so many seconds."""
    last = 0.0

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > seconds:
            last = time.monotonic()
            say(f"encoded {done} of {total} {what}")

    return on_progress


def numbered(size: int) -> Callable[[int], Batch]:
    """Micro-batches of so many numbers and nothing else, for tasks that make their own pictures."""

    def micro(number: int) -> Batch:
        index, side = tuple(range(number * size, (number + 1) * size)), shipped.BLOCKS.size
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
) -> Outcome:
    made, examples = begun.trainee, begun.examples
    made.task.to(place.device)
    same = identity(recipe, files, examples, place)
    state = going_on(latest_state(out / "states"), same, out, allow_data_change)
    if not all_agree([state and state.step, same], place):
        what = "the ranks see other weights, pictures or states here"
        raise FileError(f"{what}; give all of them the same files, on a disk that they share", path=out)
    if place.rank == 0:
        write_text(out / "recipe.toml", to_toml(recipe))
    with ExitStack() as stack:
        if recipe.run.checkpointing:
            stack.enter_context(checkpoint_blocks(made.task))
        held_out = [] if examples is None else examples.held_out(recipe.watch.pictures)
        log = None
        if place.rank == 0:
            done = state.step if state else 0
            log = stack.enter_context(Log(out, recipe.run.steps, recipe.watch, recipe.name, done=done))
        validate = validator(made, recipe, held_out, out, place, log)
        if state is None and recipe.watch.every:
            validate(0, {name: p.detach() for name, p in made.parameters.items()})
        if recipe.run.compile:
            compile_what_learns(made.model, recipe.method.kind)
        logs = SILENT if log is None else Watchers(log=log.write, event=log.event, tick=log.tick)
        logs = replace(logs, validate=validate, stop=stop)
        fitted = fit(
            made.task, made.parameters, begun.micro, recipe, out, identity=same, state=state, ranks=place, watchers=logs
        )
        paths: list[Path] = []
        if not fitted.stopped:
            paths = save_results(made, fitted.averaged, recipe.method, recipe.run, out, files, place)
            validate(fitted.step, {name: value.to(place.device) for name, value in fitted.averaged.items()})
    if paths and place.rank == 0:
        paths += write_report(out, recipe)
    barrier(place)
    bad = [] if examples is None else examples.bad
    return Outcome(fitted, tuple(paths), tuple(f"{each.id}: {each.why}" for each in bad), place.rank)


def validator(
    made: Trainee, recipe: Recipe, held_out: Sequence[Batch], out: Path, place: Ranks, log: Log | None
) -> Callable[[int, Mapping[str, Tensor]], None]:
    """A function of a step and weights that measures their validation loss and draws the validation pictures.

    Every rank calls it, and the one with a log writes. Raises ArgumentError for pictures that cannot be drawn: now, and
    not after the last update.
    """
    device, dtype, watch = torch.device(place.device).type, DTYPES[recipe.run.dtype], recipe.watch
    draws = recipe.watch.prompts if made.model.vision is None else held_out
    words = {"embeddings": made.embeddings} if made.embeddings else {}
    if draws and made.model.config.concat:
        first_batch(made.model, held_out)

    def validate(step: int, weights: Mapping[str, Tensor]) -> None:
        half = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        with made.wearing(weights), gathered(made.task), half:
            losses = validation_loss(made.task, held_out, watch, made.task.levels)
            pictures = validation_pictures(made.model, watch, recipe.data.size, held_out, **words) if draws else []
        if log is not None:
            save_pictures(pictures, watch, out, step)
            if losses:
                log.write({"step": step, **losses})

    return validate


def compile_what_learns(model: LatentDiffusion, kind: str) -> None:
    """`torch.compile` of the network that such a run trains, in place."""
    for network in (model.vae.encoder, model.vae.decoder) if kind in ("vae", "shipped-vae") else (model.unet,):
        network.compile()


def going_on(state: State | None, same: Mapping[str, Any], out: Path, allow_data_change: bool) -> State | None:
    """The state, if it is of this run. Raises ArgumentError that names what differs; of pictures not where allowed."""
    if state is None:
        return None
    then = state.facts["identity"]
    if then.get("pictures") != same.get("pictures"):
        if not allow_data_change:
            what = "holds a run whose pictures or captions were others"
            remedy = "use another run.out, or go on with --allow-data-change"
            raise ArgumentError(f"{str(out)[-60:]}: {what}; {remedy}", key="data.path")
        then = {**then, "pictures": same.get("pictures")}
        state = replace(state, facts={**state.facts, "identity": then})
    require_same(then, same, out)
    return state


def identity(recipe: Recipe, files: Files, examples: Examples | None, place: Ranks) -> dict[str, Any]:
    """What must be the same for a state to go on: the keys of the recipe that are not free, weights and pictures.

    One rank of each machine reads the weights; the others take the digests of the first one's.
    """
    model, method = recipe.model, recipe.method
    start = [model.vae, model.vision, *method.teachers]
    if not method.kind.startswith("shipped"):  # which starts from nothing
        start.append(model.start or str(files.embedded()))
    digests = [files.digest(Path(path)) for path in start if path] if place.local == 0 else []
    of_first = broadcast(digests, place)
    weights = {"start": digests if place.local == 0 else of_first}
    pictures = {"pictures": None if examples is None else examples.facts}
    return json.loads(json.dumps(recipe.fixed() | weights | pictures, default=vars))  # of a parameter group
