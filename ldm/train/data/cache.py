"""Results that are kept for the next run: tensors in safetensors files, facts of pictures in a JSON file."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ldm.disk import write_text, write_whole
from ldm.errors import FileError
from ldm.train.data.decode import require_shape, size_of
from ldm.train.data.source import Bad, Item, Unusable, digest


class Cache:
    """Tensors by name in the files `directory`/`kind`-*.safetensors, each written whole or not at all.

    Several processes may read and write at once, so long as they do not write the same names.
    """

    def __init__(self, directory: Path, kind: str):
        self.directory, self.kind = directory, kind
        self.look()

    def look(self) -> None:
        """List the tensors on the disk, whichever process has written them."""
        self._pieces = {piece: _names(piece) for piece in sorted(self.directory.glob(f"{self.kind}-*.safetensors"))}
        self._where = {name: piece for piece, names in self._pieces.items() for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str) -> Tensor:
        """A tensor, on the CPU, whichever process wrote it. Raises KeyError for one that no file has."""
        if name not in self._where:
            self.look()
        with safe_open(self._where[name], "pt") as file:
            return file.get_tensor(name)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these, as one piece. Raises OutputError."""
        self._write(self.directory / f"{self.kind}-{digest(*sorted(tensors))}.safetensors", tensors)

    def keep(self, names: Collection[str]) -> None:
        """Delete every other tensor, and files that cannot be read. Raises OutputError."""
        wanted = set(names)
        for piece, held in list(self._pieces.items()):
            kept = [name for name in held if name in wanted]
            if not kept:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(piece)
                del self._pieces[piece]
            elif len(kept) < len(held):
                self._write(piece, {name: self.get(name) for name in kept})
        self._where = {name: piece for piece, held in self._pieces.items() for name in held}

    def _write(self, piece: Path, tensors: Mapping[str, Tensor]) -> None:
        write_whole(piece, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        self._pieces[piece] = list(tensors)
        self._where |= dict.fromkeys(tensors, piece)


def _names(piece: Path) -> list[str]:
    """The tensors of a file; none where it is damaged or was deleted meanwhile, so that they are made anew."""
    try:
        with safe_open(piece, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []


def weights_digest(*modules: nn.Module) -> str:
    """A digest of the names, types, shapes and values of networks' parameters."""
    h = sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            h.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()


# --- facts of pictures ----------------------------------------------------------------------------------------------

# nanoseconds after which a file's date can be trusted: a second change within one tick of the clock keeps the date
SETTLED = 2 * 10**9


class PictureFacts(NamedTuple):
    """What listing a picture finds out."""

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
        self._after: dict[str, list[Any]] = {}

    def facts(self, place: str, status: os.stat_result, read: Callable[[], bytes]) -> PictureFacts:
        """Facts of the picture at this place in a file of this status; `read` gives its bytes where they are needed.

        Raises FileError as `size_of` does.
        """
        date = [status.st_size, status.st_mtime_ns]
        row = self._before.get(place)
        if row is None or row[:2] != date:
            data = read()
            row = [*date, *size_of(data, place), blake2b(data, digest_size=16).hexdigest()]
        if abs(self._now - status.st_mtime_ns) > SETTLED:
            self._after[place] = row
        return PictureFacts((row[2], row[3]), row[4])

    def save(self) -> None:
        """Keep what was asked for since the beginning, and nothing else. Raises OutputError."""
        if self.path is not None and self._after != self._before:
            write_text(self.path, json.dumps(self._after))


def listed(
    name: str,
    captions: Callable[[], tuple[str, ...]],
    picture: Callable[[], PictureFacts],
    depth: Callable[[], PictureFacts] | None,
) -> Item | Bad:
    """A picture with its captions and its depth map, if it has one; or why it is left out."""
    try:
        texts, (size, fingerprint) = captions(), picture()
        if depth is not None:
            near = depth()
            require_shape(near.size, size)
            fingerprint = digest(fingerprint, near.fingerprint)
        return Item(name, texts, size, fingerprint)
    except Unusable as error:
        return Bad(name, str(error))
    except FileError as error:
        return Bad(name, error.what)
    except OSError as error:
        return Bad(name, f"cannot be opened: {error.strerror or error}")


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    sound = isinstance(rows, dict) and all(
        isinstance(row, list) and [type(value) for value in row] == [int, int, int, int, str] for row in rows.values()
    )
    return rows if sound else {}
