"""`ldm convert`: weights in another container, layout or type of numbers."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

from ldm.cli import arguments, terminal
from ldm.cli.files import Readers
from ldm.config import FAMILIES
from ldm.errors import printable

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_convert(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm convert`."""
    parser.add_argument("src", metavar="SRC", help=".safetensors, .ckpt, .pt or .bin, or a diffusers folder")
    parser.add_argument("dst", metavar="DST", help="a name that ends in .safetensors, .ckpt, .pt or .bin, or else a folder to be made")
    numbers = parser.add_argument_group("numbers")
    numbers.add_argument("--dtype", type=arguments.stored_type, metavar="TYPE", help="fp32, fp16 or bf16 (default: as they are, bit by bit)")
    which = numbers.add_mutually_exclusive_group()
    which.add_argument("--ema", dest="ema", action="store_true", default=None, help="the moving average of the UNet, where the file has it and the raw weights")
    which.add_argument("--raw", dest="ema", action="store_false", default=None, help="the raw weights")
    what = parser.add_argument_group("what")
    what.add_argument("--prune", action="store_true", help="leave out what no picture is computed from")
    what.add_argument("--only", choices=("unet", "vae", "text"), help="that network alone, under its own names")
    what.add_argument("--drop", action="append", default=[], metavar="PATTERN", help="leave out keys of SRC that this regular expression matches whole; may be repeated")
    what.add_argument("--shard-size", type=_size, metavar="SIZE", help="bytes of a file in a folder at most, 2GB for example")
    said = parser.add_argument_group("what SRC does not say")
    said.add_argument("--config", metavar="NAME", help=f"the family: {', '.join(FAMILIES)}; of a VAE alone, the one whose latents it makes")
    said.add_argument("--prediction", choices=("eps", "v"), help="what the UNet predicts")
    said.add_argument("--variant", metavar="NAME", help="of a diffusers folder's weights, fp16 or non_ema for example")
    said.add_argument("--licence", metavar="TEXT", help="for the metadata (default: what SRC says)")
    out = parser.add_argument_group("output")
    out.add_argument("--manifest", metavar="FILE", help="write, as JSON, where every key of SRC went, what was done to it, and the sha256 of what was written")
    out.add_argument("--overwrite", action="store_true", help="replace DST and FILE if they exist")
    out.add_argument("--debug", action="store_true", help="show where an error comes from")


def convert(args: argparse.Namespace, readers: Readers) -> None:
    """Convert weights between .safetensors, .ckpt and diffusers folders. Without --dtype every number stays what it was, bit by bit."""
    with terminal.writing(Path(args.dst).name) as on_write:
        made = readers.package.convert(
            args.src, args.dst, dtype=args.dtype, ema=args.ema, prune=args.prune, only=args.only, shard_size=args.shard_size, drop=args.drop, licence=args.licence,
            config=args.config, prediction=args.prediction, variant=args.variant, manifest=args.manifest, overwrite=args.overwrite, on_write=on_write,
        )  # fmt: skip
    family = f" of a model of family {made.config.name}" if made.config else ""
    terminal.show(f"{printable(str(made.path))}: {made.tensors} tensors{family}, {arguments.shown_bytes(made.bytes)}")
    for path in made.route.files:
        if path.endswith(readers.package.LEFTOVERS):
            terminal.show(f"  {len(made.route.files[path])} of them in {path}: the folder's networks have no place for them, the way back needs them")
    for why, count in Counter(made.dropped.values()).most_common():
        terminal.show(f"  {count} left out: {printable(why)}")


def _size(text: str) -> int:
    """2GB -> 2000000000."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([KMG]i?B)?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no size; write 2GB or 500MB, for example")
    return round(float(match[1]) * _UNITS[(match[2] or "").upper()])
