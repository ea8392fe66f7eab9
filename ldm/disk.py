"""Files that are complete on the disk before they have their names: all or nothing."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ldm.errors import OutputError

OTHER_NAME = "choose another name or {overwrite=True}"


def write_new(paths: Iterable[Path], data: bytes) -> Path:
    """Write a file under the first of the names in one directory that is free, also among processes; return its path.

    Raises OutputError where none of them is free, and for what the system refuses.
    """
    paths = iter(paths)
    first = next(paths)
    with output_errors(first), temporary_name(first) as temporary:
        with synced(temporary) as descriptor:
            write_all(descriptor, data)
        for path in itertools.chain([first], paths):
            if _takes(temporary, path):
                sync_directory(path.parent)
                return path
    raise OutputError("exists already", path=first, remedy=OTHER_NAME)


def _takes(temporary: Path, path: Path) -> bool:
    """Give the finished file its name; False if the name is taken. No other process can take it in between."""
    try:
        os.link(temporary, path)  # unlike rename, fails where the name exists
    except FileExistsError:
        return False
    except OSError:  # a file system without links: reserve the name, then replace
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        os.replace(temporary, path)
    return True


@contextlib.contextmanager
def output_errors(path: Path, remedy: str = "") -> Iterator[None]:
    """The system's errors while writing as OutputError; an OutputError or FileError stays as it is.

    remedy  ends the message: what the failed write left as it was, or what to do
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        what = f"could not be written: {error.strerror or str(error)[:80]}"
        raise OutputError(f"{what}; {remedy}" if remedy else what, path=path) from None


def beside(path: Path) -> Path:
    """A name beside `path` that nobody else takes, also on machines that share the disk."""
    return path.parent / f".{path.name[:40]}.ldm-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def temporary_name(path: Path) -> Iterator[Path]:
    """A name beside `path`; the file or directory that still has it after the block is removed."""
    temporary = beside(path)
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def synced(temporary: Path) -> Iterator[int]:
    """The descriptor of a new file, on the disk and closed after the block."""
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """All of `data`, however little the system takes at once."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
                raise
        finally:
            os.close(descriptor)
