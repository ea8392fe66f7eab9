"""The arguments of the command line: what there is to say, and whether it makes sense."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from ldm import images, tasks, tokenizer
from ldm.cli.terminal import EXIT_CODES
from ldm.config import FAMILIES
from ldm.errors import ArgumentError

MAX_SIDE = 16384  # pixels
MAX_PICTURES = 10**6
PREVIEW_EVERY = 5  # steps


@dataclass(frozen=True)
class Command:
    """One word of the command line."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    examples: str


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: one line, no usage."""

    def error(self, message: str) -> None:
        hint = f"; see '{self.prog} --help'" if "required" in message else ""
        raise ArgumentError(message.removeprefix("argument ") + hint)


def whole(text: str) -> int:
    """A whole number, for argparse."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number") from None


def number(text: str) -> float:
    """A number, for argparse; which numbers will do is checked later."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number") from None


def every(text: str) -> int:
    """What --preview takes, for argparse: a prompt right behind it is taken for a number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number; write the prompt before --preview") from None


def add_txt2img(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm txt2img`."""
    parser.usage = "%(prog)s PROMPT [options]"
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture shows")
    add_picture_options(parser, "the size the model was trained with")


def add_img2img(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm img2img`."""
    parser.usage = "%(prog)s PROMPT --init IMAGE [options]"
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture shows in the end")
    parser.add_argument("--init", metavar="IMAGE", required=True, help="the picture to begin with: PNG, JPEG, WebP or BMP")
    parser.add_argument("--strength", type=number, default=0.75, metavar="S", help="how much of it may change, 0 (nothing) to 1 (all) (default: %(default)s)")
    add_picture_options(parser, "that of the init picture, which is otherwise scaled and cut evenly; given one, the other follows")


def add_picture_options(parser: argparse.ArgumentParser, size: str) -> None:
    """The options of every command that makes pictures."""
    default = tasks.Sampling()
    what = parser.add_argument_group("what to draw")
    what.add_argument("--negative", default="", metavar="PROMPT", help="what the picture must not show")
    what.add_argument("--seed", type=whole, metavar="N", help="of the first picture; the next has N + 1. 0 to 2^64 - 1, of which torch uses the low 32 bits (default: random, printed)")
    what.add_argument("--n", type=whole, default=1, metavar="N", help="number of pictures (default: %(default)s)")
    what.add_argument("--batch", type=whole, default=1, metavar="N", help="pictures made at once: faster on a GPU, takes more memory (default: %(default)s)")
    what.add_argument("--width", type=whole, metavar="PIXELS", help=f"rounded to a multiple of 8 (default: {size})")
    what.add_argument("--height", type=whole, metavar="PIXELS", help="likewise")

    how = parser.add_argument_group("how to sample it")
    how.add_argument("--sampler", default=default.sampler, metavar="NAME", help="see 'ldm samplers' (default: %(default)s)")
    how.add_argument("--grid", metavar="NAME", help="noise levels to visit; see 'ldm samplers' (default: the sampler's own)")
    how.add_argument("--steps", type=whole, default=default.steps, metavar="N", help="1 to 1000 (default: %(default)s)")
    how.add_argument("--cfg", type=number, default=default.cfg, metavar="SCALE", help="guidance: how closely to follow the prompt; 1 is none, at half the cost (default: %(default)s)")
    how.add_argument("--cfg-rescale", dest="rescale", type=number, default=default.rescale, metavar="SHARE", help="take back the contrast that guidance adds, 0 to 1 (default: %(default)s)")
    how.add_argument("--cfg-interval", dest="interval", type=number, nargs=2, metavar=("LOW", "HIGH"), help="guide only between these sigmas (default: everywhere)")
    how.add_argument("--eta", type=number, metavar="SHARE", help="fresh noise, 0 none, 1 as in DDPM, for samplers that have it (default: the sampler's own)")
    how.add_argument("--clip-skip", type=whole, default=default.clip_skip, metavar="N", help="text layer to read, counted from the one the model was trained with (default: %(default)s)")

    which = parser.add_argument_group("with which model, on what")
    which.add_argument("--ckpt", metavar="FILE", help=".safetensors or .ckpt (default: the small model that ships, which draws coloured solids)")
    which.add_argument("--config", metavar="FAMILY", help="what the checkpoint is, where the file cannot tell: " + ", ".join(FAMILIES))
    which.add_argument("--ema", action="store_true", help="take the averaged weights where the file holds both")
    which.add_argument("--device", default="auto", help="auto (CUDA if there is a device), cpu, cuda or cuda:N (default: %(default)s)")
    which.add_argument("--dtype", default="auto", help="auto (float16 on CUDA, float32 on the CPU), float32, float16 or bfloat16 (default: %(default)s)")

    where = parser.add_argument_group("where to write it")
    where.add_argument("--out", metavar="PATH", help="a directory, whose files are numbered, or the name of a .png; a name that is taken gets a number (default: outputs/, made if missing)")
    where.add_argument("--mkdir", action="store_true", help="make the directory if it is missing")
    where.add_argument("--overwrite", action="store_true", help="replace the .png that --out names")
    where.add_argument("--sheet", action="store_true", help="also write all pictures on one, with their seeds")
    where.add_argument("--preview", type=every, nargs="?", const=PREVIEW_EVERY, metavar="EVERY", help="every few steps (default: %(const)s) write what the picture would be by now to ...-preview.png, replacing it each time")
    where.add_argument("--debug", action="store_true", help="show where an error comes from")


def add_samplers(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm samplers`."""
    parser.add_argument("--steps", type=whole, default=tasks.Sampling().steps, metavar="N", help="to list them for (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def build_parser(table: Mapping[str, Command]) -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each command."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="ldm", description="Latent diffusion: pictures from text, with the Stable Diffusion family.", formatter_class=shape, allow_abbrev=False, epilog=f"'ldm COMMAND --help' lists the options of a command.\n\n{EXIT_CODES}")
    parser.add_argument("--version", action="version", version=f"ldm {version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    parsers = {}
    for name, command in table.items():
        parsers[name] = commands.add_parser(name, help=command.help, description=command.run.__doc__, formatter_class=shape, allow_abbrev=False, epilog=f"examples:{command.examples}\n\n{EXIT_CODES}")
        command.add_arguments(parsers[name])
    return parser, parsers


def parse(table: Mapping[str, Command], argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises ArgumentError; an unknown option is answered with the nearest there is."""
    parser, parsers = build_parser(table)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        word = next((word for word in unknown if word.startswith("-")), unknown[0])
        near = difflib.get_close_matches(word.split("=")[0], parsers[args.command]._option_string_actions, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see 'ldm {args.command} --help'" if word.startswith("-") else "put the prompt in quotes"
        raise ArgumentError(f"{word[:60]}: unknown to ldm {args.command}; {hint}")
    return args


def version() -> str:
    """Of the installed package."""
    try:
        return importlib.metadata.version("ldm")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# --- what argparse cannot check -------------------------------------------------------------------------------------


def sampling(args: argparse.Namespace) -> tasks.Sampling:
    """The options of how to sample, checked."""
    given = {field.name: getattr(args, field.name) for field in fields(tasks.Sampling)}
    return tasks.Sampling(**given | {"interval": args.interval and tuple(args.interval)})


def check(args: argparse.Namespace) -> None:
    """What is left to check of the options of pictures once `sampling` has been. Raises ArgumentError."""
    _check_prompt(args.prompt, "PROMPT")
    _check_prompt(args.negative, "--negative")
    if args.preview is not None and args.preview < 1:
        raise ArgumentError(f"--preview: {args.preview}; give 1 or more steps")
    if args.config is not None:
        tasks.require_known("config", args.config, FAMILIES)


def _check_prompt(prompt: str, name: str) -> None:
    try:
        tokenizer.encode(prompt)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {str(error).removeprefix('prompt: ')}") from None


def side(pixels: int | None, option: str) -> int | None:
    """A width or height rounded to a multiple of 8, with a warning."""
    if pixels is None:
        return None
    if not 1 <= pixels <= MAX_SIDE:
        raise ArgumentError(f"{option}: {pixels}; give 8 to {MAX_SIDE} pixels")
    rounded = images.nearest_multiple(pixels)
    if rounded != pixels:
        warnings.warn(f"{option}: {pixels} becomes {rounded}, a multiple of 8", stacklevel=2)
    return rounded


def seeds_of(args: argparse.Namespace) -> list[int]:
    """One seed for each picture: from --seed on, or from a random one on."""
    for option in ("n", "batch"):
        if not 1 <= getattr(args, option) <= MAX_PICTURES:
            raise ArgumentError(f"--{option}: {getattr(args, option)}; give a whole number from 1 to {MAX_PICTURES}")
    first = secrets.randbelow(2**32 - args.n) if args.seed is None else args.seed
    tasks.require_seed(first)
    tasks.require_seed(first + args.n - 1)
    if first + args.n > 2**32:
        warnings.warn(f"--seed: torch uses the low 32 bits, so {first + args.n - 1} gives the same picture as {(first + args.n - 1) % 2**32}", stacklevel=2)
    return list(range(first, first + args.n))
