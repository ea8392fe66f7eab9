"""`ldm prune`: a model with blocks taken out of its UNet, for a student to begin with."""

from __future__ import annotations

import argparse

import torch

import weights
from ldm.changes import surgery
from ldm.cli import files, terminal
from ldm.cli.files import require_weights
from ldm.errors import printable
from ldm.targets import require_writable


def add_prune(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm prune`."""
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

    What is written draws poorly until it is distilled: 'ldm train' with method.kind = "distill" prunes by itself. \
Memory: SRC and the UNet
    of DST, in the type of numbers that is written.
    """
    require_weights("SRC", args.src)
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
