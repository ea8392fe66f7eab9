"""What is said of a picture, from the files that say it: lines of text, `metadata.jsonl`, `metadata.csv`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from ldm.conditioning.tokenizer import MAX_BYTES, MAX_WORD
from ldm.errors import FileError
from ldm.train.data.source import Bad, Unusable

MAX_FILE = 16 * MAX_BYTES  # bytes of a file beside one picture
METADATA = ("metadata.jsonl", "metadata.csv")


def cleaned(captions: Iterable[object]) -> tuple[str, ...]:
    """Captions without the space around them and without empty ones. Raises Unusable for none, and for what the tokenizer refuses."""
    said = []
    for caption in captions:
        if not isinstance(caption, str):
            raise Unusable(f"has a caption that is no text ({type(caption).__name__})")
        if text := " ".join(caption.split()):
            said.append(text)
            if len(text.encode("utf-8", "replace")) > MAX_BYTES or max(map(len, text.split())) > MAX_WORD:
                raise Unusable(
                    f"has a caption of more than {MAX_BYTES} bytes, or with a word of more than {MAX_WORD} characters"
                )
    if not said:
        raise Unusable("has no caption")
    return tuple(said)


def of_lines(data: bytes) -> list[str]:
    """The lines of a file beside a picture, each a caption. Raises Unusable."""
    if len(data) > MAX_FILE:
        raise Unusable(f"has {len(data)} bytes of captions; the limit is {MAX_FILE}")
    try:
        return data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise Unusable("has captions that are not UTF-8") from None


def of_record(record: Mapping[str, object]) -> list[object]:
    """The captions of one record: `texts`, a list; or `text` or `caption`, one. Raises Unusable where there is none of these."""
    if isinstance(several := record.get("texts"), list):
        return several
    for key in ("text", "caption"):
        if record.get(key) is not None:
            return [record[key]]
    raise Unusable("has no caption")


def read_metadata(directory: Path) -> tuple[dict[str, tuple[str, ...]], list[Bad]] | None:
    """{file name relative to the directory: captions} of its `metadata.jsonl` or `metadata.csv`, and what is said of nothing; None without such a file.

    A line has `file_name` and `text`, `caption` or (JSON) `texts`; several lines of one picture are several captions.
    Raises FileError for a file that cannot be read as a whole, and where there are both.
    """
    there = [directory / name for name in METADATA if (directory / name).exists()]
    if not there:
        return None
    if len(there) > 1:
        raise FileError("has a metadata.jsonl and a metadata.csv; keep one of them", path=directory)
    path = there[0]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}", path=path) from None
    said: dict[str, tuple[str, ...]] = {}
    bad = []
    for number, record in _csv(path, text) if path.suffix == ".csv" else _json_lines(path, text):
        name = record.get("file_name")
        if not isinstance(name, str) or not name:
            raise FileError(f"line {number} has no file_name", path=path)
        name = str(PurePosixPath(name))  # "./a.png" is "a.png"
        try:
            said[name] = said.get(name, ()) + cleaned(of_record(record))
        except Unusable as error:
            bad.append(Bad(name, f"{error} ({path.name} line {number})"))
    return said, bad


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
