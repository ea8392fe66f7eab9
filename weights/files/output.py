"""A file or a directory written all or nothing: complete and on the disk under its name, or not there at all."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from ldm.disk import output_errors, sync_directory
from ldm.errors import OutputError

LEFT = "what was there before is as it was"  # by a write that failed
_numbers = itertools.count()


@contextlib.contextmanager
def replacing(path: str | PathLike[str], overwrite: bool) -> Iterator[int]:
    """A descriptor of a temporary file that becomes `path` if the block ends well and is removed if it does not.

    Raises OutputError where `path` exists and `overwrite` is false, where it is no regular file, and when the disk is full or read-only.
    """
    path = Path(path)
    require_writable(path, overwrite)
    temporary = _beside(path)
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror} ({path.parent})", path=path) from None
    with output_errors(path, LEFT):
        try:
            try:
                yield descriptor
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


@contextlib.contextmanager
def replacing_directory(path: str | PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A new temporary directory that becomes `path` if the block ends well and is removed if it does not.

    Files in it must be synced by who writes them; `replacing` does. With `overwrite` an existing directory steps aside for the new one and
    is removed last. Raises OutputError as `replacing` does.
    """
    path = Path(path)
    require_writable(path, overwrite, directory=True)
    temporary = _beside(path)
    with output_errors(path, LEFT):
        try:
            temporary.mkdir()
            yield temporary
            for folder in (*(entry for entry in temporary.rglob("*") if entry.is_dir()), temporary):
                sync_directory(folder)
            _put_in_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def require_writable(path: str | PathLike[str], overwrite: bool, *, directory: bool = False) -> None:
    """Refuse a name that is taken, unless `overwrite` and by the same kind of thing, and a directory that is not there."""
    path = Path(path)
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        status = None
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot be written: {getattr(error, 'strerror', None) or error}", path=path) from None
    if status is None:
        if not path.parent.is_dir():
            raise OutputError(
                "cannot be written: the directory that it is to be in does not exist; make it first", path=path
            )
        if not os.access(path.parent, os.W_OK):
            raise OutputError("cannot be written: its directory may not be written to; choose another one", path=path)
        return
    same = stat.S_ISDIR(status.st_mode) if directory else stat.S_ISREG(status.st_mode)
    if not same:
        raise OutputError(
            f"exists and is not a {'directory' if directory else 'regular file'}; choose another name", path=path
        )
    if not overwrite:
        raise OutputError("exists already; choose another name or overwrite=True", path=path)


def require_space(path: str | PathLike[str], size: int) -> None:
    """Refuse to begin what would fill the disk: `size` bytes under this name, beside what is there."""
    free = shutil.disk_usage(Path(path).parent).free
    if free < size:
        raise OutputError(
            f"cannot be written: it needs {size / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free; choose another disk",
            path=path,
        )


def _beside(path: Path) -> Path:
    return path.parent / f".{path.name}.ldm-{os.getpid()}-{next(_numbers)}.tmp"


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename, with the old directory, if there is one, out of the way for as long as it takes."""
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
