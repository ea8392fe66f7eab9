"""`.safetensors` and `.ckpt` files, told apart by content -> named tensors that are read when asked for."""

from __future__ import annotations

import contextlib
import json
import shlex
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ldm.errors import FileError
from weights.files.source import MAX_RANK, MAX_TENSORS, Contents, Record, Source, Spec, contiguous

MAX_HEADER = 100_000_000  # bytes of a safetensors header; the format's own limit
MAX_HEADER_PARTS = 1_000_000  # commas and brackets in it: what its parsed form may cost

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Tensors(Mapping[str, Tensor]):
    """Named tensors on the disk: names and shapes are known, `[key]` reads a tensor, on the CPU in its own dtype.

    A context manager: leaving it closes the files, and tensors already read stay valid.
    """

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], sources: Iterable[Source]):
        self.path, self.specs, self.metadata, self.sources = path, dict(specs), dict(metadata), [*sources]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, key: object) -> bool:
        return key in self.specs

    def __getitem__(self, key: str) -> Tensor:
        return self.read(key)

    def read(
        self, key: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None,
        rows: slice | None = None, *, mapped: bool = True,
    ) -> Tensor:  # fmt: skip
        """The tensor, or a run of its rows, on `device` in `dtype`; at most one tensor is in memory twice.

        `mapped` false: a copy, also where nothing is converted. Its memory is free again when the tensor is let go.
        """
        stored = self.specs[key].dtype
        device, dtype = torch.device(device), dtype or stored
        as_stored = device.type == "cpu" and dtype == stored
        tensor = self.stored(key, mapped and as_stored, rows)
        return tensor if as_stored else tensor.to(device).to(dtype)

    @abstractmethod
    def stored(self, key: str, mapped: bool, rows: slice | None = None) -> Tensor:
        """The tensor, or a run of its rows, on the CPU in its own dtype; a copy unless `mapped`."""

    def read_ahead(self) -> AbstractContextManager[Callable[[], None]]:
        """All will be read soon: it is fetched, and its checksums are checked, while the block does other things.

        Gives the function that waits for the checksums. It raises FileError where one is wrong.
        """
        return contextlib.nullcontext(lambda: None)

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self.specs[key].shape

    def error(self, what: str, key: str | None = None, remedy: str | None = None) -> FileError:
        """The error to raise about this file or folder."""
        return FileError(what, path=self.path, key=key, remedy=remedy)

    def damaged(self, fault: str, key: str | None = None) -> FileError:
        """The error to raise about what is incomplete or was altered on its way."""
        return self.error(f"{fault}; download it again", key)

    def require_unchanged(self) -> None:
        """Refuse what was written to since it was opened."""
        for source in self.sources:
            source.require_unchanged()

    def close(self) -> None:
        """Give the files back; tensors already read stay valid."""
        for source in self.sources:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Weights(Tensors):
    """The tensors of one file.

    A tensor that is all of a well-aligned record is mapped: no copy, the same memory when asked for again, and writing
    to it does not change the file. Others are copied.
    """

    def __init__(self, source: Source, kind: Literal["safetensors", "zip", "stream"], contents: Contents):
        super().__init__(source.path, contents.specs, contents.metadata, [source])
        self.source, self.kind = source, kind

    @contextlib.contextmanager
    def read_ahead(self) -> Iterator[Callable[[], None]]:
        """As `Tensors.read_ahead`; several threads check."""
        self.source.prefetch()
        if any(spec.record.crc is not None for spec in self.specs.values()):
            from weights.files.checks import checking  # which torch files have

            with checking(self.source, self.specs, self._verify) as wait:
                yield wait
        else:
            yield lambda: None

    def stored(self, key: str, mapped: bool, rows: slice | None = None) -> Tensor:
        """As `Tensors.stored`. Of rows only their bytes are read, unless the tensor is spread over its record."""
        spec = self.specs[key]
        if spec.numel == 0:
            return torch.empty(spec.shape, dtype=spec.dtype)[rows or ...]
        if rows is not None:
            return self._rows(key, spec, mapped, rows)
        record, whole = spec.record, spec.whole
        if record.start % spec.dtype.itemsize == 0 and (mapped or not whole):
            flat = self.source.mapped(record.start, record.size, spec.dtype)
            self._verify(key, record, lambda: self.source.crc32(record.start, record.size))
        else:
            buffer = self.source.copied(record.start, record.size)
            self._verify(key, record, lambda: zlib.crc32(buffer.numpy().data))
            flat = buffer.view(spec.dtype)
        if whole:
            return flat.view(spec.shape)
        return flat.as_strided(spec.shape, spec.stride, spec.offset).clone(memory_format=torch.contiguous_format)

    def _rows(self, key: str, spec: Spec, mapped: bool, rows: slice) -> Tensor:
        first, last, _ = rows.indices(spec.shape[0])
        if not spec.whole:
            return self.stored(key, mapped)[first:last].clone()
        record, row = spec.record, spec.record.size // spec.shape[0]
        start, count = record.start + first * row, (last - first) * row
        self._verify(key, record, lambda: self.source.crc32(record.start, record.size))
        if mapped and start % spec.dtype.itemsize == 0:
            flat = self.source.mapped(start, count, spec.dtype)
        else:
            flat = self.source.copied(start, count).view(spec.dtype)
        return flat.view(last - first, *spec.shape[1:])

    def _verify(self, key: str, record: Record, checksum: Callable[[], int]) -> None:
        if record.crc is None or record.verified:
            return
        if checksum() != record.crc:
            raise self.damaged(f"is damaged: the checksum of {key} is wrong", key)
        record.verified = True


