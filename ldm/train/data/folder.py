"""A directory of pictures with captions beside them, or in one file."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ldm.errors import FileError
from ldm.pictures.read import MAX_BYTES, open_image
from ldm.train.data.captions import cleaned, of_lines, read_metadata
from ldm.train.data.decode import Listing, PictureFacts, listed, with_depth
from ldm.train.data.source import SUFFIXES, Bad, Item, PictureSource

DEPTH = "depth"  # the directory of depth maps, of the pictures' relative names


def require_directory(path: Path) -> None:
    """Raises FileError for a path that is no directory."""
    if not path.exists():
        raise FileError("does not exist; give a directory of pictures", path=path)
    if not path.is_dir():
        raise FileError("is not a directory; give one with pictures", path=path)


class PictureFolder(PictureSource):
    """Pictures (PNG, JPEG, WebP, BMP) of a directory and those below it, by relative name.

    caption  of every picture; empty: those of `metadata.jsonl` or `metadata.csv`, or else the lines of NAME.txt
    listing  file for facts about the pictures

    With a directory `depth` every picture has a depth map in it, of its relative name and any of the endings. Hidden
    files are passed over. A picture without caption, or whose size cannot be read, is listed in `bad`. Raises FileError
    where nothing is left.
    """

    def __init__(self, path: str | os.PathLike[str], caption: str = "", listing: Path | None = None):
        self.path = Path(path)
        require_directory(self.path)
        names = pictures_in(self.path)
        maps = pictures_in(self.path / DEPTH) if (self.path / DEPTH).is_dir() else None
        self.has_depth = maps is not None
        if maps is not None:
            names = [name for name in names if not name.startswith(f"{DEPTH}/")]
        if not names:
            what = f"holds no pictures ({' '.join(SUFFIXES)}); put some there, or give another directory"
            raise FileError(what, path=path)

        captions, unusable = ({}, []) if caption else read_metadata(self.path)
        refused = {bad.id for bad in unusable}
        missing = f"is not there, but {self.path.name} says something of it"
        bad = [Bad(name, missing) for name in sorted(set(captions) - set(names))] + unusable
        self._depths = {_stem(name): f"{DEPTH}/{name}" for name in maps or ()}
        known = Listing(listing)

        def facts(name: str) -> PictureFacts:
            path = self.path / name
            return known.facts(str(path.absolute()), path.stat(), lambda: _read(path))

        def captions_of(name: str) -> tuple[str, ...]:
            return cleaned([caption]) if caption else captions.get(name) or cleaned(_lines_beside(self.path / name))

        def item(name: str) -> Item:
            depth = self._depths.get(_stem(name))
            if self.has_depth and depth is None:
                raise FileError(f"has no depth map in {DEPTH}/")
            texts, found = captions_of(name), facts(name)
            return Item(name, texts, *(found if depth is None else with_depth(found, facts(depth))))

        with ThreadPoolExecutor(8) as pool:
            usable = [name for name in names if name not in refused]
            rows = list(pool.map(lambda name: listed(name, lambda: item(name)), usable))
        known.save()
        self.items = [row for row in rows if isinstance(row, Item)]
        self.bad = bad + [row for row in rows if isinstance(row, Bad)]
        if not self.items:
            first, hint = self.bad[0], "; write NAME.txt beside each, a metadata.jsonl, or data.caption"
            what = f"has no picture to train on: {first.id[-60:]} {first.why[:60]}"
            raise FileError(what + hint * ("no caption" in first.why), path=path)

    def picture(self, i: int) -> Image.Image:
        """Item i, RGB and upright. Raises FileError that names it."""
        return open_image(self.path / self.items[i].id)

    def depth(self, i: int) -> Image.Image:
        """The depth map of item i, where `has_depth`. Raises FileError that names it."""
        return open_image(self.path / self._depths[_stem(self.items[i].id)])


def pictures_in(directory: Path) -> list[str]:
    """Relative names, with /, in their order; nothing hidden."""
    names = []
    for place, below, files in os.walk(directory):
        below[:] = [name for name in below if not name.startswith(".")]
        pictures = [name for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)]
        names += [(Path(place).relative_to(directory) / name).as_posix() for name in pictures]
    return sorted(names)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _lines_beside(path: Path) -> list[str]:
    try:
        return of_lines(_read(path.with_suffix(".txt")))
    except FileNotFoundError:
        raise FileError("has no caption") from None


def _read(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileError("is not a regular file", path=path)
    if status.st_size > MAX_BYTES:
        raise FileError(f"has {status.st_size} bytes; the limit is {MAX_BYTES}", path=path)
    return path.read_bytes()
