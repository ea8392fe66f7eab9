"""Captions from files: lines of text beside a picture, `metadata.jsonl`, `metadata.csv`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from ldm.conditioning.tokenizer import MAX_BYTES, MAX_WORD
from ldm.errors import FileError
from ldm.train.data.source import Bad

MAX_FILE = 16 * MAX_BYTES  # bytes of a file beside one picture
METADATA = ("metadata.jsonl", "metadata.csv")


def cleaned(captions: Iterable[object]) -> tuple[str, ...]:
    """Captions, stripped, without empty ones. Raises FileError for none, and for one that the tokenizer refuses."""
    kept = []
    for caption in captions:
        if not isinstance(caption, str):
            raise FileError(f"has a caption that is no text ({type(caption).__name__})")
        if text := " ".join(caption.split()):
            kept.append(text)
            if len(text.encode("utf-8", "replace")) > MAX_BYTES or max(map(len, text.split())) > MAX_WORD:
                limits = f"more than {MAX_BYTES} bytes, or with a word of more than {MAX_WORD} characters"
                raise FileError(f"has a caption of {limits}")
    if not kept:
        raise FileError("has no caption")
    return tuple(kept)


def of_lines(data: bytes) -> list[str]:
    """The lines of a file beside a picture, each a caption. Raises FileError."""
    if len(data) > MAX_FILE:
        raise FileError(f"has {len(data)} bytes of captions; the limit is {MAX_FILE}")
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise FileError("has captions that are not UTF-8") from None


def of_record(record: Mapping[str, object]) -> list[object]:
    """The captions of one record: `texts`, a list; or `text` or `caption`, one. Raises FileError where it has none."""
    if isinstance(several := record.get("texts"), list):
        return several
    for key in ("text", "caption"):
        if record.get(key) is not None:
            return [record[key]]
    raise FileError("has no caption")


def read_metadata(directory: Path) -> tuple[dict[str, tuple[str, ...]], list[Bad]]:
    """Captions from `metadata.jsonl` or `metadata.csv` in a directory; none without such a file.

    Returns {file name relative to the directory: captions}, and the lines without a usable caption. A line has
    `file_name` and `text`, `caption` or (JSON) `texts`; several lines of one picture are several captions.
    Raises FileError for a file that cannot be read as a whole, and where both exist.
    """
    found = [directory / name for name in METADATA if (directory / name).exists()]
    if not found:
        return {}, []
    if len(found) > 1:
        raise FileError("has a metadata.jsonl and a metadata.csv; keep one of them", path=directory)
    (path,) = found
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}", path=path) from None
    captions: dict[str, tuple[str, ...]] = {}
    bad = []
    for number, record in _csv(path, text) if path.suffix == ".csv" else _json_lines(path, text):
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise FileError(f"line {number} has no file_name", path=path)
        name = str(PurePosixPath(name))  # "./a.png" is "a.png"
        try:
            captions[name] = captions.get(name, ()) + cleaned(of_record(record))
        except FileError as error:
            bad.append(Bad(name, f"{error.what} ({path.name} line {number})"))
    return captions, bad


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise FileError(f"line {number} is not a JSON object", path=path)
        yield number, record


def _csv(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if "file_name" not in (reader.fieldnames or ()):
            raise FileError("has no column file_name in its first line", path=path)
        for record in reader:
            yield reader.line_num, record
    except csv.Error as error:
        raise FileError(f"line {reader.line_num} is not CSV: {error}", path=path) from None
