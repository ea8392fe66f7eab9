"""Every error that is raised on purpose, each also the standard exception a caller expects; checks of arguments."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from os import PathLike
from typing import Any

LIMIT = 200  # characters in a message: it must fit on a line or two of a terminal


def printable(text: str) -> str:
    """`text` with control, bidirectional and unpaired-surrogate characters escaped: no file can write to a terminal."""
    return "".join(
        c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else f"\\u{ord(c):04x}" for c in text
    )


class LdmError(Exception):
    """What happened, to what, what to do: one line of at most 200 characters, made of parts that can be composed anew.

    what    the message without the file's name, and without the key where it begins with that ("steps: 0; give 1")
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
        """The whole message, arguments spelled as in {"rescale": "--cfg-rescale", "ema=False": "--raw"}."""
        place = "" if self.path is None else f"{_end(printable(str(self.path)), 80)}: "
        text = f"{spelled.get(str(self.key), self.key)}: {self.what}" if self.names_key else self.what
        if self.remedy is not None:
            remedy = re.sub(r"\{([^}]*)\}", lambda match: spelled.get(match[1], match[1]), self.remedy)
            text = f"{text}{' ' if text.endswith(':') else '; '}{remedy}"
        return place + _short(text, LIMIT - len(place))


def _end(text: str, limit: int) -> str:
    return text if len(text) <= limit else "..." + text[3 - limit :]


def _short(what: str, limit: int) -> str:
    """At most `limit` characters. A remedy, the words after the last semicolon, is kept unless it is a long list."""
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


def require_known(name: str, value: Any, known: Collection[str]) -> None:
    """Raises ArgumentError, with the nearest match, for a value that is not among those known."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        raise ArgumentError(
            f"{name}: {str(value)[:30]!r} is unknown{f'; {near[0]}?' if near else '.'} All: {' '.join(known)}", key=name
        )


def require_whole(name: str, value: Any, low: int, high: int, why: str = "") -> int:
    """The number, if it is a whole one from `low` to `high`. Raises ArgumentError."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < low:
        raise ArgumentError(f"{name}: {value!r}; give a whole number from {low} to {high}", key=name)
    if value > high:
        raise ArgumentError(f"{name}: {value}; give at most {high}{why}", key=name)
    return int(value)


def require_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises ArgumentError for what is no finite number from `low` to `high`."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not (math.isfinite(value) and low <= value <= high):
        raise ArgumentError(f"{name}: {value!r}; give a number from {low:g} to {high:g}", key=name)
