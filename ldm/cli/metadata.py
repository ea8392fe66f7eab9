"""What a picture says of how it was made: the text chunks of its PNG.

There is no time and no path in them, so that the same command gives the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ldm.cli import arguments
from ldm.cli.options import OPTIONS, Option
from ldm.model import LatentDiffusion
from ldm.tasks.job import Sampling

MODEL = "with which model"


def of_model(args: argparse.Namespace, model: LatentDiffusion, path: Path) -> dict[str, str]:
    """The model of a run, from the file `path`, and what was added to it."""
    return {
        "model": path.name,
        "model_hash": file_hash(path),
        "family": model.config.name,
        "prediction": model.config.prediction,
        "dtype": str(model.dtype).split(".")[-1],
    } | _of_options(args, OPTIONS[MODEL])


def of_picture(
    args: argparse.Namespace, sampling: Sampling, size: tuple[int, int], model: LatentDiffusion, facts: dict[str, str]
) -> dict[str, str]:
    """All of it but the prompt and the seed. `facts`: those of the model; `size`: (width, height) before enlarging."""
    rows = [row for title, group in OPTIONS.items() if title != MODEL for row in group]
    computed = {
        "grid": sampling.grid_name(model.schedule),
        "size": f"{size[0]}x{size[1]}",
        "version": arguments.version(),
    }
    return {"task": args.command} | _of_options(args, rows) | computed | facts


def _of_options(args: argparse.Namespace, rows: Iterable[Option]) -> dict[str, str]:
    """The options of a command that have not their default, or that are kept also then; of a file its name and hash."""
    facts: dict[str, str] = {}
    for row in rows:
        if row.key is None or args.command not in row.commands.split():
            continue
        value = getattr(args, row.name)
        if value is None or (value == row.default and not row.kept):
            continue
        if row.file and row.write:
            facts[row.key] = " ".join(row.write(each, file_hash) for each in value)
        elif row.file:
            facts |= {row.key: Path(value).name, f"{row.key}_hash": file_hash(Path(value))}
        else:
            facts[row.key] = (row.write or _written)(value)
    return facts


def _written(value: Any) -> str:
    """A value as text: "karras", 0.7, true."""
    return value if isinstance(value, str) else repr(value).lower() if isinstance(value, bool) else repr(value)


def file_hash(path: Path) -> str:
    """The first 10 hexadecimal digits of a file's SHA-256, as other tools name models. A 4 GB file takes about 3 s.

    Of a folder it is that of its files of weights, one after another.
    """
    digest = hashlib.sha256()
    files = (
        sorted(file for file in path.rglob("*") if file.suffix in (".safetensors", ".bin")) if path.is_dir() else [path]
    )
    for each in files:
        with open(each, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:10]
