"""`ldm txt2img` and `ldm hires`: pictures of what a prompt says."""

from __future__ import annotations

import argparse

import ldm.tasks as tasks
from ldm.cli import settings
from ldm.cli.making import Drawing, make
from ldm.errors import ArgumentError, require_number
from ldm.tasks.job import Sampling, require_strength


def txt2img(args: argparse.Namespace) -> None:
    """Write pictures of what the prompt says."""
    make(args, _drawn if args.scale is None else _enlarged)


def hires(args: argparse.Namespace) -> None:
    """Write pictures of what the prompt says."""
    make(args, _enlarged)


def _drawn(args: argparse.Namespace, sampling: Sampling) -> Drawing:
    """Pictures from noise alone, which a refiner may finish."""
    if args.refine_from is not None and args.refine_strength is not None:
        what = "the refiner redraws the finished picture, or takes over at --refine-from"
        raise ArgumentError(f"--refine-strength: {what}; give one of them")
    if args.refine_from is not None:
        require_number("refine_from", args.refine_from, 0, 1)
    if args.refine_strength is not None:
        require_strength(args.refine_strength, sampling, "refine_strength")
    width, height = settings.size(args)
    given = {name: getattr(args, name) for name in ("refine_from", "refine_strength")}
    keywords = {name: value for name, value in given.items() if value is not None}
    return Drawing(tasks.txt2img, keywords | {"width": width, "height": height}, (width, height))


def _enlarged(args: argparse.Namespace, sampling: Sampling) -> Drawing:
    """Large pictures: made small, enlarged, and redrawn at their size. What was not given is put into the arguments."""
    if getattr(args, "refiner", None) is not None:
        raise ArgumentError("--refiner: does not go together with --hires; use one of them")
    if not 1 < args.scale <= 8:
        raise ArgumentError(f"scale: {args.scale:g}; give more than 1 and at most 8", key="scale")
    args.strength = 0.6 if args.strength is None else args.strength
    args.enlarge = args.enlarge or "pixel"
    settings.require_some(args.strength, sampling, "would only enlarge")
    width, height = settings.size(args)
    keywords = {"scale": args.scale, "enlarge": args.enlarge, "strength": args.strength}
    return Drawing(tasks.hires, keywords | {"width": width, "height": height}, (width, height), scale=args.scale)
