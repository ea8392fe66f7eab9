"""`--grid-of`: which options a comparison varies, and with which values."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ldm.errors import ArgumentError
from ldm.sampling import require_known

MAX_CELLS = 1000  # of a comparison
VARIABLE = (  # what may vary, by its name in Python; a command has those of them that are its options
    "cfg", "sampler", "grid", "steps", "eta", "rescale", "clip_skip", "seed", "strength", "width", "height", "scale", "enlarge", "feather", "noise_level",
    "preprocessing", "refine_from", "refine_strength", "aesthetic", "negative_aesthetic",
)  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """An option and the values it takes in turn."""

    dest: str  # where the arguments keep it
    name: str  # as it is typed, without dashes
    texts: tuple[str, ...]  # the values as they were typed
    values: tuple[Any, ...]

    @property
    def labels(self) -> list[str]:
        """The headers of its rows or columns."""
        return [f"{self.name} {text}" for text in self.texts]


def axes_of(given: Sequence[str], parser: argparse.ArgumentParser) -> tuple[Axis, ...]:
    """What --grid-of varies. Raises ArgumentError for more than two options, one that cannot vary, or a value that it does not take."""
    if len(given) > 2:
        raise ArgumentError("--grid-of: a sheet has two axes; give it once or twice")
    axes = tuple(_axis(text, parser) for text in given)
    if len({axis.dest for axis in axes}) != len(axes):
        raise ArgumentError(f"--grid-of: {axes[0].name} twice; put all its values into one")
    count = len(list(cells_of(axes)))
    if count > MAX_CELLS:
        raise ArgumentError(f"--grid-of: {count} combinations; the limit is {MAX_CELLS}")
    return axes


def cells_of(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """What each combination sets, {dest: value}; the last axis changes fastest. Without axes there is one combination, of nothing."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield {axis.dest: value for axis, value in zip(axes, values, strict=True)}


def _axis(text: str, parser: argparse.ArgumentParser) -> Axis:
    key, equals, values = text.partition("=")
    actions = {string.removeprefix("--"): action for action in parser._actions if action.dest in VARIABLE for string in action.option_strings}
    name = key.strip().removeprefix("--").replace("_", "-")
    name = next((typed for typed, action in actions.items() if action.dest == key.strip()), name)
    if not equals:
        raise ArgumentError(f"--grid-of: {key[:40]!r} has no values; write cfg=1.5,3,5,8 for example")
    try:
        require_known("grid_of", name, actions)
    except ArgumentError as error:
        raise ArgumentError(f"--{str(error).replace('_', '-', 1)}") from None
    action, texts = actions[name], tuple(part.strip() for part in values.split(","))
    if not all(texts):
        raise ArgumentError(f"--grid-of: {name} has an empty value; write {name}=A,B,C")
    try:
        converted = tuple(action.type(part) if action.type else part for part in texts)
    except argparse.ArgumentTypeError as error:
        raise ArgumentError(f"--grid-of: {name}: {error}") from None
    if len(set(converted)) != len(converted):
        raise ArgumentError(f"--grid-of: {name} has a value twice")
    return Axis(action.dest, name, texts, converted)
