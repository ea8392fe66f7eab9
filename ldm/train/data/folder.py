"""A directory of pictures with captions beside them, or in one file."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from ldm.errors import FileError
from ldm.pictures.read import MAX_BYTES, open_image
from ldm.train.data.cache import Known, Listing
from ldm.train.data.captions import cleaned, of_lines, read_metadata
from ldm.train.data.decode import require_shape
from ldm.train.data.source import SUFFIXES, Bad, Item, Unusable, digest, reason

DEPTH = "depth"  # the directory of depth maps, of the pictures' relative names


def require_directory(path: Path) -> None:
    """Raises FileError for what is no directory."""
    if not path.is_dir():
        raise FileError(
            "is not a directory; give one with pictures"
            if path.exists()
            else "does not exist; give a directory of pictures",
            path=path,
        )


class Folder:
    """Pictures (PNG, JPEG, WebP, BMP) of a directory and those below it, by relative name.

    caption  said of every picture; empty: what `metadata.jsonl` or `metadata.csv` says of it, or else each line of NAME.txt beside it
    listing  file in which is kept what was found out about the pictures

    With a directory `depth` every picture has a depth map there, of its relative name and any of the endings. Hidden files are not seen.
    A picture without caption, or whose size cannot be read, is listed in `bad`. Raises FileError where nothing is left.
    """

    def __init__(self, path: str | os.PathLike[str], caption: str = "", listing: Path | None = None):
        self.path = Path(path)
        require_directory(self.path)
        names = pictures_in(self.path)
        depths = (
            {name.rpartition(".")[0]: f"{DEPTH}/{name}" for name in pictures_in(self.path / DEPTH)}
            if (self.path / DEPTH).is_dir()
            else None
        )
        names = [name for name in names if depths is None or not name.startswith(f"{DEPTH}/")]
        if not names:
            raise FileError(
                f"holds no pictures ({' '.join(SUFFIXES)}); put some there, or give another directory", path=path
            )

        said, unsaid = (None, []) if caption else read_metadata(self.path) or (None, [])
        listed = [
            Bad(name, f"is not there, but {self.path.name} says something of it")
            for name in sorted(set(said or ()) - set(names))
        ]
        self.bad = listed + unsaid
        refused = {bad.id for bad in unsaid}
        known = Listing(listing)
        with ThreadPoolExecutor(8) as pool:
            found = list(
                pool.map(
                    lambda name: _item(self.path, name, caption, said, depths, known),
                    [name for name in names if name not in refused],
                )
            )
        known.save()
        self.items = [item for item in found if isinstance(item, Item)]
        self.bad += [bad for bad in found if isinstance(bad, Bad)]
        self.has_depth = depths is not None
        self._depths = [depths[item.id.rpartition(".")[0]] for item in self.items] if self.has_depth else []
        if not self.items:
            first = self.bad[0]
            hint = (
                "; write NAME.txt beside each, a metadata.jsonl, or data.caption" if "no caption" in first.why else ""
            )
            raise FileError(f"has no picture to train on: {first.id[-60:]} {first.why[:60]}{hint}", path=path)

    def picture(self, i: int) -> Image.Image:
        """Item i, RGB and upright. Raises FileError that names it."""
        return open_image(self.path / self.items[i].id)

    def depth(self, i: int) -> Image.Image:
        """The depth map of item i, where `has_depth`. Raises FileError that names it."""
        return open_image(self.path / self._depths[i])


def pictures_in(directory: Path) -> list[str]:
    """Relative names, with /, in their order; nothing hidden."""
    names = []
    for place, below, files in os.walk(directory):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = Path(place).relative_to(directory)
        names += [
            (relative / name).as_posix()
            for name in files
            if not name.startswith(".") and name.lower().endswith(SUFFIXES)
        ]
    return sorted(names)


def _item(
    directory: Path, name: str, caption: str, said: Mapping[str, tuple[str, ...]] | None, depths: Mapping[str, str] | None, listing: Listing
) -> Item | Bad:  # fmt: skip
    path = directory / name
    try:
        if depths is not None and name.rpartition(".")[0] not in depths:
            return Bad(name, f"has no depth map in {DEPTH}/")
        captions = cleaned([caption]) if caption else (said or {}).get(name) or cleaned(_lines_beside(path))
        size, fingerprint = _known(path, listing)
        if depths is not None:
            depth = _known(directory / depths[name.rpartition(".")[0]], listing)
            require_shape(depth.size, size)
            fingerprint = digest(fingerprint, depth.fingerprint)
        return Item(name, captions, size, fingerprint)
    except Unusable as error:
        return Bad(name, str(error))
    except FileError as error:
        return Bad(name, reason(error))
    except OSError as error:
        return Bad(name, f"cannot be opened: {error.strerror or error}")


def _lines_beside(path: Path) -> list[str]:
    try:
        return of_lines(_read(path.with_suffix(".txt")))
    except FileNotFoundError:
        raise Unusable("has no caption") from None


def _known(path: Path, listing: Listing) -> Known:
    return listing.known(str(path.absolute()), path.stat(), lambda: _read(path))


def _read(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileError("is not a regular file", path=path)
    if status.st_size > MAX_BYTES:
        raise FileError(f"has {status.st_size} bytes; the limit is {MAX_BYTES}", path=path)
    return path.read_bytes()
