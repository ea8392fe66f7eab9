"""Files that are complete on the disk before they have their names."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from ldm.errors import OutputError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """What `write` writes to the path that it is given, under the name `path` once it is complete and on the disk. Its directory is made.

    Raises OutputError for what the system refuses.
    """
    temporary = path.with_name(
        f".{path.name}.ldm-{os.getpid()}-{secrets.token_hex(4)}.tmp"
    )  # machines that share a disk share no numbers
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"could not be written: {getattr(error, 'strerror', None) or str(error)[:80]}; free space, or choose another directory",
            path=path,
        ) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_text(path: Path, text: str) -> None:
    """`write_whole` of text in UTF-8: a crash leaves the old file or the new one."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def output_errors(path: Path, left: str) -> Iterator[None]:
    """The system's errors while writing as OutputError that says what they left; those that are OutputErrors or FileErrors already stay as they are."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"could not be written: {error.strerror}; {left}", path=path) from None


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
