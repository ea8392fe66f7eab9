"""Pictures and captions in tar files, as the webdataset tools write them."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from ldm.errors import FileError
from ldm.pictures.read import MAX_BYTES
from ldm.train.data.captions import cleaned, of_lines, of_record
from ldm.train.data.decode import Listing, PictureFacts, decoded, listed, with_depth
from ldm.train.data.source import SUFFIXES, Bad, Item, PictureSource
from ldm.train.recipe import wrong_key

MAX_SHARDS = 100_000  # that a pattern may name
DEPTH = "depth."  # what stands before the ending of a depth map
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Member:
    """Bytes of a shard."""

    shard: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """The bytes; fewer than `length` where the shard was cut short since it was listed. Raises FileError."""
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                return file.read(self.length)
        except OSError as error:
            raise FileError(f"cannot be read: {error.strerror or error}", path=self.shard) from None


Group = Mapping[str, Member]  # the members of one name, by their endings
Row = tuple[Item | Bad, Member, Member | None]  # a picture, its bytes, and those of its depth map


class Shards(PictureSource):
    """Tar files whose members of one name belong together.

    000123.jpg is a picture, 000123.txt (each line a caption) or 000123.json (`caption`, `text` or `texts`) has its
    captions, 000123.depth.png is its depth map; where one picture has a depth map, all must have one.
    pattern  a path with ranges {000..099} and wildcards * ? [abc]; shards are taken in the order of their names
    caption  of every picture, instead of its own
    listing  file for facts about the pictures
    Members are read as bytes, nothing is unpacked. Raises FileError for a shard that is missing, compressed or
    damaged, and where no picture has a caption.
    """

    def __init__(self, pattern: str, caption: str = "", listing: Path | None = None):
        shards, known = expanded(pattern), Listing(listing)
        with ThreadPoolExecutor(8) as pool:
            opened = list(pool.map(_groups, shards))
            self.has_depth = any(_picture(group, DEPTH) for _, groups in opened for group in groups.values())

            def rows_of(shard: Path, found: tuple[os.stat_result, Mapping[str, Group]]) -> list[Row]:
                return _rows(shard, *found, caption=caption, needs_depth=self.has_depth, listing=known)

            rows = [row for some in pool.map(rows_of, shards, opened) for row in some]
        known.save()
        self.bad = [item for item, _, _ in rows if isinstance(item, Bad)]
        usable = [(item, picture, depth) for item, picture, depth in rows if isinstance(item, Item)]
        self.items = [item for item, _, _ in usable]
        self._pictures = [picture for _, picture, _ in usable]
        self._depths = [depth for _, _, depth in usable if depth is not None]  # of all of them, or of none
        if not self.items:
            why = "they hold none with a name like 000123.jpg"
            if self.bad:
                why = f"{self.bad[0].id[-60:]} {self.bad[0].why[:60]}"
            raise FileError(f"has no picture to train on: {why}; put NAME.txt or NAME.json beside each", path=pattern)

    def picture(self, i: int) -> Image.Image:
        """Item i, RGB and upright. Raises FileError that names it."""
        return decoded(self._pictures[i].read(), self.items[i].id)

    def depth(self, i: int) -> Image.Image:
        """The depth map of item i, where `has_depth`. Raises FileError that names it."""
        return decoded(self._depths[i].read(), self.items[i].id)


def expanded(pattern: str) -> list[Path]:
    """The files of a pattern. Raises ArgumentError for a falling or too long range, FileError for missing files."""
    paths = [pattern]
    while match := next(filter(None, map(_RANGE.search, paths)), None):
        first, last = int(match[1]), int(match[2])
        if first > last or (last - first + 1) * len(paths) > MAX_SHARDS:
            raise wrong_key("data.path", f"{match[0]} rises to its end, and names at most {MAX_SHARDS} files")
        names = [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
        paths = [path.replace(match[0], name, 1) for path in paths for name in names]
    found: list[Path] = []
    for path in paths:
        matching = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if not matching:
            raise FileError("does not exist; give tar files, such as shards/{000..099}.tar or shards/*.tar", path=path)
        found += map(Path, matching)
    return found


def _groups(shard: Path) -> tuple[os.stat_result, dict[str, dict[str, Member]]]:
    """The file's status, and members by key (up to the first dot of a name) and ending; the later of two counts."""
    groups: dict[str, dict[str, Member]] = {}
    try:
        status = shard.stat()
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                place, _, name = info.name.rpartition("/")
                key, dot, ending = name.partition(".")
                if info.isreg() and key and dot and not info.issparse():
                    group = groups.setdefault(f"{place}/{key}" if place else key, {})
                    group[ending.lower()] = Member(shard, info.offset_data, info.size)
            # tarfile takes a cut between members for the end
            if Member(shard, tar.offset, tarfile.BLOCKSIZE).read() != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError
    except (tarfile.TarError, EOFError, ValueError):
        what = "is damaged, cut short, compressed or no tar file; get it again, or unpack the compression"
        raise FileError(what, path=shard) from None
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror or error}", path=shard) from None
    return status, groups


def _picture(group: Group, kind: str = "") -> Member | None:
    """The picture of a group, or its depth map."""
    return next((group[kind + suffix[1:]] for suffix in SUFFIXES if kind + suffix[1:] in group), None)


def _rows(
    shard: Path,
    status: os.stat_result,
    groups: Mapping[str, Group],
    *,
    caption: str,
    needs_depth: bool,
    listing: Listing,
) -> list[Row]:
    def facts(member: Member) -> PictureFacts:
        return listing.facts(f"{shard.absolute()}:{member.offset}:{member.length}", status, member.read)

    def item(name: str, group: Group, picture: Member, depth: Member | None) -> Item:
        if needs_depth and depth is None:
            raise FileError("has no depth map, and others have")
        if picture.length > MAX_BYTES:
            raise FileError(f"has {picture.length} bytes; the limit is {MAX_BYTES}")
        texts, found = cleaned([caption] if caption else _captions(group)), facts(picture)
        return Item(name, texts, *(found if depth is None else with_depth(found, facts(depth))))

    rows: list[Row] = []
    for key, group in groups.items():
        if (picture := _picture(group)) is not None:
            name, depth = f"{shard.name}/{key}", _picture(group, DEPTH)
            rows.append((listed(name, partial(item, name, group, picture, depth)), picture, depth))
    return rows


def _captions(group: Group) -> Sequence[object]:
    if "txt" in group:
        return of_lines(group["txt"].read())
    if "json" not in group:
        raise FileError("has no caption")
    try:
        record = json.loads(group["json"].read())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise FileError("has a .json that is not a JSON object")
    return of_record(record)
