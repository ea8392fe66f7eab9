"""Every error this project raises on purpose: each is an `LdmError` and the standard exception a caller would expect."""

from __future__ import annotations

import unicodedata
from os import PathLike

LIMIT = 200  # characters in a message: it must fit on a line or two of a terminal


def printable(text: str) -> str:
    """`text` with control, bidirectional and unpaired-surrogate characters escaped, so that no file can write to a terminal."""
    return "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else f"\\u{ord(c):04x}" for c in text
    )


class LdmError(Exception):
    """What happened, to what, what to do: one line of at most 200 characters.

    `path` is the file and `key` the tensor or option concerned, where there is one. `exit_code` is what the command line returns.
    """

    exit_code = 1

    def __init__(self, what: str, *, path: str | PathLike[str] | None = None, key: str | None = None):
        self.path, self.key = path, key
        text = printable(what)
        if path is not None:
            place = printable(str(path))
            text = f"{place if len(place) <= 80 else '...' + place[-77:]}: {text}"
        super().__init__(text if len(text) <= LIMIT else text[: LIMIT - 3] + "...")


class ArgumentError(LdmError, ValueError):
    """An argument or option that cannot be honoured."""

    exit_code = 2


class FileError(LdmError, ValueError):
    """A file that is not what it should be, or is not there."""

    exit_code = 2


class AmbiguousCheckpoint(FileError):
    """Weights that fit more than one model; the message names the choices."""


class DeviceError(LdmError, RuntimeError):
    """A device that was asked for and is not there."""

    exit_code = 2


class OutputError(LdmError, OSError):
    """A result that could not be written."""

    exit_code = 3


class MemoryLimit(LdmError, RuntimeError):
    """More memory needed than there is."""

    exit_code = 4


class NonFinite(LdmError, ArithmeticError):
    """A result with NaN or infinity in it."""

    exit_code = 5
