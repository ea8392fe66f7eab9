"""The state of a run on the disk: complete, checked and the newest, or the one before it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ldm.disk import output_errors, sync_directory, write_all
from ldm.errors import ArgumentError, OutputError
from ldm.targets import require_space, write_text

TENSORS, FACTS, LATEST, LOCK = "tensors.safetensors", "state.json", "LATEST", "run.lock"
# after a write that failed
LEFT = "the states before it are as they were: make room or choose another disk, and start again"
AGAIN = "make room and start again"
PIECE = 1 << 24  # bytes written, read and summed at once
NAMES = {  # of the types of numbers in a .safetensors
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# the second form: an older state of the same step, until the newer one has taken its place
_STATE = re.compile(r"step-(\d{6,})(\.replaced)?")


class StateTensors(Mapping[str, Tensor]):
    """The tensors of a state, each read from the disk to the CPU when it is used."""

    def __init__(self, path: Path):
        self._file = safe_open(path, "pt")
        self._names = tuple(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class State:
    """A complete state."""

    step: int  # updates done
    facts: dict[str, Any]  # JSON
    path: Path  # its directory

    def open(self) -> StateTensors:
        """Its tensors by name."""
        return StateTensors(self.path / TENSORS)


def save_state(directory: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> Path:
    """Write `directory`/step-000500 and return it: tensors.safetensors, and state.json with facts, sizes and CRC32s.

    step   updates done
    facts  JSON
    keep   states that stay, this one included, at least 1; older ones are deleted last, after this one was read back

    All or nothing, whenever the process is killed: a state is written and synced under a temporary name, which the next
    call removes, and renamed. LATEST, a file with the newest state's name for people who look into the directory, is
    written after that. Raises OutputError when the disk is full or fails; then older states are as they were, and this
    one is complete or does not exist.
    """
    path = directory / f"step-{step:06d}"
    temporary = path.with_suffix(".tmp")
    with output_errors(path, LEFT):
        directory.mkdir(parents=True, exist_ok=True)
        for path_left in directory.glob("step-*.tmp"):  # which a killed process had not finished to write or delete
            shutil.rmtree(path_left)
        for path_left in directory.glob(f".{LATEST}.*.tmp"):
            path_left.unlink()
        require_space(path, sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()), AGAIN)
        try:
            temporary.mkdir()
            files = {TENSORS: _write(temporary / TENSORS, _safetensors(tensors))}
            _write(temporary / FACTS, [_signed({"step": step, "facts": dict(facts), "files": files})])
            sync_directory(temporary)
            if wrong := _fault(temporary, step):
                raise OutputError(f"does not read back as it was written ({wrong}); check the disk", path=path)
            _put_in_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        write_text(directory / LATEST, f"{path.name}\n")
        sync_directory(directory)
        _delete_older(directory, step, keep)
    return path


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a .safetensors, in pieces; one tensor at a time is copied to the CPU."""
    header: dict[str, Any] = {}
    position = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # widest first: all aligned
    for name in order:
        tensor, begin = tensors[name], position
        position += tensor.numel() * tensor.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, position]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        values = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for i in range(0, len(values), PIECE):
            yield values[i : i + PIECE].data


def _write(path: Path, pieces: Iterator[bytes | memoryview] | list[bytes]) -> dict[str, int]:
    """Write a file to the disk; return its size in bytes and CRC32."""
    size, crc = 0, 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for piece in pieces:
            size, crc = size + len(piece), zlib.crc32(piece, crc)
            write_all(descriptor, piece)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"bytes": size, "crc32": crc}


def _signed(record: Mapping[str, Any]) -> bytes:
    """JSON that ends with the CRC32 of the rest of it."""
    return json.dumps({**record, "crc32": zlib.crc32(json.dumps(record).encode())}, indent=1).encode()


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename. A state that has the name already steps aside and stays until the new one has its place."""
    aside = path.with_suffix(".replaced")
    if path.exists():
        if aside.exists():
            _remove(aside)
        os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        if aside.exists():
            os.rename(aside, path)
        raise
    sync_directory(path.parent)
    if aside.exists():
        _remove(aside)


def _delete_older(directory: Path, step: int, keep: int) -> None:
    """Delete states before `step` but the newest complete ones; damaged ones after it were passed over and are left."""
    kept = 0
    for at, path in _candidates(directory):
        if at <= step:
            whole = _fault(path, at, deep=False) is None
            kept += whole
            if not whole or kept > keep:
                _remove(path)


def _remove(path: Path) -> None:
    """Delete a state, under a name that is not taken for one while it goes."""
    gone = path.with_name(f"{path.name}.tmp")
    os.rename(path, gone)
    shutil.rmtree(gone)


def latest_state(directory: Path) -> State | None:
    """The newest state whose sizes and checksums hold, or None. A warning says why each newer one is passed over."""
    for step, path in _candidates(directory):
        if (wrong := _fault(path, step)) is None:
            record = json.loads((path / FACTS).read_text(encoding="utf-8"))
            return State(record["step"], record["facts"], path)
        warnings.warn(f"{str(path)[-80:]}: is damaged ({wrong}); the state before it is taken", stacklevel=2)
    return None


def _candidates(directory: Path) -> list[tuple[int, Path]]:
    """Steps and directories of states, complete or not, the newest first; a replaced one follows its replacement."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    found = [(int(match[1]), name) for name in names if (match := _STATE.fullmatch(name))]
    return [(step, directory / name) for step, name in sorted(found, key=lambda each: (-each[0], each[1]))]


def _fault(path: Path, step: int, deep: bool = True) -> str | None:
    """The fault of a state, or None. Unless `deep` its numbers are not read, only counted."""
    try:
        record = json.loads((path / FACTS).read_text(encoding="utf-8"))
        crc = record.pop("crc32")
        if crc != zlib.crc32(json.dumps(record).encode()) or record["step"] != step:
            return f"{FACTS} does not fit its checksum"
        for name, wanted in record["files"].items():
            if (size := (path / name).stat().st_size) != wanted["bytes"]:
                return f"{name} has {size} bytes, not {wanted['bytes']}"
            if deep and _crc(path / name) != wanted["crc32"]:
                return f"{name} does not fit its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):  # not JSON, or other JSON than ours
        return f"{FACTS} is not what was written"
    return None


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            crc = zlib.crc32(piece, crc)
    return crc


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """While this is open no other process can train in this directory, which is made; the lock ends with the process.

    Raises ArgumentError that names the other process where one trains there, OutputError where nothing can be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise OutputError(f"cannot be written to: {error.strerror}; choose another directory", path=directory) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            what = f"a run is under way in it (process {pid}); wait for it, stop it or choose another directory"
            raise ArgumentError(what, path=directory) from None
        except OSError as error:
            what = f"cannot be locked: {error.strerror}; choose a directory on another disk"
            raise OutputError(what, path=directory) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
