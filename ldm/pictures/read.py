"""Picture files -> PIL pictures and the settings in them."""

from __future__ import annotations

import contextlib
import difflib
import os
import stat
import warnings
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from ldm.errors import FileError, printable
from ldm.images import ImageWarning, to_rgb

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # most of what is dangerous in image libraries is in the other formats
MAX_PIXELS = 64_000_000  # of a picture that is read, checked before it is decoded
MAX_BYTES = 2 * 1024**3  # of a file that is read


def open_image(path: str | PathLike[str]) -> Image.Image:
    """A PNG, JPEG, WebP or BMP file as an upright RGB picture, as `to_rgb` makes it.

    Of an animation the first frame, with an ImageWarning. Raises FileError that names the file for anything missing,
    damaged, cut short, of another format, over 64 million pixels or over 2 GB.
    """
    with _file(path) as file, opened(file, path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            what = f"{printable(str(path))[-80:]}: is animated; the first of its {frames} frames is used"
            warnings.warn(what, ImageWarning, stacklevel=2)
        image.load()
        return to_rgb(image)


def open_with_alpha(path: str | PathLike[str]) -> Image.Image:
    """The same file with its transparency: upright, RGBA. Raises FileError as `open_image`, and for an opaque one."""
    with _file(path) as file, opened(file, path) as image:
        image.load()
        if not image.has_transparency_data:
            what = "has no transparency to read a mask from; give a mask that is white where to repaint"
            raise FileError(what, path=path)
        return ImageOps.exif_transpose(image).convert("RGBA")


def read_metadata(path: str | PathLike[str]) -> dict[str, str]:
    """The text chunks of a PNG by keyword: the metadata that `save` wrote. Raises FileError as `open_image` does."""
    with _file(path) as file, opened(file, path, ("PNG",)) as image:
        image.load()  # chunks may follow the pixels
        return {key: str(value) for key, value in getattr(image, "text", {}).items()}


@contextlib.contextmanager
def opened(file: BinaryIO, path: str | PathLike[str], formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """The picture in a file as Pillow opens it: its size is checked, and nothing is decoded yet.

    path  names the picture in errors
    Raises FileError for another format, more than 64 million pixels, and any fault of the decoders in the block.
    """
    try:
        with Image.open(file, formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except UnidentifiedImageError:
        what = f"is not a picture in a format that is read ({', '.join(formats)}); convert it to PNG"
        raise FileError(what, path=path) from None
    except Image.DecompressionBombError:
        raise FileError(f"has more than {MAX_PIXELS // 10**6} million pixels; scale it down", path=path) from None
    except (FileError, MemoryError):
        raise
    except Exception:  # decoders raise whatever they meet: OSError, SyntaxError, ValueError, struct.error, ...
        raise FileError("is damaged or cut short; get it again", path=path) from None


@contextlib.contextmanager
def _file(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A regular file, opened without waiting, as for a pipe. Raises FileError."""
    path = Path(path)
    try:
        _require_readable(os.stat(path), path)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise FileError(f"does not exist{_nearest(path)}", path=path) from None
    except FileError:
        raise
    except (OSError, ValueError) as error:
        raise FileError(f"cannot be opened: {getattr(error, 'strerror', None) or error}", path=path) from None
    with open(descriptor, "rb") as file:
        _require_readable(os.fstat(descriptor), path)
        yield file


def _require_readable(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "is a directory, not a picture" if stat.S_ISDIR(status.st_mode) else "is not a regular file"
        raise FileError(what, path=path)
    if status.st_size == 0:
        raise FileError("is empty (0 bytes)", path=path)
    if status.st_size > MAX_BYTES:
        raise FileError(f"has {status.st_size} bytes; the limit is {MAX_BYTES}", path=path)


def _nearest(path: Path) -> str:
    """The names most like it beside it, as the end of a message."""
    try:
        names = difflib.get_close_matches(path.name, os.listdir(path.parent), n=3)
    except OSError:
        return f"; there is no directory {printable(str(path.parent))[-60:]}"
    return f"; did you mean {' or '.join(map(printable, names))}?" if names else ""
