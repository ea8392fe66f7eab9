"""Pictures -> files: with settings in them, numbered, all or nothing."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.disk import write_all, write_new
from ldm.targets import replacing


def save(
    image: Image.Image,
    path: str | PathLike[str] | Iterable[Path],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a PNG with `metadata` as text chunks; return its path. The same picture and metadata give the same bytes.

    path       or several of one directory, from `numbered` or `spare`: the first free one, also among processes
    metadata   in Latin-1 as tEXt, other text as UTF-8 in iTXt; a character that UTF-8 has not becomes U+FFFD
    overwrite  replace the file that is there
    All or nothing: a temporary file in the same directory gets the name once it is complete and on the disk.
    Raises OutputError, also where the path exists and `overwrite` is false.
    """
    return write_data(_png(image, metadata or {}), path, overwrite)


def numbered(directory: Path, suffix: str = "", ending: str = "png") -> Iterator[Path]:
    """Names in the directory, from the first above all its numbers on: 00001.png, 00002.png, ...

    suffix  of the names: with "-sheet", 00001-sheet.png, 00002-sheet.png, ...
    """
    pattern = re.compile(rf"(\d{{5,9}}){re.escape(suffix)}\.{ending}")
    taken = [int(match[1]) for name in os.listdir(directory) if (match := pattern.fullmatch(name))]
    return (directory / f"{n:05d}{suffix}.{ending}" for n in itertools.count(max(taken, default=0) + 1))


def spare(path: Path) -> Iterator[Path]:
    """cat.png, cat-2.png, cat-3.png, ..."""
    return itertools.chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2)))


def _png(image: Image.Image, metadata: Mapping[str, str]) -> bytes:
    info, buffer = PngInfo(), io.BytesIO()
    for key, value in metadata.items():  # Pillow makes it iTXt where Latin-1 does not do
        info.add_text(key, value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_data(data: bytes, path: str | PathLike[str] | Iterable[Path], overwrite: bool) -> Path:
    """The bytes under the first name that is free, complete or not at all."""
    names = iter([Path(path)] if isinstance(path, str | PathLike) else path)
    if not overwrite:
        return write_new(names, data)
    first = next(names)
    with replacing(first, overwrite) as descriptor:
        write_all(descriptor, data)
    return first
