"""Files that a command reads: pictures, prompts and weights, the last through functions that are handed in."""

from __future__ import annotations

import argparse
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.errors import ArgumentError, FileError, printable
from ldm.pictures import read

MAX_PROMPTS = 16 * 2**20  # bytes of a file of prompts


@dataclass(frozen=True)
class Readers:
    """The functions of `weights` that commands use; only the composition root knows that package."""

    load: Callable[..., Any]
    load_vae: Callable[..., Any]
    load_lora: Callable[..., Any]
    load_embedding: Callable[..., Any]
    load_safety: Callable[..., Any]
    open_file: Callable[..., Any]
    embedded: Callable[[], Path]
    save: Callable[..., Path]
    package: Any  # `weights` itself, for the commands that are about files


@dataclass(frozen=True)
class Inputs:
    """The pictures that a command begins with; None where it has no such option, or it was not given."""

    init: Image.Image | None = None
    mask: Image.Image | None = None  # with its alpha channel if that is where the mask is
    depth: Image.Image | None = None


def pictures(args: argparse.Namespace) -> Inputs:
    """The pictures that --init, --mask and --depth name. Raises FileError."""
    init, mask, depth = (getattr(args, name, None) for name in ("init", "mask", "depth"))
    alpha = getattr(args, "mask_from", None) == "alpha"
    if alpha:
        mask = mask or init
    return Inputs(
        init and read.open_image(init),
        mask and (read.open_with_alpha if alpha else read.open_image)(mask),
        depth and read.open_image(depth),
    )


def read_prompts(path: str) -> list[str]:
    """One prompt a line; blank lines, and lines that begin with #, are left out.

    Raises FileError for a file that is missing, not a regular one, over 16 MB, not UTF-8, or without a prompt.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileError("is not a regular file", path=path)
        with open(path, "rb") as file:
            data = file.read(MAX_PROMPTS + 1)
        lines = data.decode("utf-8-sig").splitlines() if len(data) <= MAX_PROMPTS else None
    except UnicodeDecodeError as error:
        raise FileError(f"is not UTF-8 text (byte {error.start}); save it as UTF-8", path=path) from None
    except FileError:
        raise
    except (OSError, ValueError) as error:
        raise FileError(f"cannot be opened: {getattr(error, 'strerror', None) or error}", path=path) from None
    if lines is None:
        raise FileError(f"has more than {MAX_PROMPTS} bytes; split it", path=path)
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise FileError("has no prompt in it; write one a line", path=path)
    return prompts


def require_weights(option: str, path: str, readers: Readers) -> None:
    """Raises FileError or ArgumentError unless there is a file of weights, by its header, or a directory that may hold a diffusers folder."""
    if os.path.isdir(path):
        if not any((Path(path) / name).exists() for name in ("model_index.json", "config.json", "unet")):
            raise ArgumentError(
                f"{option}: {printable(path)[-80:]} is a directory without model_index.json or config.json; name a file, or a diffusers folder"
            )
        return
    readers.open_file(path).close()


def file_hash(path: Path) -> str:
    """The first 10 hexadecimal digits of the SHA-256 of a file, as other tools name models; of a folder, that of its weights one after another.

    A 4 GB file takes about 3 seconds.
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
