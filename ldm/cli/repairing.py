"""`ldm repair`: a damaged file of weights into a sound one."""

from __future__ import annotations

import argparse

from ldm.cli import terminal
from ldm.cli.files import Readers
from ldm.errors import printable


def add_repair(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm repair`."""
    parser.add_argument("file", metavar="FILE", help="a file of weights, .safetensors or .ckpt, whatever its extension")
    parser.add_argument("--out", metavar="FILE", help="what to write (default: the name of FILE with -repaired before its extension)")
    parser.add_argument("--dry-run", action="store_true", help="say what is wrong, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the file to be written if it exists")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def repair(args: argparse.Namespace, readers: Readers) -> None:
    """Find known damage in a file of weights and write a sound file; nothing is written where nothing is wrong.

    Known are: bytes after the last tensor, text towers without text_model. in their names, doubled projections, damaged or missing
    position_ids, noise schedules in float16, attention of the VAE stored as matrices. Everything else is copied bit by bit.
    """
    with terminal.writing("repairing") as on_write:
        done = readers.package.repair(args.file, args.out, dry_run=args.dry_run, overwrite=args.overwrite, on_write=on_write)
    for line in done.lines():
        terminal.say(f"ldm: {printable(line)}")
    if done.path is not None:
        terminal.show(printable(str(done.path)))
