"""What can be typed: the parser, its kinds of values, and how it answers what it does not know."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ldm.cli.axes import axes_of
from ldm.cli.files import Readers
from ldm.cli.terminal import EXIT_CODES
from ldm.errors import ArgumentError


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
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number; write the prompt before --preview") from None


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
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser, help="one of these")
    parsers = {}
    for name, command in table.items():
        parsers[name] = commands.add_parser(name, prog=f"ldm {name}", description=command.run.__doc__, formatter_class=shape, allow_abbrev=False, epilog=f"examples:{command.examples}\n\n{EXIT_CODES}")
        command.add_arguments(parsers[name])
    return parser, parsers


def parse(table: Mapping[str, Command], argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with what --grid-of varies of them as `axes`. Raises ArgumentError; an unknown option is answered with the nearest there is."""
    parser, parsers = build_parser(table)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        near = difflib.get_close_matches(word.split("=")[0], parsers[args.command]._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see 'ldm {args.command} --help'" if word.startswith("-") else "put the prompt in quotes"
        raise ArgumentError(f"{word[:60]}: unknown to ldm {args.command}; {hint}")
    args.axes = axes_of(getattr(args, "grid_of", None) or [], parsers[args.command])
    return args


def version() -> str:
    """Of the installed package."""
    try:
        return importlib.metadata.version("ldm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
