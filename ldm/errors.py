"""Every error this project raises on purpose: each is an `LdmError` and the standard exception a caller would expect."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from os import PathLike

LIMIT = 200  # characters in a message: it must fit on a line or two of a terminal


def printable(text: str) -> str:
    """`text` with control, bidirectional and unpaired-surrogate characters escaped, so that no file can write to a terminal."""
    return "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else f"\\u{ord(c):04x}" for c in text
    )


class LdmError(Exception):
    """What happened, to what, what to do: one line of at most 200 characters, made of parts that can be composed anew.

    what    the message without the file's name, and without the key where it begins with that ("steps: 0; give 1 or more")
    path    the file concerned
    key     the tensor, or the argument, concerned
    remedy  what to do, where that names an argument: "choose another name or {overwrite=True}"
    `exit_code` is what the command line returns.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, path: str | PathLike[str] | None = None, key: str | None = None, remedy: str | None = None
    ):
        what = printable(what)
        self.path, self.key, self.remedy = path, key, remedy
        self.names_key = key is not None and what.startswith(f"{key}: ")
        self.what = what[len(f"{key}: ") :] if self.names_key else what
        super().__init__(self.line({}))

    def line(self, spelled: Mapping[str, str]) -> str:
        """The whole message, with arguments as `spelled` has them: {"rescale": "--cfg-rescale", "ema=False": "--raw"}."""
        place = "" if self.path is None else f"{_end(printable(str(self.path)), 80)}: "
        text = f"{spelled.get(str(self.key), self.key)}: {self.what}" if self.names_key else self.what
        if self.remedy is not None:
            text += "; " + re.sub(r"\{([^}]*)\}", lambda match: spelled.get(match[1], match[1]), self.remedy)
        return place + _short(text, LIMIT - len(place))


def _end(text: str, limit: int) -> str:
    return text if len(text) <= limit else "..." + text[3 - limit :]


def _short(what: str, limit: int) -> str:
    """At most `limit` characters of a message. A remedy, the words after its last semicolon, is kept unless it is a long list."""
    if len(what) <= limit:
        return what
    fault, mark, remedy = what.rpartition("; ")
    room = limit - len(mark) - len(remedy) - 3
    return f"{fault[:room]}...{mark}{remedy}" if mark and room >= LIMIT // 4 else what[: limit - 3] + "..."


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
