"""The models of a run: on which device and in which type, with what is added to them, and whether they fit."""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import ldm.fast as fast
import weights
from ldm.cli import metadata, terminal
from ldm.cli.files import require_weights
from ldm.conditioning.prompts import Embedding
from ldm.errors import ArgumentError, DeviceError, MemoryLimit, printable
from ldm.limits import precision
from ldm.model import LatentDiffusion
from weights.models import embedded

WEIGHTS = 0.8  # share of the GPU's free memory that weights may take
ENCODERS = ("text", "vision", "depth")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Models:
    """What was loaded."""

    model: LatentDiffusion
    refiner: LatentDiffusion | None
    checker: Callable[[Sequence[Image.Image]], list[bool]] | None  # pictures -> which of them are flagged
    facts: dict[str, str]  # the metadata of all of it

    def judged(self, pictures: Sequence[Image.Image]) -> Sequence[bool | None]:
        """Which pictures the safety checker flags; None for each where there is none."""
        return [None] * len(pictures) if self.checker is None else self.checker(pictures)


def check(args: argparse.Namespace, device: torch.device) -> list[Embedding]:
    """Look at the headers of all files of weights, and read the embeddings. Raises FileError or ArgumentError."""
    if args.offload and device.type == "cpu":
        raise ArgumentError("--offload: the device is the CPU, where every network rests already; leave it out")
    if args.offload and args.fast:
        why = "with --offload weights come and go, and the readable networks run"
        raise ArgumentError(f"--fast: {why}; leave one of them out")
    for option in ("ckpt", "vae", "refiner", "safety"):
        if (path := getattr(args, option, None)) is not None:
            require_weights(f"--{option}", path)
    for path, _ in args.lora:
        weights.open_file(path).close()
    embeddings = [weights.load_embedding(path, name) for name, path in getattr(args, "embedding", [])]
    for one, other in itertools.combinations(embeddings, 2):
        if one.name.casefold() == other.name.casefold():
            word = printable(one.name)[:60]
            raise ArgumentError(f"--embedding: two are called {word}; give one of them another name, NAME=FILE")
    return embeddings


def load(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Models:
    """The model, changed as the arguments say. Each LoRA is reported on stderr."""
    how = {"ema": args.ema, "prediction": args.prediction, "variant": args.variant}
    model = weights.load(args.ckpt, args.config, dtype=dtype, **how)
    if args.vae is not None:
        model.vae = weights.load_vae(args.vae, model.config.vae, dtype=dtype)
    if args.lora:
        _add_loras(model, args)
    refiner = None
    if getattr(args, "refiner", None) is not None:
        refiner = weights.load(args.refiner, None, dtype=dtype)
    checker = None
    if args.safety is not None:
        from ldm.networks.safety import flagged

        checker = functools.partial(flagged, weights.load_safety(args.safety, device=device))
    if device.type != "cpu":
        bring([model, *filter(None, [refiner])], device, one_at_a_time=args.offload)
    facts = metadata.of_model(args, model, Path(args.ckpt) if args.ckpt else embedded())
    if fast.pays(device, dtype) if args.fast is None else args.fast:
        model, refiner = fast.optimize(model), None if refiner is None else fast.optimize(refiner)
        facts["fast"] = getattr(model.unet, "ops", fast).__name__.rpartition(".")[2]
    return Models(model, refiner, checker, facts)


def _add_loras(model: LatentDiffusion, args: argparse.Namespace) -> None:
    from ldm.changes import lora

    unmatched = args.allow_unmatched
    loras = [(weights.load_lora(path, model.config, allow_unmatched=unmatched), scale) for path, scale in args.lora]
    for line in lora.merge(model, loras).lines:
        terminal.say(f"ldm: {line}")


def bring(models: Sequence[LatentDiffusion], device: torch.device, *, one_at_a_time: bool) -> None:
    """Models from the CPU to the GPU. Where its memory is short, what encodes leaves it after use, with a warning.

    Raises MemoryLimit where that does not suffice.
    """
    from ldm.limits.offload import offload

    if one_at_a_time:
        offload(models, device)
        return
    free = free_memory(device)
    encoding = [
        network for model in models for network in (*model.text, model.vision, model.depth) if network is not None
    ]
    needed, encoders = sum(map(_size, models)), [_size(network) for network in encoding]
    short = f"{needed / 1e9:.3g} GB of weights and {(free or 0) / 1e9:.3g} GB free on the GPU"
    if free is None or needed <= WEIGHTS * free:
        for model in models:
            model.to(device)
    elif needed - sum(encoders) + max(encoders, default=0) <= WEIGHTS * free:
        warnings.warn(f"{short}: text towers leave it after encoding", stacklevel=2)
        offload(models, device, ENCODERS)
    else:
        raise MemoryLimit(f"{short}; use --offload or --device cpu")


def _size(network: nn.Module) -> int:
    """Bytes of its weights."""
    return sum(p.numel() * p.itemsize for p in network.parameters())


def device_of(name: str) -> torch.device:
    """Where to compute. Raises DeviceError rather than fall back to another device than the one asked for."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise ArgumentError(f"--device: {name[:40]!r} is unknown; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            build = f"torch {torch.__version__}" + ("" if torch.version.cuda else ", built without CUDA")
            raise DeviceError(
                f"--device: there is no {name}, {found} CUDA devices were found ({build}); use --device cpu"
            )
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The type to compute in. auto: float16 on CUDA; bfloat16 on a CPU that multiplies it in hardware, else float32."""
    if name != "auto" and name not in DTYPES:
        raise ArgumentError(f"--dtype: {name[:40]!r} is unknown; use auto, {', '.join(DTYPES)}")
    half = "float16" if device.type == "cuda" else "bfloat16" if has_bfloat16() else "float32"
    dtype = DTYPES[half if name == "auto" else name]
    if dtype == torch.float16 and device.type == "cpu":
        warnings.warn(
            "--dtype: float16 on the CPU is slow and may overflow; bfloat16 or float32 are made for it", stacklevel=2
        )
    if dtype == torch.float32 and device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # float32 was chosen for its precision, which TF32 has not
    return dtype


def has_bfloat16() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 in hardware. False where the system does not tell."""
    try:
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(found[1].split())  # x86, ARM


def check_size(model: LatentDiffusion, size: tuple[int, int], batch: int, tile: int | None = None) -> None:
    """Raises MemoryLimit for pictures that cannot fit; `tile` as in `precision.decode`: strips need half as much."""
    width, height = size
    config, copies = model.config.vae, 4 if precision.side_for(tile, height, width) is None else 2
    widest = max(config.channel_mult[:2]) * config.channels  # of the decoder, at full resolution
    needed = copies * widest * width * height * batch * model.dtype.itemsize  # input, output and what is between
    free = free_memory(model.device)
    if free is not None and needed > free:
        need = f"{width}x{height} in batches of {batch} needs about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
        raise MemoryLimit(f"{need}; use a smaller --width and --height, or --batch 1")


def warn_of_size(model: LatentDiffusion, size: tuple[int, int]) -> None:
    """Warns of a size that the model was not trained for, of what it draws from noise alone."""
    side = model.config.size
    if max(size) > 2 * side:
        drawn = f"{size[0]}x{size[1]} from a model trained at {side}x{side}"
        warnings.warn(f"{drawn}: things may appear twice; --width and --height set the size", stacklevel=2)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on the device, for a container within its limit; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    free = int(found[1]) * 1024 if found else None
    try:
        group = Path("/sys/fs/cgroup")
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no limit: the file is missing, or says "max"
        return free
    return left if free is None else min(free, left)