def is_folder(path: str | PathLike[str]) -> bool:
    """Is this a directory with a model's components in it?"""
    with contextlib.suppress(OSError, ValueError):
        return any((Path(path) / name).exists() for name in ("model_index.json", "unet")) and Path(path).is_dir()
    return False


def open_file(path: str | PathLike[str]) -> Weights:
    """Open a file of weights by its content, whatever its extension. Raises FileError for anything that is not one."""
    source = Source(path)
    try:
        kind = kind_of(source)
        if kind == "safetensors":
            return Weights(source, kind, _safetensors(source))
        if source.path.suffix.lower() == ".safetensors":  # this name promises that the file is no pickle
            raise source.error(
                "is a torch pickle file, not safetensors as its name says; rename it to .ckpt to read it as what it is"
            )
        from weights.files.torchfiles import read_stream, read_zip

        return Weights(source, kind, read_zip(source) if kind == "zip" else read_stream(source))
    except BaseException:
        source.close()
        raise


def kind_of(source: Source) -> Literal["safetensors", "zip", "stream"]:
    """What the first 4 KiB say the file is; refused by name when that is no file of weights."""
    head = source.read(0, min(source.size, 4096))
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    from weights.files import foreign  # what it costs to know all the others is spared where it is not needed

    return foreign.kind_of(source, head, MAX_HEADER)


def _safetensors(source: Source) -> Contents:
    """What the header says. The file must end with its last tensor."""
    contents, end = read_header(source)
    if end < source.size:
        name = shlex.quote(source.path.name) if len(source.path.name) <= 60 else "FILE"
        raise source.error(f"has {source.size - end} extra bytes after the last tensor; run 'ldm repair {name}'")
    return contents


def read_header(source: Source) -> tuple[Contents, int]:
    """What a safetensors header says, every number compared with the file, and the position where the last tensor ends.

    The tensors must fill the file up to there without a gap.
    """
    length = int.from_bytes(source.read(0, 8), "little")
    if not 2 <= length <= MAX_HEADER:
        raise source.damaged(f"has a header of {length} bytes, above the limit of {MAX_HEADER}")
    if 8 + length > source.size:
        raise source.damaged(f"is truncated: its header alone is {8 + length} bytes, {source.size} are there")
    raw = source.read(8, length)
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_HEADER_PARTS:
        raise source.damaged("has a header of too many parts for a model")
    try:
        header = strict_json(raw)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _Forbidden) else "it is not JSON"
        raise source.damaged(f"has a damaged header: {reason}") from None
    if not isinstance(header, dict):
        raise source.damaged("has a damaged header: it is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise source.damaged("has a damaged header: its metadata are not text", "__metadata__")
    if not header:
        raise source.damaged("holds no tensors")
    if len(header) > MAX_TENSORS:
        raise source.damaged(f"has {len(header)} tensors, above the limit of {MAX_TENSORS}")
    base = 8 + length
    specs = {key: _spec(source, key, entry, base) for key, entry in header.items()}
    position = base
    for key, spec in sorted(specs.items(), key=lambda item: (item[1].record.start, item[1].record.size)):
        if spec.record.start != position:
            fault = "overlaps another tensor" if spec.record.start < position else "has unused bytes before it"
            raise source.damaged(f"{key} {fault}", key)
        position += spec.record.size
    if position > source.size:
        raise source.damaged(f"is truncated: {source.size} bytes of {position}")
    return Contents(specs, metadata), position


def _spec(source: Source, key: str, entry: Any, base: int) -> Spec:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise source.damaged(f"has a damaged header: {key} is not a dtype, a shape and two offsets", key)
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise source.error(
            f"{key} has the dtype {str(name)[:20]}, which this version does not read; convert it to F16, BF16 or F32",
            key,
        )
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_RANK
        or any(type(n) is not int or not 0 <= n < 2**63 for n in shape)
    ):
        raise source.damaged(f"{key} has no valid shape", key)
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(n) is not int or n < 0 for n in offsets):
        raise source.damaged(f"{key} has no valid offsets", key)
    record = Record(base + offsets[0], offsets[1] - offsets[0], users=1)
    spec = Spec(dtype, tuple(shape), contiguous(tuple(shape)), 0, record)
    if not spec.is_possible:
        raise source.damaged(f"{key} has an absurd size", key)
    if spec.numel * dtype.itemsize != record.size:
        raise source.damaged(
            f"{key} is {spec.numel} numbers of {dtype.itemsize} bytes by its shape, {record.size} bytes by its place",
            key,
        )
    return spec


def strict_json(raw: bytes) -> Any:
    """JSON without doubled keys and NaN. Raises ValueError for anything else, RecursionError for deep nesting."""
    return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)


class _Forbidden(ValueError):
    """Valid JSON that these files must not hold."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        (twice, *_) = {key for key in keys if keys.count(key) > 1} if len(keys) < 5000 else {"a key"}
        raise _Forbidden(f"{twice[:80]} appears twice")
    return found


def _refuse_constant(name: str) -> None:
    raise _Forbidden(f"it holds {name}")
