"""Pictures from bytes: decoded, or listed by facts that are kept. Files are refused as by `open_image`."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ldm.errors import FileError
from ldm.images import to_rgb
from ldm.pictures.read import opened
from ldm.targets import write_text
from ldm.train.data.source import Bad, Item, digest

# nanoseconds after which a file's date can be trusted: a second change within one tick of the clock keeps the date
SETTLED = 2 * 10**9
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 lie on their side
# a PNG with an orientation holds one of these, perhaps after its pixels
ORIENTED_PNG = (b"eXIf", b"rofile type exif", b"com.adobe.xmp")


def size_of(data: bytes, place: str) -> tuple[int, int]:
    """Height and width of the picture in these bytes, upright after EXIF; no pixel is decoded. Raises FileError."""
    with _opened(data, place) as image:
        width, height = image.size
        upright = image.format == "PNG" and not any(mark in data for mark in ORIENTED_PNG)  # asking would decode it
        lies = not upright and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return (width, height) if lies else (height, width)


def decoded(data: bytes, place: str) -> Image.Image:
    """The picture in these bytes, RGB and upright, of an animation the first frame. Raises FileError for `place`."""
    with _opened(data, place) as image:
        image.load()
        return to_rgb(image)


def _opened(data: bytes, place: str) -> AbstractContextManager[Image.Image]:
    if not data:
        raise FileError("is empty (0 bytes)", path=place)
    return opened(io.BytesIO(data), place)


class PictureFacts(NamedTuple):
    """What is known of a picture without decoding it."""

    size: tuple[int, int]  # height and width, upright
    fingerprint: str  # of its file's bytes


class Listing:
    """Facts of pictures by place and date, kept in a JSON file; path None: for this process only.

    A file that is damaged, or was written by other code, counts as none.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._now = time.time_ns()
        self._before = {} if path is None else _read(path)
        self._after: dict[str, list[Any]] = {}

    def facts(self, place: str, status: os.stat_result, read: Callable[[], bytes]) -> PictureFacts:
        """Those of the picture at this place in a file of this status; `read` gives its bytes. Raises FileError."""
        date = [status.st_size, status.st_mtime_ns]
        row = self._before.get(place)
        if row is None or row[:2] != date:
            data = read()
            row = [*date, *size_of(data, place), blake2b(data, digest_size=16).hexdigest()]
        if abs(self._now - status.st_mtime_ns) > SETTLED:
            self._after[place] = row
        return PictureFacts((row[2], row[3]), row[4])

    def save(self) -> None:
        """Keep the facts that were looked up since the beginning, and no others. Raises OutputError."""
        if self.path is not None and self._after != self._before:
            write_text(self.path, json.dumps(self._after))


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    kinds = [int, int, int, int, str]
    sound = isinstance(rows, dict) and all(
        isinstance(row, list) and [*map(type, row)] == kinds for row in rows.values()
    )
    return rows if sound else {}


def with_depth(picture: PictureFacts, depth: PictureFacts) -> PictureFacts:
    """Facts of a picture with its depth map. Raises FileError where shapes differ by more than 1 %: as `depth2img`."""
    (h, w), (height, width) = depth.size, picture.size
    if abs(w * height - h * width) > 0.01 * w * height:
        raise FileError(f"has a depth map of {w}x{h} pixels, another shape than its {width}x{height}")
    return PictureFacts(picture.size, digest(picture.fingerprint, depth.fingerprint))


def listed(name: str, make: Callable[[], Item]) -> Item | Bad:
    """The item, or why it is left out."""
    try:
        return make()
    except FileError as error:
        return Bad(name, error.what)
    except OSError as error:
        return Bad(name, f"cannot be opened: {error.strerror or error}")
