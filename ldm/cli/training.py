"""`ldm train`: the two stages that make the model that ships, from its renderer to its weights."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from ldm import shipped
from ldm.cli import arguments, machine, terminal
from ldm.cli.files import Readers
from ldm.errors import ArgumentError, printable
from ldm.model import LatentDiffusion
from ldm.train import Settings

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def add_train(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ldm train`."""
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True, parser_class=arguments.Parser)
    vae = stages.add_parser("vae", help="the autoencoder, on rendered pictures", allow_abbrev=False)
    diffusion = stages.add_parser("diffusion", help="the UNet and its text tower, on the autoencoder's latents", allow_abbrev=False)
    diffusion.add_argument("--vae", required=True, metavar="DIR", help="where 'ldm train vae' left the autoencoder")
    diffusion.add_argument("--scenes", type=arguments.whole, default=shipped.SCENES, metavar="N", help="pictures to learn from (default: %(default)s)")
    for stage, settings in ((vae, shipped.VAE_SETTINGS), (diffusion, shipped.DIFFUSION_SETTINGS)):
        stage.add_argument("--out", required=True, metavar="DIR", help="directory of the checkpoint and the log; an interrupted run found there goes on")
        stage.add_argument("--steps", type=arguments.whole, default=settings.steps, metavar="N", help="updates in all (default: %(default)s)")
        stage.add_argument("--batch", type=arguments.whole, default=settings.batch, metavar="N", help="pictures per update (default: %(default)s)")
        stage.add_argument("--lr", type=arguments.number, default=settings.lr, metavar="RATE", help="learning rate at its highest (default: %(default)s)")
        stage.add_argument("--seed", type=arguments.whole, default=settings.seed, metavar="N", help="of weights, examples and noise (default: %(default)s)")
        stage.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
        stage.add_argument("--dtype", choices=[*DTYPES], default="bfloat16", help="of the arithmetic; weights are float32 (default: %(default)s)")
        stage.add_argument("--debug", action="store_true", help="show where an error comes from")


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings of a stage with what the arguments change. Raises ArgumentError for numbers that make no sense."""
    for name, value in (("steps", args.steps), ("batch", args.batch), ("scenes", getattr(args, "scenes", 1))):
        if value < 1:
            raise ArgumentError(f"--{name}: {value}; give 1 or more")
    if not 0 < args.lr < 1:
        raise ArgumentError(f"--lr: {args.lr:g}; give more than 0 and less than 1")
    if not 0 <= args.seed < 2**32:
        raise ArgumentError(f"--seed: {args.seed}; give 0 to {2**32 - 1}")
    base = shipped.VAE_SETTINGS if args.stage == "vae" else shipped.DIFFUSION_SETTINGS
    return replace(base, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed)


def train(args: argparse.Namespace, readers: Readers) -> None:
    """Train one stage of the model that ships; the last one leaves the model in the original layout."""
    if model := run(args):
        path = readers.save(model, Path(args.out) / "model.safetensors", overwrite=True)
        terminal.show(printable(str(path)))


def run(args: argparse.Namespace) -> LatentDiffusion | None:
    """Train one stage; the model, where that stage makes one."""
    settings = settings_of(args)
    device = str(machine.device_of(args.device))
    out = Path(args.out)

    def log(record: dict[str, float]) -> None:
        if "encoded" in record:
            terminal.say(f"ldm: {record['encoded']} of {args.scenes} pictures encoded")
        else:
            terminal.say(f"ldm: step {record['step']} of {settings.steps}, loss {record['loss']:.4f}, {record['examples_per_second']:.1f} pictures/s")

    if args.stage == "vae":
        shipped.train_vae(out, settings, device=device, dtype=DTYPES[args.dtype], on_log=log)
        return None
    return shipped.train_diffusion(Path(args.vae), out, settings, scenes=args.scenes, device=device, dtype=DTYPES[args.dtype], on_log=log)
