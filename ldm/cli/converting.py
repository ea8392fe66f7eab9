"""`ldm convert`, `ldm repair`, `ldm merge` and `ldm prune`: a file of weights made from others."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from pathlib import Path

import torch

import weights
from ldm.cli import arguments, files, terminal
from ldm.errors import printable
from ldm.targets import require_writable

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_convert(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm convert`."""
    from ldm.config import FAMILIES  # 'ldm merge' and 'ldm repair' do without

    parser.add_argument("src", metavar="SRC", help=".safetensors, .ckpt, .pt or .bin, or a diffusers folder")
    parser.add_argument(
        "dst", metavar="DST", help="a name that ends in .safetensors, .ckpt, .pt or .bin, or else a folder to be made"
    )
    numbers = parser.add_argument_group("numbers")
    numbers.add_argument(
        "--dtype",
        type=files.stored_type,
        metavar="TYPE",
        help="fp32, fp16 or bf16 (default: as they are, bit by bit)",
    )
    which = numbers.add_mutually_exclusive_group()
    which.add_argument(
        "--ema",
        dest="ema",
        action="store_true",
        default=None,
        help="the moving average of the UNet, where the file has it and the raw weights",
    )
    which.add_argument("--raw", dest="ema", action="store_false", default=None, help="the raw weights")
    what = parser.add_argument_group("what")
    what.add_argument("--prune", action="store_true", help="leave out what no picture is computed from")
    what.add_argument("--only", choices=("unet", "vae", "text"), help="that network alone, under its own names")
    what.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out keys of SRC that this regular expression matches whole; may be repeated",
    )
    what.add_argument(
        "--shard-size", type=_size, metavar="SIZE", help="bytes of a file in a folder at most, 2GB for example"
    )
    unsaid = parser.add_argument_group("what SRC does not say")
    unsaid.add_argument(
        "--config",
        metavar="NAME",
        help=f"the family: {', '.join(FAMILIES)}; of a VAE alone, the one whose latents it makes",
    )
    unsaid.add_argument("--prediction", choices=("eps", "v"), help="what the UNet predicts")
    unsaid.add_argument(
        "--variant", metavar="NAME", help="of a diffusers folder's weights, fp16 or non_ema for example"
    )
    unsaid.add_argument("--licence", metavar="TEXT", help="for the metadata (default: what SRC says)")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--manifest",
        metavar="FILE",
        help="write, as JSON, where every key of SRC went, what was done to it, and the sha256 of what was written",
    )
    out.add_argument("--overwrite", action="store_true", help="replace DST and FILE if they exist")
    out.add_argument("--debug", action="store_true", help="show where an error comes from")


def convert(args: argparse.Namespace) -> None:
    """Convert weights between .safetensors, .ckpt and diffusers folders. \
Without --dtype every number stays what it was, bit by bit."""
    with files.bytes_bar(Path(args.dst).name) as on_write:
        made = weights.convert(
            args.src, args.dst, dtype=args.dtype, ema=args.ema, prune=args.prune, only=args.only, drop=args.drop,
            shard_size=args.shard_size, config=args.config, prediction=args.prediction, variant=args.variant,
            licence=args.licence, manifest=args.manifest, overwrite=args.overwrite, on_write=on_write,
        )  # fmt: skip
    family = f" of a model of family {made.config.name}" if made.config else ""
    terminal.show(f"{printable(str(made.path))}: {made.tensors} tensors{family}, {files.shown_bytes(made.bytes)}")
    for path in made.route.files:
        if path.endswith(weights.LEFTOVERS):
            why = "the folder's networks have no place for them, the way back needs them"
            terminal.show(f"  {len(made.route.files[path])} of them in {path}: {why}")
    for why, count in Counter(made.dropped.values()).most_common():
        terminal.show(f"  {count} left out: {printable(why)}")


def _size(text: str) -> int:
    """2GB -> 2000000000."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([KMG]i?B)?", text, re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no size; write 2GB or 500MB, for example")
    return round(float(match[1]) * _UNITS[(match[2] or "").upper()])


def add_repair(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm repair`."""
    parser.add_argument("file", metavar="FILE", help="a file of weights, .safetensors or .ckpt, whatever its extension")
    parser.add_argument(
        "--out", metavar="FILE", help="what to write (default: the name of FILE with -repaired before its extension)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what is wrong, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace the file to be written if it exists")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def repair(args: argparse.Namespace) -> None:
    """Find known damage in a file of weights and write a sound file; nothing is written where nothing is wrong.

    Known are: bytes after the last tensor, text towers without text_model. in their names, doubled projections, \
damaged or missing
    position_ids, noise schedules in float16, attention of the VAE stored as matrices. \
Everything else is copied bit by bit.
    """
    with files.bytes_bar("repairing") as on_write:
        done = weights.repair(args.file, args.out, dry_run=args.dry_run, overwrite=args.overwrite, on_write=on_write)
    for line in done.lines():
        terminal.say(f"ldm: {printable(line)}")
    if done.path is not None:
        terminal.show(printable(str(done.path)))


