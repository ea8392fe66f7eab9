"""From arguments to the settings of a run, each checked as far as it can be without a model."""

from __future__ import annotations

import argparse
import itertools
import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ldm.cli import files
from ldm.cli.options import OPTIONS
from ldm.conditioning import tokenizer
from ldm.conditioning.cond import Sizes
from ldm.conditioning.prompts import Embedding
from ldm.config import FAMILIES
from ldm.errors import ArgumentError, require_known, require_whole
from ldm.images import nearest_multiple
from ldm.tasks.job import Sampling, require_strength

MAX_SIDE = 16384  # pixels
MAX_PICTURES = 10**6


@dataclass(frozen=True)
class Item:
    """One picture to make of every combination: a prompt and how far its seed is from the first."""

    prompt: str
    offset: int


def sampling(args: argparse.Namespace, embeddings: Sequence[Embedding] = ()) -> Sampling:
    """The options of how to sample and to read prompts. Raises ArgumentError."""
    given = {field.name: getattr(args, field.name) for field in fields(Sampling) if hasattr(args, field.name)}
    given["interval"] = args.interval and tuple(args.interval)
    return Sampling(**given | {"embeddings": tuple(embeddings), "sizes": _sizes(args)})


def _sizes(args: argparse.Namespace) -> Sizes | None:
    """The sizes with which SDXL is conditioned; None where none was given."""
    given = {field.name: value for field in fields(Sizes) if (value := getattr(args, field.name, None)) is not None}
    return Sizes(**given) if given else None


def checked(args: argparse.Namespace) -> Sampling:
    """How to sample, once the options that do not depend on the command are checked. Raises ArgumentError."""
    found = sampling(args)
    if getattr(args, "negative", None) is not None:
        _check_prompt(args.negative, "--negative")
    if args.preview is not None and args.preview < 1:
        raise ArgumentError(f"--preview: {args.preview}; give 1 or more steps")
    if args.preview and args.safety and not args.keep_flagged:
        raise ArgumentError(
            "--preview: would show pictures before --safety has seen them; leave it out, or add --keep-flagged"
        )
    if args.config is not None:
        require_known("config", args.config, FAMILIES)
    for row in itertools.chain(*OPTIONS.values()):
        if row.needs and args.command in row.commands.split() and getattr(args, row.name) != row.default:
            needed, fault = row.needs
            if not getattr(args, needed):
                raise ArgumentError(f"{row.name}: {fault}", key=row.name)
    for path, scale in args.lora:
        if not -100 <= scale <= 100:
            raise ArgumentError(f"--lora: {path[-80:]}: scale {scale:g}; give a number from -100 to 100")
    return found


def prompts_of(args: argparse.Namespace) -> list[str]:
    """The prompts, of the command line or a file. Raises ArgumentError for both, none, or one that cannot be read."""
    typed, path = getattr(args, "prompt", ""), getattr(args, "prompts", None)
    if path is not None:
        if typed:
            raise ArgumentError("--prompts: there is a PROMPT too; give one of them")
        prompts = files.read_prompts(path)
        for number, prompt in enumerate(prompts, 1):
            _check_prompt(prompt, f"--prompts: number {number}")
        return prompts
    if typed is None or typed == []:
        raise ArgumentError(
            f"PROMPT: none given; write it in quotes, or name a file with --prompts; see 'ldm {args.command} --help'"
        )
    prompts = typed if isinstance(typed, list) else [typed]
    for prompt in prompts:
        _check_prompt(prompt, "PROMPT")
    return prompts


def _check_prompt(prompt: str, name: str) -> None:
    try:
        tokenizer.encode(prompt)
    except ArgumentError as error:
        raise ArgumentError(f"{name}: {error.what}") from None


def side(pixels: int | None, option: str) -> int | None:
    """A width or height rounded to a multiple of 8, with a warning."""
    if pixels is None:
        return None
    if not 1 <= pixels <= MAX_SIDE:
        raise ArgumentError(f"{option}: {pixels}; give 8 to {MAX_SIDE} pixels")
    rounded = nearest_multiple(pixels)
    if rounded != pixels:
        warnings.warn(f"{option}: {pixels} becomes {rounded}, a multiple of 8", stacklevel=2)
    return rounded


def size(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """--width and --height, rounded; None where not given."""
    return side(args.width, "--width"), side(args.height, "--height")


def require_some(strength: float, sampling: Sampling, why: str) -> None:
    """Raises ArgumentError for a strength that is none, or that leaves no step; `why` says what 0 would do."""
    require_strength(strength, sampling)
    if strength == 0:
        raise ArgumentError(f"strength: 0 {why}; give more", key="strength")


def require_counts(args: argparse.Namespace) -> None:
    """Raises ArgumentError for a --n or --batch that is no count."""
    for option in ("n", "batch"):
        if not 1 <= getattr(args, option, 1) <= MAX_PICTURES:
            raise ArgumentError(f"--{option}: {getattr(args, option)}; give a whole number from 1 to {MAX_PICTURES}")


def random_seed(count: int) -> int:
    """A seed at random such that none of the `count` seeds from there on is beyond what torch tells apart."""
    return secrets.randbelow(2**32 - count)


def seeds_of(first: int, count: int) -> list[int]:
    """One seed for each picture of a prompt, from the first on. Raises ArgumentError."""
    return checked_seeds([*range(first, first + count)])


def checked_seeds(seeds: Sequence[int], option: str = "seed") -> list[int]:
    """The seeds, if each is one. Raises ArgumentError; warns of those that torch takes for others."""
    for seed in (seeds[0], seeds[-1]) if option == "seed" else seeds:
        require_whole(option, seed, 0, 2**64 - 1)
    if max(seeds) >= 2**32:
        warnings.warn(
            f"--{option}: torch uses the low 32 bits, so {max(seeds)} gives the same picture as {max(seeds) % 2**32}",
            stacklevel=2,
        )
    return [*seeds]
