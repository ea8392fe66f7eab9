"""What was found out about pictures by reading their files, so that a run that goes on need not read unchanged ones again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from ldm.data.decode import size_of
from ldm.disk import write_whole

SETTLED = 2 * 10**9  # nanoseconds after which a file's date can be trusted: a second change within one tick of the clock keeps the date


class Known(NamedTuple):
    """Of a picture."""

    size: tuple[int, int]  # height and width, upright
    fingerprint: str  # of its file's bytes


class Listing:
    """Facts by place and date, kept in a JSON file; path None: for this process only.

    A file that is damaged, or was written by other code, counts as none.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self._now = time.time_ns()
        self._before = {} if path is None else _read(path)
        self._after: dict[str, list] = {}

    def known(self, place: str, status: os.stat_result, read: Callable[[], bytes]) -> Known:
        """The picture at this place in a file of this status; `read` gives its bytes where they are needed. Raises FileError of `size_of`."""
        date = [status.st_size, status.st_mtime_ns]
        row = self._before.get(place)
        if row is None or row[:2] != date:
            data = read()
            row = [*date, *size_of(data, place), blake2b(data, digest_size=16).hexdigest()]
        if abs(self._now - status.st_mtime_ns) > SETTLED:
            self._after[place] = row
        return Known((row[2], row[3]), row[4])

    def save(self) -> None:
        """Keep what was asked for since the beginning, and nothing else. Raises OutputError."""
        if self.path is not None and self._after != self._before:
            write_whole(self.path, lambda path: path.write_text(json.dumps(self._after)))


def _read(path: Path) -> dict[str, list]:
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    sound = isinstance(rows, dict) and all(isinstance(row, list) and [type(value) for value in row] == [int, int, int, int, str] for row in rows.values())
    return rows if sound else {}
