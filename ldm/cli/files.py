"""Files of prompts and of weights that a command is given or writes: what is in them, their types, sizes, progress."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import weights
from ldm.cli import terminal
from ldm.errors import ArgumentError, FileError, printable

if TYPE_CHECKING:
    import torch

MAX_PROMPTS = 16 * 2**20  # bytes of a file of prompts


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


def require_weights(option: str, path: str) -> None:
    """Raises FileError or ArgumentError unless `path` is a file of weights, or a directory like a diffusers folder."""
    if os.path.isdir(path):
        if not any((Path(path) / name).exists() for name in ("model_index.json", "config.json", "unet")):
            raise ArgumentError(
                f"{option}: {printable(path)[-80:]} is a directory without model_index.json or config.json; "
                "name a file, or a diffusers folder"
            )
        return
    weights.open_file(path).close()


def stored_type(text: str) -> torch.dtype:
    """fp16 or float16 -> torch.float16: what numbers are stored as."""
    import torch  # 'ldm COMMAND --help' does without

    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    types |= {str(dtype).removeprefix("torch."): dtype for dtype in types.values()}
    if text not in types:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is unknown; use fp32, fp16 or bf16")
    return types[text]


def shown_bytes(count: int) -> str:
    """2134567890 -> "2.13 GB", in powers of a thousand as disks are sold."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


@contextlib.contextmanager
def bytes_bar(title: str) -> Iterator[Callable[[Any], None]]:
    """What `on_write`, `on_read` or `on_hash` is to be: it moves a bar of bytes, if there is a terminal to see it."""
    with terminal.bar_of(title, unit="B", unit_scale=True) as bar:

        def on_write(written: Any) -> None:
            bar.total = written.total
            bar.update(written.done - bar.n)

        yield on_write if bar is not None else lambda written: None
