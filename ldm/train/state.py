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

TENSORS, FACTS, LATEST, LOCK = "tensors.safetensors", "state.json", "LATEST", "run.lock"
LEFT = (
    "the states before it are as they were: make room or choose another disk, and start again"  # by a write that failed
)
PIECE = 1 << 24  # bytes written, read and summed at once
NAMES = {  # of the types of numbers in a .safetensors
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_STATE = re.compile(
    r"step-(\d{6,})(\.replaced)?"
)  # the second is what a newer state of the same step is about to take the place of


class Tensors(Mapping[str, Tensor]):
    """The tensors of a state, each read from the disk, to the CPU, when it is asked for."""

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
    facts: dict[str, Any]  # JSON: what is to be known besides tensors
    path: Path  # its directory

    def open(self) -> Tensors:
        """Its tensors by name."""
        return Tensors(self.path / TENSORS)


# --- write ----------------------------------------------------------------------------------------------------------


def save_state(directory: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int) -> Path:
    """Write `directory`/step-000500 and return it: tensors.safetensors, and state.json with the facts, sizes and checksums (CRC32).

    step   updates done
    facts  JSON
    keep   states that stay, this one included, at least 1; older ones are deleted last, after this one was read back from the disk

    All or nothing, whenever the process is killed: it is written and synced under a temporary name, which the next call removes, and renamed.
    LATEST, a file with the newest one's name for whoever looks into the directory, is written after that.
    Raises OutputError when the disk is full or fails; then older states are as they were, and this one is complete or not there.
    """
    path = directory / f"step-{step:06d}"
    temporary = path.with_suffix(".tmp")
    with output_errors(path, LEFT):
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(directory)
        need = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        free = shutil.disk_usage(directory).free
        if free < need:
            raise OutputError(
                f"cannot be written: it needs {need / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; make room and start again",
                path=path,
            )
        try:
            temporary.mkdir()
            told = {
                "step": step,
                "facts": dict(facts),
                "files": {TENSORS: _write(temporary / TENSORS, _safetensors(tensors))},
            }
            _write(temporary / FACTS, [_signed(told)])
            sync_directory(temporary)
            wrong = _fault(temporary, step)
            if wrong:
                raise OutputError(f"does not read back as it was written ({wrong}); check the disk", path=path)
            _put_in_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _name_latest(directory, path.name)
        _delete_older(directory, step, keep)
    return path


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a .safetensors, in pieces; one tensor at a time is copied to the CPU."""
    header: dict[str, Any] = {}
    position = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # widest first: all aligned
    for name in order:
        size = tensors[name].numel() * tensors[name].itemsize
        header[name] = {
            "dtype": NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        data = memoryview(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for i in range(0, len(data), PIECE):
            yield data[i : i + PIECE]


def _write(path: Path, pieces: Iterator[bytes | memoryview] | list[bytes]) -> dict[str, int]:
    """Write a file to the disk; its size in bytes and CRC32."""
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


def _signed(told: Mapping[str, Any]) -> bytes:
    """JSON that ends with the CRC32 of the rest of it."""
    return json.dumps({**told, "crc32": zlib.crc32(json.dumps(told).encode())}, indent=1).encode()


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename. What has the name already steps aside and stays until the new one is there."""
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


def _name_latest(directory: Path, name: str) -> None:
    """Write LATEST."""
    temporary = directory / f"{LATEST}.tmp"
    try:
        _write(temporary, [f"{name}\n".encode()])
        os.replace(temporary, directory / LATEST)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(directory)


def _delete_older(directory: Path, step: int, keep: int) -> None:
    """Delete states before `step` but for the newest that are complete. What lies ahead was passed over as damaged and is not counted."""
    kept = 0
    for path in _candidates(directory):
        if int(_STATE.fullmatch(path.name)[1]) <= step:
            whole = _fault(path, deep=False) is None
            kept += whole
            if not whole or kept > keep:
                _remove(path)


def _remove(path: Path) -> None:
    """Delete a state, under a name that is not taken for one while it goes."""
    gone = path.with_name(f"{path.name}.tmp")
    os.rename(path, gone)
    shutil.rmtree(gone)


def _sweep(directory: Path) -> None:
    """Delete what a killed process had not finished to write or to delete."""
    for path in directory.glob("step-*.tmp"):
        shutil.rmtree(path)


# --- read -----------------------------------------------------------------------------------------------------------


def latest_state(directory: Path) -> State | None:
    """The newest state whose sizes and checksums hold; None where there is none. Each newer one is passed over with a warning that says why."""
    for path in _candidates(directory):
        wrong = _fault(path)
        if wrong is None:
            told = json.loads((path / FACTS).read_text(encoding="utf-8"))
            return State(told["step"], told["facts"], path)
        warnings.warn(f"{str(path)[-80:]}: is damaged ({wrong}); the state before it is taken", stacklevel=2)
    return None


def _candidates(directory: Path) -> list[Path]:
    """States, complete or not, the newest first; one that is being replaced after the one that replaces it."""
    names = [path for path in directory.iterdir() if _STATE.fullmatch(path.name)] if directory.is_dir() else []
    return sorted(names, key=lambda path: (-int(_STATE.fullmatch(path.name)[1]), path.name))


def _fault(path: Path, step: int | None = None, deep: bool = True) -> str | None:
    """What is wrong with a state; None: nothing. Unless `deep` the numbers are not read, only counted."""
    step = int(_STATE.fullmatch(path.name)[1]) if step is None else step
    try:
        told = json.loads((path / FACTS).read_text(encoding="utf-8"))
        crc = told.pop("crc32")
        if crc != zlib.crc32(json.dumps(told).encode()) or told["step"] != step:
            return f"{FACTS} does not fit its checksum"
        for name, wanted in told["files"].items():
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
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


# --- one at a time --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def only_run(directory: Path) -> Iterator[None]:
    """While this is open no other process can train in this directory, which is made if it is not there; the lock dies with the process.

    Raises ArgumentError, naming the other's process, when there is another; OutputError where nothing can be written.
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
            raise ArgumentError(
                f"a run is under way in it (process {pid}); wait for it, stop it or choose another directory",
                path=directory,
            ) from None
        except OSError as error:
            raise OutputError(
                f"cannot be locked: {error.strerror}; choose a directory on another disk", path=directory
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
