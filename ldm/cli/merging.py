"""`ldm merge`: two or three models into one."""

from __future__ import annotations

import argparse

from ldm.cli import arguments, terminal
from ldm.cli.files import Readers
from ldm.errors import printable


def block_weights(text: str) -> dict[str, float] | tuple[float, ...]:
    """IN00=0.2,MID=0.5 -> {"IN00": 0.2, "MID": 0.5}; 0,0.1,0.2 -> (0.0, 0.1, 0.2)."""
    parts = [part.strip() for part in text.split(",")]
    if not any("=" in part for part in parts):
        return tuple(arguments.number(part) for part in parts)
    found: dict[str, float] = {}
    for part in parts:
        name, equals, weight = part.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{part[:40]!r} is no weight of a block; write IN00=0.2,MID=0.5, or numbers alone for all blocks")
        if name in found:
            raise argparse.ArgumentTypeError(f"{name[:40]} is given twice")
        found[name] = arguments.number(weight)
    return found


def add_merge(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm merge`."""
    parser.add_argument("a", metavar="A", help="a model as a single file: the result has its names, and all of it that is not merged")
    parser.add_argument("b", metavar="B", help="a model of the same family, as a file or a diffusers folder")
    parser.add_argument("c", metavar="C", nargs="?", help="the model that B was made from, for --method add-difference")
    parser.add_argument("--out", required=True, metavar="FILE", help="what to write: .ckpt, .pt, .pth and .bin as torch does, anything else as .safetensors")
    parser.add_argument("--method", choices=("weighted", "add-difference", "slerp"), default="weighted",
                        help="weighted: (1 - alpha) A + alpha B; add-difference: A + alpha (B - C); slerp: along the arc from A to B (default: %(default)s)")  # fmt: skip
    parser.add_argument("--alpha", type=arguments.number, default=0.5, metavar="X", help="0 to 1; for add-difference -2 to 2 (default: %(default)s)")
    parser.add_argument("--blocks", type=block_weights, metavar="NAME=X,...", help="other weights for blocks: IN00 to IN11, MID, OUT00 to OUT11 (SDXL: to IN08 and OUT08), "
                        "TEXT, VAE; or as many numbers as the UNet has blocks (SD 1 and 2: 25)")  # fmt: skip
    parser.add_argument("--dtype", type=arguments.stored_type, metavar="TYPE", help="fp32, fp16 or bf16, for what is merged (default: as in A); the arithmetic is in fp32")
    parser.add_argument("--prediction", choices=("eps", "v"), help="what the models predict, where their files do not tell")
    parser.add_argument("--partial", action="store_true", help="keep A's numbers where B or C lacks them, which is an error otherwise")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")


def merge(args: argparse.Namespace, readers: Readers) -> None:
    """Merge two or three models of one family, parameter by parameter.

    position_ids, schedules and other bookkeeping are A's; A's moving average is left out. The recipe goes into the file's metadata.
    """
    with terminal.writing("merging") as on_write:
        done = readers.package.merge(
            args.a, args.b, args.out, c=args.c, method=args.method, alpha=args.alpha, blocks=args.blocks, dtype=args.dtype,
            prediction=args.prediction, partial=args.partial, overwrite=args.overwrite, on_write=on_write,
        )  # fmt: skip
    for line in done.lines():
        terminal.say(f"ldm: {printable(line)}")
    terminal.show(printable(str(done.path)))
