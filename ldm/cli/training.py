"""`ldm train`: a model, LoRA, word or autoencoder from a recipe."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import weights
from ldm.cli import metadata, models, terminal
from ldm.errors import printable
from ldm.train import run
from ldm.train.reading import load_recipe, names, to_toml
from ldm.train.recipe import Recipe
from ldm.train.start import Files
from ldm.train.watch.card import training_section
from weights.models import embedded


def add_train(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm train`."""
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        nargs="?",
        help="the name of one that ships, or a .toml file; without it the ones that ship are listed",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe, such as data.path=photos or optimizer.lr=1e-5; may be given several times",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="directory of the run, as --set run.out=DIR; an interrupted run found there goes on (default: runs/NAME)",
    )
    parser.add_argument(
        "--show",
        action="store_true",
        help="print the recipe, every key, and the training section of its card; train nothing",
    )
    parser.add_argument(
        "--allow-data-change",
        action="store_true",
        help="go on with a run although its pictures or captions have changed",
    )
    parser.add_argument(
        "--no-save-on-interrupt",
        action="store_true",
        help="at Ctrl-C or SIGTERM stop at once, with the last state that was saved",
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def train(args: argparse.Namespace) -> None:
    """Train as a recipe says. \
What was learnt, log, states, validation and a report with pictures lie in the run's directory.

    An interrupted run goes on where it was saved when it is started again. \
On several GPUs or machines: torchrun --nproc-per-node 2 -m ldm train RECIPE.
    """
    if args.recipe is None:
        for name in names():
            terminal.show(f"{name:18} {load_recipe(name).about}")
        return
    recipe = load_recipe(args.recipe, [*args.set, *([f"run.out={args.out}"] if args.out is not None else [])])
    if args.show:
        terminal.show(f"{to_toml(recipe)}\n{training_section(recipe)}")
        return
    with interrupted(not args.no_save_on_interrupt) as came:
        ended = run.train(
            recipe, _of_weights(), device=str(models.device_of(recipe.run.device)),
            allow_data_change=args.allow_data_change, stop=lambda: came() is not None,
            say=lambda line: terminal.say(f"ldm: {printable(line)}"),
        )  # fmt: skip
    if ended.rank == 0:
        _report(ended, recipe)
    if ended.fitted.stopped:
        raise terminal.Terminated if came() == signal.SIGTERM else KeyboardInterrupt


def _report(ended: run.Outcome, recipe: Recipe) -> None:
    """What the user should know at the end."""
    if ended.bad:
        terminal.say(f"ldm: pictures that were left out: {len(ended.bad)}")
        for line in ended.bad[:20]:
            terminal.say(f"ldm:   {printable(line)[:190]}")
    if ended.fitted.skipped:
        terminal.say(f"ldm: updates that were left out, their loss or gradient NaN or infinite: {ended.fitted.skipped}")
    if ended.fitted.stopped:
        terminal.say(f"ldm: saved after {ended.fitted.step} of {recipe.run.steps} updates; the same command goes on")
    for path in ended.paths:
        terminal.show(printable(str(path)))


@contextmanager
def interrupted(save: bool) -> Iterator[Callable[[], int | None]]:
    """A function that says which of SIGINT and SIGTERM came; a second one, or any unless `save`, stops at once."""
    if not save or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    seen: list[int] = []
    before = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: Any) -> None:
        if seen:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        seen.append(number)
        terminal.say("ldm: saving the state after this update; again to stop at once")

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _of_weights() -> Files:
    """The functions of `weights` that a run uses."""
    return Files(
        load=weights.load, load_vae=weights.load_vae, load_vision=weights.load_vision, save=weights.save,
        convert=weights.convert, save_lora=weights.save_lora, save_embedding=weights.save_embedding,
        embedded=embedded, digest=metadata.file_hash,
    )  # fmt: skip
