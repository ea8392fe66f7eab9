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
from pathlib import Path

from PIL import Image

from ldm.errors import ArgumentError, FileError
from ldm.pictures.read import MAX_BYTES
from ldm.train.data.cache import Known, Listing
from ldm.train.data.captions import cleaned, of_lines, of_record
from ldm.train.data.decode import decoded, require_shape
from ldm.train.data.source import SUFFIXES, Bad, Item, Unusable, digest, reason

MAX_SHARDS = 100_000  # that a pattern may name
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Member:
    """Bytes of a shard."""

    shard: Path
    offset: int
    length: int

    def read(self) -> bytes:
        """Fewer bytes than there should be where the shard was cut short since. Raises FileError."""
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                return file.read(self.length)
        except OSError as error:
            raise FileError(f"cannot be read: {error.strerror or error}", path=self.shard) from None


Row = tuple[Item, Member, Member | None]  # its picture and its depth map


class Shards:
    """Tar files whose members of one name belong together: 000123.jpg, and 000123.txt (each line a caption) or 000123.json (`caption`, `text` or `texts`).

    pattern  a path with ranges {000..099} and wildcards * ? [abc]; shards are taken in the order of their names
    caption  said of every picture instead
    listing  file in which is kept what was found out about the pictures
    000123.depth.png is a depth map; where there is one, all pictures must have one. Members are read as bytes, nothing is unpacked.
    Raises FileError for a shard that is missing, compressed or damaged, and where no picture has a caption.
    """

    def __init__(self, pattern: str, caption: str = "", listing: Path | None = None):
        shards, known = expanded(pattern), Listing(listing)
        with ThreadPoolExecutor(8) as pool:
            groups = list(pool.map(_groups, shards))
            self.has_depth = any(_depth_of(group) for _, there in groups for group in there.values())
            rows = list(
                pool.map(lambda shard, there: _rows(shard, *there, caption, self.has_depth, known), shards, groups)
            )
        known.save()
        self.bad = [row for some in rows for row in some if isinstance(row, Bad)]
        found = [row for some in rows for row in some if not isinstance(row, Bad)]
        self.items = [item for item, _, _ in found]
        self._pictures = [picture for _, picture, _ in found]
        self._depths = [depth for _, _, depth in found]
        if not self.items:
            why = (
                f"{self.bad[0].id[-60:]} {self.bad[0].why[:60]}"
                if self.bad
                else "they hold none with a name like 000123.jpg"
            )
            raise FileError(f"has no picture to train on: {why}; put NAME.txt or NAME.json beside each", path=pattern)

    def picture(self, i: int) -> Image.Image:
        """Item i, RGB and upright. Raises FileError that names it."""
        return decoded(self._pictures[i].read(), self.items[i].id)

    def depth(self, i: int) -> Image.Image:
        """The depth map of item i, where `has_depth`. Raises FileError that names it."""
        return decoded(self._depths[i].read(), self.items[i].id)


def expanded(pattern: str) -> list[Path]:
    """The files of a pattern. Raises ArgumentError for a range that falls or is too long, FileError for what is not there."""
    paths = [pattern]
    while any(_RANGE.search(path) for path in paths):
        match = next(m for path in paths if (m := _RANGE.search(path)))
        first, last = int(match[1]), int(match[2])
        if first > last or (last - first + 1) * len(paths) > MAX_SHARDS:
            raise ArgumentError(
                f"data.path: {match[0]} rises to its end, and names at most {MAX_SHARDS} files", key="data.path"
            )
        names = [str(n).zfill(len(match[1])) for n in range(first, last + 1)]
        paths = [
            path[: m.start()] + name + path[m.end() :]
            for path in paths
            for m in [_RANGE.search(path)]
            for name in names
        ]
    found = []
    for path in paths:
        matching = [path] if os.path.exists(path) else sorted(glob.glob(path))
        if not matching:
            raise FileError("does not exist; give tar files, such as shards/{000..099}.tar or shards/*.tar", path=path)
        found += [Path(name) for name in matching]
    return found


def _groups(shard: Path) -> tuple[os.stat_result, dict[str, dict[str, Member]]]:
    """The file's status, and {key: {ending: member}}: a member's key ends at the first dot of its name. Of two of one name the later counts, as in tar."""
    groups: dict[str, dict[str, Member]] = {}
    try:
        status = shard.stat()
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                place, _, name = info.name.rpartition("/")
                key, dot, ending = name.partition(".")
                if not (info.isreg() and key and dot) or info.issparse():
                    continue
                groups.setdefault(f"{place}/{key}" if place else key, {})[ending.lower()] = Member(
                    shard, info.offset_data, info.size
                )
            if Member(shard, tar.offset, tarfile.BLOCKSIZE).read() != bytes(
                tarfile.BLOCKSIZE
            ):  # tarfile takes a cut between members for the end
                raise tarfile.ReadError
    except (tarfile.TarError, EOFError, ValueError):
        raise FileError(
            "is damaged, cut short, compressed or no tar file; get it again, or unpack the compression", path=shard
        ) from None
    except OSError as error:
        raise FileError(f"cannot be read: {error.strerror or error}", path=shard) from None
    return status, groups


def _depth_of(group: Mapping[str, Member]) -> Member | None:
    return next((group[f"depth{suffix}"] for suffix in SUFFIXES if f"depth{suffix}" in group), None)


def _rows(
    shard: Path, status: os.stat_result, groups: Mapping[str, Mapping[str, Member]], caption: str, with_depth: bool, listing: Listing
) -> list[Bad | Row]:  # fmt: skip
    rows: list[Bad | Row] = []

    def known(member: Member) -> Known:
        return listing.known(f"{shard.absolute()}:{member.offset}:{member.length}", status, member.read)

    for key, group in groups.items():
        picture, depth = next((group[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in group), None), _depth_of(group)
        if picture is None:
            continue
        name = f"{shard.name}/{key}"
        try:
            if with_depth and depth is None:
                raise Unusable("has no depth map, and others have")
            if picture.length > MAX_BYTES:
                raise Unusable(f"has {picture.length} bytes; the limit is {MAX_BYTES}")
            captions = cleaned([caption] if caption else _said(group))
            size, fingerprint = known(picture)
            if depth:
                near = known(depth)
                require_shape(near.size, size)
                fingerprint = digest(fingerprint, near.fingerprint)
            rows.append((Item(name, captions, size, fingerprint), picture, depth))
        except Unusable as error:
            rows.append(Bad(name, str(error)))
        except FileError as error:
            rows.append(Bad(name, reason(error)))
    return rows


def _said(group: Mapping[str, Member]) -> Sequence[object]:
    if "txt" in group:
        return of_lines(group["txt"].read())
    if "json" not in group:
        raise Unusable("has no caption")
    try:
        record = json.loads(group["json"].read())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise Unusable("has a .json that is not a JSON object")
    return of_record(record)
