"""What can be typed: the parser, its kinds of values, and how it answers what it does not know."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ldm.cli.files import Readers
from ldm.cli.terminal import EXIT_CODES
from ldm.errors import ArgumentError
from ldm.tasks.job import require_known

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
    actions = {
        string.removeprefix("--"): action
        for action in parser._actions
        if action.dest in VARIABLE
        for string in action.option_strings
    }
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


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Readers], None]
    examples: str


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, no usage."""

    def error(self, message: str) -> None:
        hint = f"; see '{self.prog} --help'" if "required" in message else ""
        raise ArgumentError(message.removeprefix("argument ") + hint)


# --- kinds of values, for argparse; which of them will do is checked later ------------------------------------------


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None


def every(text: str) -> int:
    """What --preview takes: a prompt right behind it is taken for a number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a whole number; write the prompt before --preview"
        ) from None


def times(text: str) -> float:
    """2x or 2 -> 2.0."""
    return number(text.removesuffix("x"))


def wholes(text: str) -> tuple[int, ...]:
    """1,2,3 -> (1, 2, 3)."""
    return tuple(whole(part) for part in text.split(","))


def pixels(text: str) -> tuple[int, int]:
    """1024x768 -> (768, 1024): written width first, told to models height first."""
    match = re.fullmatch(r"(\d{1,7})x(\d{1,7})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no size; write WIDTHxHEIGHT, 1024x768 for example")
    return int(match[2]), int(match[1])


def corner(text: str) -> tuple[int, int]:
    """0,64 -> (0, 64): top and left."""
    match = re.fullmatch(r"(\d{1,7}),(\d{1,7})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no corner; write TOP,LEFT in pixels, 0,64 for example")
    return int(match[1]), int(match[2])


def added(text: str) -> tuple[str, int]:
    """left=128 -> ("left", 128)."""
    side, equals, count = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no side; write left=128, for example")
    return side, whole(count)


def stored_type(text: str) -> torch.dtype:
    """fp16 or float16 -> torch.float16: what numbers are stored as."""
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    types |= {str(dtype).removeprefix("torch."): dtype for dtype in types.values()}
    if text not in types:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is unknown; use fp32, fp16 or bf16")
    return types[text]


def scaled_file(text: str) -> tuple[str, float]:
    """style.safetensors:0.8 -> ("style.safetensors", 0.8); without a number at the end the scale is 1. Other colons belong to the name."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text, re.DOTALL)
    return (match[1], float(match[2])) if match else (text, 1.0)


def named_file(text: str) -> tuple[str | None, str]:
    """cat=my.pt -> ("cat", "my.pt"); a file alone is called by its own name."""
    match = re.fullmatch(r"([\w-]+)=(.+)", text, re.DOTALL)
    return (match[1], match[2]) if match else (None, text)


def shown_bytes(count: int) -> str:
    """2134567890 -> "2.13 GB", in powers of a thousand as disks are sold."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


# --- parsing --------------------------------------------------------------------------------------------------------


def build_parser(table: Mapping[str, Command]) -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each command."""
    shape = argparse.RawDescriptionHelpFormatter
    listed = "\n".join(f"  {name:13}{command.help}" for name, command in table.items())
    parser = Parser(
        prog="ldm", usage="ldm COMMAND ... [options]", formatter_class=shape, allow_abbrev=False,
        description=f"Latent diffusion: pictures from text, and from other pictures, with the Stable Diffusion family.\n\ncommands:\n{listed}",
        epilog=f"start with:\n  ldm txt2img \"a red cube on top of a blue sphere\"\n\n'ldm COMMAND --help' lists the options of a command, with examples.\n\n{EXIT_CODES}",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"ldm {version()}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser, help="one of these"
    )
    parsers = {}
    for name, command in table.items():
        parsers[name] = commands.add_parser(
            name,
            prog=f"ldm {name}",
            description=command.run.__doc__,
            formatter_class=shape,
            allow_abbrev=False,
            epilog=f"examples:{command.examples}\n\n{EXIT_CODES}",
        )
        command.add_arguments(parsers[name])
    return parser, parsers


def parse(table: Mapping[str, Command], argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with what --grid-of varies of them as `axes`. Raises ArgumentError; an unknown option is answered with the nearest there is."""
    parser, parsers = build_parser(table)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        near = difflib.get_close_matches(word.split("=")[0], parsers[args.command]._option_string_actions, n=1)
        hint = (
            f"did you mean {near[0]}?"
            if near
            else f"see 'ldm {args.command} --help'"
            if word.startswith("-")
            else "put the prompt in quotes"
        )
        raise ArgumentError(f"{word[:60]}: unknown to ldm {args.command}; {hint}")
    args.axes = axes_of(getattr(args, "grid_of", None) or [], parsers[args.command])
    return args


def version() -> str:
    """Of the installed package."""
    try:
        return importlib.metadata.version("ldm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
