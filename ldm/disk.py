"""Files and directories that are complete on the disk before they have their names: all or nothing."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path

from ldm.errors import OutputError

KEPT = "what was there before is as it was"  # after a write that failed
FREE = "free space, or choose another directory"
OTHER_NAME = "choose another name or {overwrite=True}"


@contextlib.contextmanager
def replacing(path: str | PathLike[str], overwrite: bool) -> Iterator[int]:
    """A descriptor of a temporary file that becomes `path` if the block ends well and is removed if it does not.

    Raises OutputError where `require_writable` does, and when the disk is full or read-only.
    """
    path = Path(path)
    require_writable(path, overwrite)
    with output_errors(path, KEPT), _temporary(path) as temporary:
        with _synced(temporary) as descriptor:
            yield descriptor
        os.replace(temporary, path)
        sync_directory(path.parent)


def write_whole(path: Path, data: bytes, remedy: str = FREE) -> None:
    """Write a file, in place of one of that name; its directory is made. Raises OutputError."""
    with output_errors(path, remedy), _temporary(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _synced(temporary) as descriptor:
            write_all(descriptor, data)
        os.replace(temporary, path)


def write_text(path: Path, text: str, remedy: str = FREE) -> None:
    """`write_whole` of text in UTF-8."""
    write_whole(path, text.encode(), remedy)


def write_new(paths: Iterable[Path], data: bytes) -> Path:
    """Write a file under the first of the names in one directory that is free, also among processes; return its path.

    Raises OutputError where none of them is free, and for what the system refuses.
    """
    paths = iter(paths)
    first = next(paths)
    with output_errors(first), _temporary(first) as temporary:
        with _synced(temporary) as descriptor:
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
def replacing_directory(path: str | PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A new temporary directory that becomes `path` if the block ends well and is removed if it does not.

    Files in it must be synced by the code that writes them; `replacing` does. With `overwrite` an existing directory
    steps aside for the new one and is removed last. Raises OutputError as `replacing` does.
    """
    path = Path(path)
    require_writable(path, overwrite, directory=True)
    with output_errors(path, KEPT), _temporary(path) as temporary:
        temporary.mkdir()
        yield temporary
        for folder in (*(entry for entry in temporary.rglob("*") if entry.is_dir()), temporary):
            sync_directory(folder)
        old = _beside(path)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, old)
            os.rename(temporary, path)
        finally:  # also where an interrupt came just after a rename
            if old.exists() and temporary.exists():
                os.rename(old, path)
            else:
                shutil.rmtree(old, ignore_errors=True)
        sync_directory(path.parent)


def require_writable(path: str | PathLike[str], overwrite: bool, *, directory: bool = False) -> None:
    """Refuse a name in no directory, and one that is taken, unless by the same kind of thing and with `overwrite`."""
    path = Path(path)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            what = "cannot be written: the directory that it is to be in does not exist; make it first"
            raise OutputError(what, path=path) from None
        if not os.access(path.parent, os.W_OK):
            what = "cannot be written: its directory may not be written to; choose another one"
            raise OutputError(what, path=path) from None
        return
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot be written: {getattr(error, 'strerror', None) or error}", path=path) from None
    if not (stat.S_ISDIR if directory else stat.S_ISREG)(mode):
        kind = "directory" if directory else "regular file"
        raise OutputError(f"exists and is not a {kind}; choose another name", path=path)
    if not overwrite:
        raise OutputError("exists already", path=path, remedy=OTHER_NAME)


def require_space(path: str | PathLike[str], size: int, remedy: str = "choose another disk") -> None:
    """Refuse to begin a file that would fill the disk: `size` bytes under this name, beside what is there."""
    free = shutil.disk_usage(Path(path).parent).free
    if free < size:
        what = f"it needs {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; {remedy}"
        raise OutputError(f"cannot be written: {what}", path=path)


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


def _beside(path: Path) -> Path:
    """A name beside `path` that nobody else takes, also on machines that share the disk."""
    return path.parent / f".{path.name[:40]}.ldm-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path`; the file or directory that still has it after the block is removed."""
    temporary = _beside(path)
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


@contextlib.contextmanager
def _synced(temporary: Path) -> Iterator[int]:
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
