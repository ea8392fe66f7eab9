"""What can be typed: the parser, its kinds of values, and how it answers what it does not know."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ldm.cli import Command
from ldm.cli.terminal import EXIT_CODES
from ldm.errors import ArgumentError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        hint = f"; see '{self.prog} --help'" if "required" in message else ""
        raise ArgumentError(message.removeprefix("argument ") + hint)

    def spelled(self) -> dict[str, str]:
        """How Python's arguments are typed here: {"rescale": "--cfg-rescale", "ema=False": "--raw"}, for example."""
        names: dict[str, str] = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    names |= parser.spelled()
            for flag in action.option_strings[:1]:
                names.setdefault(action.dest, flag)
                if action.nargs == 0 and isinstance(action.const, bool):
                    names[f"{action.dest}={action.const}"] = flag
                    names.setdefault(f"{action.dest}={not action.const}", f"no {flag}")
        return names


def parse(commands: Mapping[str, Command], argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, with `run`, which runs the command on them, and `spelled`, as `Parser.spelled` gives it.

    No other command's file is imported. Raises ArgumentError; an unknown option is answered with the nearest there is.
    """
    words = sys.argv[1:] if argv is None else [*argv]
    overview, parsers = _parsers(commands)
    name = next((word for word in words if not word.startswith("-")), "")
    run = _complete(parsers[name], name, commands[name]) if name in commands else None
    args, unknown = overview.parse_known_args(words)
    parser = parsers[args.command]
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        near = difflib.get_close_matches(word.split("=")[0], parser._option_string_actions, n=1)
        hint = f"see 'ldm {args.command} --help'" if word.startswith("-") else "put the prompt in quotes"
        hint = f"did you mean {near[0]}?" if near else hint
        raise ArgumentError(f"{word[:60]}: unknown to ldm {args.command}; {hint}")
    args.run, args.spelled = run, parser.spelled()
    return args


def _parsers(commands: Mapping[str, Command]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole line, and one for each command, which has no options yet."""
    shape = argparse.RawDescriptionHelpFormatter
    listed = "\n".join(f"  {name:13}{command.help}" for name, command in commands.items())
    start = (
        'start with:\n  ldm txt2img "a red cube on top of a blue sphere"\n\n'
        "The model that ships draws unless --ckpt names another one; pictures go to outputs/ unless --out says where."
    )
    overview = Parser(
        prog="ldm", usage="ldm COMMAND ... [options]", formatter_class=shape, allow_abbrev=False,
        description="Latent diffusion: pictures from text, and from other pictures, with the Stable Diffusion family."
        f"\n\ncommands:\n{listed}",
        epilog=f"{start}\n\n'ldm COMMAND --help' lists the options of a command, with examples.\n\n{EXIT_CODES}",
    )  # fmt: skip
    overview.add_argument("--version", action="version", version=f"ldm {version()}")
    added = overview.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=Parser, help="one of these"
    )
    return overview, {
        name: added.add_parser(
            name, prog=f"ldm {name}", formatter_class=shape, allow_abbrev=False,
            epilog=f"examples:{command.examples}\n\n{EXIT_CODES}",
        )
        for name, command in commands.items()
    }  # fmt: skip


def _complete(parser: Parser, name: str, command: Command) -> Any:
    """Import the command's module and give its parser its options. Returns the function that runs it."""
    module = importlib.import_module(f"ldm.cli.{command.module}")
    run = getattr(module, name)
    parser.description = run.__doc__
    if command.usage is None:
        getattr(module, f"add_{name}")(parser)
    else:
        parser.usage = f"%(prog)s {command.usage}"
        add_options(parser, name, importlib.import_module("ldm.cli.options").OPTIONS)
    return run


def add_options(parser: Parser, command: str, groups: Mapping[str, Sequence[Any]]) -> None:
    """The options of a command that makes pictures, rows of `ldm.cli.options` by the titles of their groups."""
    for title, rows in groups.items():
        rows = [row for row in rows if command in row.commands.split()]
        group = parser.add_argument_group(title) if title and rows else parser
        for row in rows:
            flags = row.flags or (f"--{row.name.replace('_', '-')}",)
            how = {"help": row.help, "default": row.default} | row.more
            if flags[0].startswith("-"):
                how["dest"] = row.name
            if isinstance(row.default, bool):
                how["action"] = "store_false" if row.default else "store_true"
            elif isinstance(row.default, list):
                how["action"] = "append"
            if row.metavar is not None:
                how["metavar"] = row.metavar
            if row.kind is not None:
                how["choices" if isinstance(row.kind, tuple) else "type"] = row.kind
            group.add_argument(*flags, **how)


def version() -> str:
    """The version of the installed package."""
    try:
        return importlib.metadata.version("ldm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


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


def scaled_file(text: str) -> tuple[str, float]:
    """style.safetensors:0.8 -> ("style.safetensors", 0.8); without a number at its end the scale is 1."""
    match = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text, re.DOTALL)
    return (match[1], float(match[2])) if match else (text, 1.0)
