"""The model of a run with all that is added to it: autoencoder, LoRAs, embeddings, refiner, safety checker."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ldm import lora
from ldm.cli import terminal
from ldm.cli.files import Readers, file_hash, require_weights
from ldm.errors import ArgumentError, printable
from ldm.model import LatentDiffusion
from ldm.offload import offload
from ldm.prompts import Embedding
from ldm.safety import flagged


@dataclass(frozen=True)
class Models:
    """What was loaded."""

    model: LatentDiffusion
    refiner: LatentDiffusion | None
    checker: Callable[[Sequence[Image.Image]], list[bool]] | None  # pictures -> which of them are flagged
    facts: dict[str, str]  # the metadata of all of it


def check(args: argparse.Namespace, device: torch.device, readers: Readers) -> list[Embedding]:
    """Look at every file of weights by its header, and read the embeddings, which are small. Raises FileError or ArgumentError."""
    if args.offload and device.type == "cpu":
        raise ArgumentError("--offload: the device is the CPU, where every network rests already; leave it out")
    if args.ckpt is not None:
        require_weights("--ckpt", args.ckpt, readers)
    for option in ("vae", "refiner", "safety"):
        if (path := getattr(args, option, None)) is not None:
            require_weights(f"--{option}", path, readers)
    for path, _ in args.lora:
        readers.open_file(path).close()
    embeddings = []
    for name, path in getattr(args, "embedding", []):
        embeddings.append(readers.load_embedding(path, name))
    for one, other in itertools.combinations(embeddings, 2):
        if one.name.casefold() == other.name.casefold():
            raise ArgumentError(f"--embedding: two are called {printable(one.name)[:60]}; give one of them another name, NAME=FILE")
    return embeddings


def load(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, readers: Readers) -> Models:
    """The model, changed as the arguments say. Each LoRA is reported on stderr."""
    place = torch.device("cpu") if args.offload else device
    model = readers.load(args.ckpt, args.config, device=place, dtype=dtype, ema=args.ema, prediction=args.prediction)
    if args.vae is not None:
        model.vae = readers.load_vae(args.vae, model.config.vae, device=place, dtype=dtype)
    if args.lora:
        changes = [(readers.load_lora(path, model.config, allow_unmatched=args.allow_unmatched), scale) for path, scale in args.lora]
        for line in lora.merge(model, changes).lines:
            terminal.say(f"ldm: {line}")
    refiner = None
    if getattr(args, "refiner", None) is not None:
        refiner = readers.load(args.refiner, None, device=place, dtype=dtype)
    checker = None
    if args.safety is not None:
        checker = functools.partial(flagged, readers.load_safety(args.safety, device=device))
    if args.offload:
        offload([model, *filter(None, [refiner])], device)
    return Models(model, refiner, checker, _facts(args, model, readers))


def _facts(args: argparse.Namespace, model: LatentDiffusion, readers: Readers) -> dict[str, str]:
    """Names without their directories, and hashes, so that the same command gives the same bytes wherever the files lie."""
    path = Path(args.ckpt) if args.ckpt else readers.embedded()
    facts = {"model": path.name, "model_hash": file_hash(path), "family": model.config.name, "prediction": model.config.prediction, "dtype": str(model.dtype).removeprefix("torch.")}
    if args.ema:
        facts["ema"] = "true"
    for option in ("vae", "refiner", "safety"):
        if (given := getattr(args, option, None)) is not None:
            facts |= {option: Path(given).name, f"{option}_hash": file_hash(Path(given))}
    if args.lora:
        facts["loras"] = " ".join(f"{Path(path).name}:{scale:g}:{file_hash(Path(path))}" for path, scale in args.lora)
    if getattr(args, "embedding", []):
        facts["embeddings"] = " ".join(f"{name or Path(path).stem}={Path(path).name}:{file_hash(Path(path))}" for name, path in args.embedding)
    return facts
