"""`--grid-of` and `--sheet`: values that options take in turn, and sheets that show the pictures of all of them."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ldm.cli import terminal
from ldm.cli.options import OPTIONS
from ldm.cli.place import Place
from ldm.cli.settings import Item
from ldm.errors import ArgumentError, printable, require_known
from ldm.pictures import sheets

MAX_CELLS = 1000  # of a comparison


@dataclass(frozen=True)
class Axis:
    """An option and the values it takes in turn."""

    dest: str  # where the arguments keep it
    name: str  # as it is typed, without dashes
    texts: tuple[str, ...]  # the values as they were typed
    values: tuple[Any, ...]
    key: str  # of the metadata

    @property
    def labels(self) -> list[str]:
        """The headers of its rows or columns."""
        return [f"{self.name} {text}" for text in self.texts]


def axes_of(given: Sequence[str], command: str) -> tuple[Axis, ...]:
    """What --grid-of varies. Raises ArgumentError for a third option, one that cannot vary, or a wrong value."""
    if len(given) > 2:
        raise ArgumentError("--grid-of: a sheet has two axes; give it once or twice")
    axes = tuple(_axis(text, command) for text in given)
    if len({axis.dest for axis in axes}) != len(axes):
        raise ArgumentError(f"--grid-of: {axes[0].name} twice; put all its values into one")
    count = len(list(cells_of(axes)))
    if count > MAX_CELLS:
        raise ArgumentError(f"--grid-of: {count} combinations; the limit is {MAX_CELLS}")
    return axes


def cells_of(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """What each combination sets, {dest: value}; the last axis changes fastest."""
    for values in itertools.product(*(axis.values for axis in axes)):
        yield {axis.dest: value for axis, value in zip(axes, values, strict=True)}


def _axis(text: str, command: str) -> Axis:
    key, equals, values = (part.strip() for part in text.partition("="))
    rows = {  # by their names as they are typed, without dashes
        flag.removeprefix("--"): row
        for group in OPTIONS.values()
        for row in group
        if row.varies and command in row.commands.split()
        for flag in row.flags or (row.name.replace("_", "-"),)
    }
    name = next((typed for typed, row in rows.items() if row.name == key), key.removeprefix("--").replace("_", "-"))
    if not equals:
        raise ArgumentError(f"--grid-of: {key[:40]!r} has no values; write cfg=1.5,3,5,8 for example")
    require_known("--grid-of", name, rows)
    row, texts = rows[name], tuple(part.strip() for part in values.split(","))
    if not all(texts):
        raise ArgumentError(f"--grid-of: {name} has an empty value; write {name}=A,B,C")
    try:
        found = tuple(row.kind(part) if callable(row.kind) else part for part in texts)
    except argparse.ArgumentTypeError as error:
        raise ArgumentError(f"--grid-of: {name}: {error}") from None
    if len(set(found)) != len(found):
        raise ArgumentError(f"--grid-of: {name} has a value twice")
    return Axis(row.name, name, texts, found, row.key or row.name)


def write_sheets(
    kept: Sequence[Sequence[Image.Image]], items: Sequence[Item], seeds: Sequence[int], axes: Sequence[Axis],
    facts: dict[str, str], place: Place,
) -> None:  # fmt: skip
    """Write the sheet: one of all pictures; with one axis a row for each item; with two axes a sheet for each item.

    kept   the pictures, by combination and item
    seeds  by the offset of an item
    facts  the metadata of the first picture
    """
    for sheet, shown in _sheets(kept, items, seeds, axes):
        terminal.show(printable(str(place.save(sheet, _facts(shown, seeds, axes, facts), "-sheet"))))


def _sheets(
    kept: Sequence[Sequence[Image.Image]], items: Sequence[Item], seeds: Sequence[int], axes: Sequence[Axis]
) -> Iterator[tuple[Image.Image, Sequence[Item]]]:
    """Each sheet with the items that it shows."""
    labels = _labels(items, seeds)
    if not axes:
        yield sheets.sheet(kept[0], labels), items
    elif len(axes) == 1:
        rows = [[pictures[i] for pictures in kept] for i in range(len(items))]
        yield sheets.table(rows, axes[0].labels, labels if len(items) > 1 else ()), items
    else:
        across, down = axes
        for i, item in enumerate(items):
            pictures, width, height = [cell[i] for cell in kept], len(across.values), len(down.values)
            rows = [[pictures[x * height + y] for x in range(width)] for y in range(height)]
            yield sheets.table(rows, across.labels, down.labels), [item]


def _facts(items: Sequence[Item], seeds: Sequence[int], axes: Sequence[Axis], facts: dict[str, str]) -> dict[str, str]:
    """The metadata of a sheet, from those of its first picture: what varies is named as it was typed."""
    varied = {axis.key for axis in axes}
    facts = {key: value for key, value in facts.items() if key not in varied}
    facts["prompt"] = "\n".join(dict.fromkeys(item.prompt for item in items))
    if "seed" not in varied:
        facts["seed"] = str(seeds[items[0].offset])
        if len(items) > 1:
            facts["seeds"] = " ".join(dict.fromkeys(str(seeds[item.offset]) for item in items))
    if axes:
        facts["grid_of"] = "; ".join(f"{axis.name}={','.join(axis.texts)}" for axis in axes)
    return facts


def _labels(items: Sequence[Item], seeds: Sequence[int]) -> list[str]:
    """What tells the items apart: their prompts, their seeds, or both."""
    prompts, offsets = {item.prompt for item in items}, {item.offset for item in items}
    labels = []
    for item in items:
        seed = f"seed {seeds[item.offset]}"
        labels.append(seed if len(prompts) == 1 else item.prompt if len(offsets) == 1 else f"{item.prompt} ({seed})")
    return labels
