"""A regular file opened with care: its bytes by position, copied or mapped, and the tensors that they are."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import stat
import threading
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import FileError

# File systems on which another machine may shorten a file under a map, and the process would be killed for touching it.
REMOTE = frozenset((
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "coda", "ceph", "glusterfs", "lustre", "gpfs", "beegfs", "9p",
    "virtiofs", "vboxsf", "fuse",
))  # fmt: skip
WINDOW = 8 * 2**20  # bytes that the system is asked for at once: as many as it takes at once
CHUNK = 2**22  # bytes read at once while checking or hashing: one system call, and they fit a processor's cache
_in_turn = threading.Lock()  # files are fetched one after the other: a disk is slow in two places at once


class Source:
    """An open file, its `size` in bytes fixed at opening. Raises FileError for anything but a readable regular file."""

    def __init__(self, path: str | PathLike[str]):
        self.path = Path(path)
        if "\0" in str(path):
            raise self.error("is no file name: it has a NUL character in it; check the name")
        try:
            self._require_regular(os.stat(self.path))
            # O_NONBLOCK: a FIFO that took the file's place since would otherwise block for ever
            descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            from weights.files.refused import unreadable

            raise self.error(unreadable(self.path, error)) from None
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        status = os.fstat(descriptor)
        self._require_regular(status)
        self.size, self._mtime, self._device = status.st_size, status.st_mtime_ns, status.st_dev
        self._map: mmap.mmap | None = None
        self._position = threading.Lock()  # of the file, which threads share

    def error(self, what: str, key: str | None = None, remedy: str | None = None) -> FileError:
        """The error to raise about this file."""
        return FileError(what, path=self.path, key=key, remedy=remedy)

    def damaged(self, fault: str, key: str | None = None) -> FileError:
        """The error to raise about a file that is incomplete or was altered on its way."""
        return self.error(f"{fault}; download it again", key)

    def read(self, start: int, count: int) -> bytes:
        """Bytes [start, start + count); refused when the file ends before."""
        self._require_inside(start, count)
        with self._position, self._readable():
            self._file.seek(start)
            data = self._file.read(count)
        if len(data) < count:  # an interrupted call, or a file that shrank
            rest = bytearray(count - len(data))
            self._fill(memoryview(rest), start + len(data))
            data += rest
        return data

    def copied(self, start: int, count: int) -> Tensor:
        """The same bytes as a fresh uint8 tensor, aligned for any dtype."""
        self._require_inside(start, count)
        buffer = torch.empty(count, dtype=torch.uint8)
        if count:
            self._fill(buffer.numpy().data, start)
        return buffer

    def mapped(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """The same bytes as a tensor of `dtype` over the mapped file: they are read when used, and writes stay private.

        It is a copy where mapping is not possible, or not safe, as on file systems of other machines.
        `start` must be a multiple of the item size and `count` a positive one. Every tensor has a storage of its own.
        """
        if self._map is None:
            if is_remote(self._device, _mounts()):
                return self.copied(start, count).view(dtype)
            try:
                self._map = mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_COPY)
            except OSError:  # a file system that cannot map
                return self.copied(start, count).view(dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count // dtype.itemsize, offset=start)

    def crc32(self, start: int, count: int, room: bytearray | None = None) -> int:
        """CRC-32 of the same bytes, read through a small buffer, so that a mapped tensor need not be in memory.

        room   that buffer, for a caller who checks many: the system clears every new one
        """
        buffer, crc = memoryview(room or bytearray(min(count, CHUNK))), 0
        for at in range(start, start + count, len(buffer) or 1):
            piece = buffer[: start + count - at]
            self._fill(piece, at)
            crc = zlib.crc32(piece, crc)
        return crc

    def prefetch(self) -> None:
        """Ask the system, without waiting, for a file that it has not cached, in the order of the disk."""
        if hasattr(os, "posix_fadvise") and not _is_cached(self._file.fileno(), self.size):
            threading.Thread(target=_prefetch, args=(os.dup(self._file.fileno()), self.size), daemon=True).start()

    def require_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened: what was read of it may be half old and half new."""
        status = os.fstat(self._file.fileno())
        if (status.st_size, status.st_mtime_ns) != (self.size, self._mtime):
            raise self.error("changed while it was being read; wait until it is complete, then try again")

    def close(self) -> None:
        """Give the file back; mapped tensors stay valid."""
        self._file.close()

    def _require_inside(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.size:
            raise self.damaged(f"is truncated: bytes {start} to {start + count} of {self.size} are needed")

    def _fill(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            with self._readable():
                got = self._read_into(view[done:], start + done)
            if not got:
                raise self.damaged(f"became shorter while it was being read ({start + done} of {self.size} bytes)")
            done += got

    def _read_into(self, view: memoryview, start: int) -> int:
        """As many bytes as one call gives."""
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], start)
        with self._position:  # Windows: one thread at a time
            self._file.seek(start)
            return self._file.readinto(view)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Turn the system's errors while reading into ours: a caller who is writing would take them for its own."""
        try:
            yield
        except OSError as error:
            raise self.error(f"cannot be read: {error.strerror}; check the disk") from None

    def _require_regular(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            from weights.files.refused import irregular

            raise self.error(irregular(self.path, status.st_mode))


def _is_cached(descriptor: int, size: int) -> bool:
    """Are samples from all over the file in memory? False where the system cannot say."""
    try:
        return all(os.preadv(descriptor, [bytearray(1)], size * k // 16, os.RWF_NOWAIT) for k in range(16))
    except (OSError, AttributeError):
        return False


def _prefetch(descriptor: int, size: int) -> None:
    """Runs in a thread of its own: the system takes a few MB at a time, and the call waits while the disk is busy."""
    try:
        with _in_turn:
            for start in range(0, size, WINDOW):
                os.posix_fadvise(descriptor, start, WINDOW, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def is_remote(device: int, mounts: str) -> bool:
    """Does another machine serve the file system of this device number? `mounts` is Linux's /proc/self/mountinfo."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        place, _, system = line.partition(" - ")
        if place.split(" ")[2:3] == [number]:
            return system.split(" ")[0].split(".")[0] in REMOTE
    return False


def _mounts() -> str:
    try:
        return Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


MAX_RANK = 16
MAX_TENSORS = 50_000


@dataclass
class Record:
    """A run of bytes in the file, and its CRC-32 where the file states one."""

    start: int
    size: int
    crc: int | None = None
    users: int = 0  # tensors that are views of it
    verified: bool = False


@dataclass(frozen=True)
class Spec:
    """A tensor that has not been read: offset and strides in elements of its record."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    record: Record

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_possible(self) -> bool:
        """Does torch have strides for the shape? An empty tensor can be of a size and yet be none."""
        return math.prod(n or 1 for n in self.shape) * self.dtype.itemsize < 2**63

    @property
    def whole(self) -> bool:
        """Contiguous, and all of its record, which is nobody else's."""
        is_all = self.offset == 0 and self.numel * self.dtype.itemsize == self.record.size
        return is_all and self.record.users == 1 and self.stride == contiguous(self.shape)


@dataclass(frozen=True)
class Contents:
    """What a file of weights holds: tensors by name, and the plain facts beside them (global_step, epoch, ...)."""

    specs: Mapping[str, Spec]
    metadata: Mapping[str, str] = field(default_factory=dict)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements; a dimension of one element or none steps as if it were 1 long."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
