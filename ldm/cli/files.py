"""Files that a command is given: prompts are read, weights are looked at."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import weights
from ldm.errors import ArgumentError, FileError, printable

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
