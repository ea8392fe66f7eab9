"""The fields of a config.json, each checked as it is read: type, range, and the options that this version knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import FileError
from weights.folders import read_json

MAX_WIDTH, MAX_LAYERS, MAX_ITEMS = 2**16, 128, 16


@dataclass(frozen=True)
class Fields:
    """The fields, and the file that errors name."""

    path: Path
    values: Mapping[str, Any]

    def error(self, field: str, what: str) -> FileError:
        """The error to raise about a field."""
        return FileError(f"{field} {what}", path=self.path, key=field)

    def inner(self, field: str) -> Fields:
        """The fields of an object inside; none where it is not there."""
        value = self.values.get(field, {})
        if not isinstance(value, dict):
            raise self.error(field, "is not an object")
        return Fields(self.path, value)

    def whole(self, field: str, default: int, limit: int = MAX_WIDTH) -> int:
        """A whole number from 1 to `limit`."""
        return self.count(field, self.values.get(field, default), limit)

    def count(self, field: str, value: Any, limit: int = MAX_WIDTH) -> int:
        """`value`, if it is a whole number from 1 to `limit`."""
        if type(value) is not int or not 1 <= value <= limit:
            raise self.error(field, f"is {str(value)[:40]}, not a whole number from 1 to {limit}")
        return value

    def dividing(self, field: str, default: int, width: int) -> int:
        """A whole number that divides `width`."""
        n = self.whole(field, default)
        if width % n:
            raise self.error(field, f"is {n}, which does not divide {width}")
        return n

    def number(self, field: str, default: float, low: float, high: float) -> float:
        """A finite number within [low, high]."""
        value = self.values.get(field, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise self.error(field, f"is {str(value)[:40]}, not a number from {low} to {high}")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        """True or false."""
        return self.one_of(field, default, (True, False))

    def one_of(self, field: str, default: Any, options: Sequence[Any]) -> Any:
        """One of a few values."""
        value = self.values.get(field, default)
        if not any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in options):
            raise self.error(field, f"is {str(value)[:40]}; this version knows {', '.join(map(str, options))}")
        return value

    def require(self, fixed: Mapping[str, Any]) -> None:
        """Refuse settings that would need another network."""
        for field, value in fixed.items():
            self.one_of(field, value, (value,))

    def list(self, field: str, default: Any, length: int | None = None) -> list[Any]:
        """A list of 1 to MAX_ITEMS, or of `length`, items; where a length is asked for, one value stands for all."""
        value = self.values.get(field, default)
        if length is not None and not isinstance(value, list):
            value = [value] * length
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_ITEMS or len(value) != (length or len(value)):
            raise self.error(field, f"is not a list of {length or f'1 to {MAX_ITEMS}'} items")
        return value

    def widths(self, field: str, default: Any) -> list[int]:
        """Widths of levels: multiples of 32, as GroupNorm wants, and of the first."""
        widths = [self.count(field, width) for width in self.list(field, default)]
        if any(width % widths[0] or width % 32 for width in widths):
            raise self.error(field, f"is {widths}, not multiples of 32 and of the first")
        return widths

    def single(self, field: str, default: Any, length: int, limit: int = MAX_WIDTH) -> int:
        """A whole number, given once or for every level the same."""
        values = {self.count(field, value, limit) for value in self.list(field, default, length)}
        if len(values) > 1:
            raise self.error(field, "differs from level to level, which this version does not know")
        return values.pop()


def component(folder: Path, name: str, kind: str | tuple[str, ...]) -> Fields:
    """The config.json of a component, whose class must have a name that begins with `kind`. No class is ever looked up."""
    fields = Fields(folder / name / "config.json", read_json(folder / name / "config.json"))
    said = fields.values.get("_class_name")
    if said is None:
        architectures = fields.values.get("architectures")
        said = architectures[0] if isinstance(architectures, list) and architectures else None
    if said is not None and not (isinstance(said, str) and said.startswith(kind)):
        raise fields.error("_class_name", f"is {str(said)[:40]}; this version knows {kind if isinstance(kind, str) else kind[0]}")
    return fields
