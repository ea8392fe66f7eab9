"""Results that may take the place of what has their name, files or directories: whether they may; all or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from ldm.disk import OTHER_NAME, beside, output_errors, sync_directory, synced, temporary_name, write_all
from ldm.errors import OutputError

FREE = "free space, or choose another directory"
KEPT = "what was there before is as it was"  # after a write that failed


@contextlib.contextmanager
def replacing(path: str | PathLike[str], overwrite: bool) -> Iterator[int]:
    """A descriptor of a temporary file that becomes `path` if the block ends well and is removed if it does not.

    Raises OutputError where `require_writable` does, and when the disk is full or read-only.
    """
    path = Path(path)
    require_writable(path, overwrite)
    with output_errors(path, KEPT), temporary_name(path) as temporary:
        with synced(temporary) as descriptor:
            yield descriptor
        os.replace(temporary, path)
        sync_directory(path.parent)


@contextlib.contextmanager
def replacing_directory(path: str | PathLike[str], overwrite: bool) -> Iterator[Path]:
    """A new temporary directory that becomes `path` if the block ends well and is removed if it does not.

    Files in it must be synced by the code that writes them; `replacing` does. With `overwrite` an existing directory
    steps aside for the new one and is removed last. Raises OutputError as `replacing` does.
    """
    path = Path(path)
    require_writable(path, overwrite, directory=True)
    with output_errors(path, KEPT), temporary_name(path) as temporary:
        temporary.mkdir()
        yield temporary
        for folder in (*(entry for entry in temporary.rglob("*") if entry.is_dir()), temporary):
            sync_directory(folder)
        old = beside(path)
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


def write_whole(path: Path, data: bytes, remedy: str = FREE) -> None:
    """Write a file, in place of one of that name; its directory is made. Raises OutputError."""
    with output_errors(path, remedy), temporary_name(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        with synced(temporary) as descriptor:
            write_all(descriptor, data)
        os.replace(temporary, path)


def write_text(path: Path, text: str, remedy: str = FREE) -> None:
    """`write_whole` of text in UTF-8."""
    write_whole(path, text.encode(), remedy)


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