def block_weights(text: str) -> dict[str, float] | tuple[float, ...]:
    """IN00=0.2,MID=0.5 -> {"IN00": 0.2, "MID": 0.5}; 0,0.1,0.2 -> (0.0, 0.1, 0.2)."""
    parts = [part.strip() for part in text.split(",")]
    if not any("=" in part for part in parts):
        return tuple(arguments.number(part) for part in parts)
    found: dict[str, float] = {}
    for part in parts:
        name, equals, weight = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(
                f"{part[:40]!r} is no weight of a block; write IN00=0.2,MID=0.5, or numbers alone for all blocks"
            )
        if name in found:
            raise argparse.ArgumentTypeError(f"{name[:40]} is given twice")
        found[name] = arguments.number(weight)
    return found


def add_merge(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm merge`."""
    parser.add_argument(
        "a", metavar="A", help="a model as a single file: the result has its names, and all of it that is not merged"
    )
    parser.add_argument("b", metavar="B", help="a model of the same family, as a file or a diffusers folder")
    parser.add_argument("c", metavar="C", nargs="?", help="the model that B was made from, for --method add-difference")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="what to write: .ckpt, .pt, .pth and .bin as torch does, anything else as .safetensors",
    )
    parser.add_argument("--method", choices=("weighted", "add-difference", "slerp"), default="weighted",
                        help="weighted: (1 - alpha) A + alpha B; add-difference: A + alpha (B - C); slerp: along the "
                        "arc from A to B (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--alpha",
        type=arguments.number,
        default=0.5,
        metavar="X",
        help="0 to 1; for add-difference -2 to 2 (default: %(default)s)",
    )
    parser.add_argument("--blocks", type=block_weights, metavar="NAME=X,...",
                        help="other weights for blocks: IN00 to IN11, MID, OUT00 to OUT11 (SDXL: to IN08 and OUT08), "
                        "TEXT, VAE; or as many numbers as the UNet has blocks (SD 1 and 2: 25)")  # fmt: skip
    parser.add_argument(
        "--dtype",
        type=files.stored_type,
        metavar="TYPE",
        help="fp32, fp16 or bf16, for what is merged (default: as in A); the arithmetic is in fp32",
    )
    parser.add_argument(
        "--prediction", choices=("eps", "v"), help="what the models predict, where their files do not tell"
    )
    parser.add_argument(
        "--partial", action="store_true", help="keep A's numbers where B or C lacks them, which is an error otherwise"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def merge(args: argparse.Namespace) -> None:
    """Merge two or three models of one family, parameter by parameter.

    position_ids, schedules and other bookkeeping are A's; A's moving average is left out. \
The recipe goes into the file's metadata.
    """
    with files.bytes_bar("merging") as on_write:
        done = weights.merge(
            args.a, args.b, args.out, c=args.c, method=args.method, alpha=args.alpha, blocks=args.blocks,
            dtype=args.dtype, prediction=args.prediction, partial=args.partial, overwrite=args.overwrite,
            on_write=on_write,
        )  # fmt: skip
    for line in done.lines():
        terminal.say(f"ldm: {printable(line)}")
    terminal.show(printable(str(done.path)))


def add_prune(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm prune`."""
    from ldm.changes import surgery  # the other commands here do without

    parser.add_argument("src", metavar="SRC", help="the model: .safetensors or .ckpt, or a diffusers folder")
    parser.add_argument("dst", metavar="DST", help="the file to be written, a .safetensors")
    parser.add_argument(
        "--plan",
        required=True,
        choices=surgery.PLANS,
        metavar="PLAN",
        help=f"which blocks stay: {', '.join(surgery.PLANS)}",
    )
    parser.add_argument(
        "--dtype",
        type=files.stored_type,
        default=torch.float16,
        metavar="TYPE",
        help="fp16, bf16 or fp32 (default: fp16)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def prune(args: argparse.Namespace) -> None:
    """Leave blocks out of a model's UNet: ssd-1b makes SSD-1B's blocks of SDXL's, half about half of any UNet.

    What is written draws poorly until it is distilled: 'ldm train' with method.kind = "distill" prunes by itself.
    Memory: SRC and the UNet of DST, in the type of numbers that is written.
    """
    from ldm.changes import surgery

    files.require_weights("SRC", args.src)
    require_writable(args.dst, args.overwrite)
    surgery.PLANS[args.plan](weights.config_of(args.src))  # refuses what does not fit before any weight is read
    model = weights.load(args.src, dtype=args.dtype)
    small = surgery.prune(model, args.plan)
    path = weights.save(small, args.dst, dtype=None, overwrite=args.overwrite)
    before, after = (sum(p.numel() for p in each.unet.parameters()) for each in (model, small))
    terminal.show(
        f"{printable(str(path))}: a UNet of {after / 1e6:.1f} million parameters, {after / before:.1%} of "
        f"{before / 1e6:.1f}; a model of family {small.config.name}"
    )
