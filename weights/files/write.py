"""Named tensors -> `.safetensors` or a torch checkpoint, one tensor in memory at a time."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.disk import write_all
from ldm.errors import ArgumentError, OutputError
from ldm.targets import replacing, require_space
from weights.files.opened import DTYPES, Tensors
from weights.files.rebuild import STORAGES
from weights.files.source import contiguous

Shape = tuple[int, ...]

NAMES = {dtype: name for name, dtype in DTYPES.items()}
TORCH_FILES = (".ckpt", ".pt", ".pth", ".bin")  # written as torch.save does; all others are written as .safetensors
ALIGNMENT = 64  # bytes, of the numbers in a torch file: as torch itself aligns them, so that they can be mapped


@dataclass(frozen=True)
class Written:
    """What a writer reports after each tensor, in the order of the file."""

    name: str
    tensor: Tensor  # as it was written
    done: int  # bytes of all tensors so far
    total: int  # bytes of all tensors of the file


OnWrite = Callable[[Written], None]
_Report = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Pending:
    """A tensor to be written: its type and shape are known, its numbers are made when its turn comes."""

    dtype: torch.dtype
    shape: Shape
    make: Callable[[], Tensor]  # on any device and in any type; cast to `dtype` when written

    @property
    def size(self) -> int:
        """In bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def guarded(files: Iterable[Tensors], on_write: OnWrite | None) -> OnWrite:
    """`on_write`, which before the result takes its name refuses sources that were written to meanwhile."""

    def progress(written: Written) -> None:
        if written.done == written.total:
            for file in files:
                file.require_unchanged()
        if on_write is not None:
            on_write(written)

    return progress


def pending(tensor: Tensor, dtype: torch.dtype | None = None) -> Pending:
    """A tensor in memory, to be written as it is or, if its numbers are floating-point ones, as `dtype`."""
    return Pending(cast(tensor.dtype, dtype), tuple(tensor.shape), lambda: tensor)


def cast(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The type that numbers of type `stored` are written in: whole numbers and truth values are never converted."""
    return wanted if wanted is not None and stored.is_floating_point else stored


def write(
    tensors: Mapping[str, Pending], path: str | PathLike[str], metadata: Mapping[str, str], *,
    overwrite: bool = False, on_write: OnWrite | None = None,
) -> Path:  # fmt: skip
    """Write a file of weights: `.safetensors`, or what torch.save writes where the name ends in one of TORCH_FILES.

    All or nothing: a temporary file beside `path` takes its place when it is complete and on the disk.
    At most one tensor is made at a time. In a torch file the tensors lie under "state_dict", the metadata beside it.
    Raises OutputError; ArgumentError for metadata that are not text.
    """
    path = Path(path)
    if not all(type(word) is str for pair in metadata.items() for word in pair):
        raise ArgumentError("metadata must be text: names and values", key="metadata")
    broken = next((word for word in (*tensors, *metadata, *metadata.values()) if _is_broken(word)), None)
    if broken is not None:
        raise OutputError(
            f"{broken[:60]} has half a character in its name, which no file can hold; drop it", path=path, key=broken
        )
    total, done = sum(entry.size for entry in tensors.values()), 0

    def report(name: str, tensor: Tensor) -> None:
        nonlocal done
        done += tensors[name].size
        if on_write is not None:
            on_write(Written(name, tensor, done, total))

    put = _torch if path.suffix.lower() in TORCH_FILES else _safetensors
    with replacing(path, overwrite) as descriptor:
        require_space(path, total)
        put(tensors, path, metadata, descriptor, report)
    return path


def _is_broken(word: str) -> bool:
    """Has it half of a surrogate pair in it, which UTF-8 cannot hold?"""
    return not word.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in word)


def _safetensors(
    tensors: Mapping[str, Pending], path: Path, metadata: Mapping[str, str], descriptor: int, report: _Report
) -> None:
    if "__metadata__" in tensors:
        raise OutputError(
            "has a tensor named __metadata__, which a .safetensors cannot hold; write a .ckpt",
            path=path,
            key="__metadata__",
        )
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # widest first: all aligned
    for name in order:
        entry = tensors[name]
        offsets = [position, position + entry.size]
        header[name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    write_all(descriptor, len(text).to_bytes(8, "little") + text)
    for name in order:
        tensor = _made(tensors[name], path, name)
        write_all(descriptor, _bytes(tensor))
        report(name, tensor)


def _made(entry: Pending, path: Path, name: str) -> Tensor:
    tensor = entry.make().detach()
    if tuple(tensor.shape) != entry.shape:
        raise AssertionError(f"{name} was announced as {entry.shape} and is {tuple(tensor.shape)}")
    made = tensor.to(device="cpu", dtype=entry.dtype).contiguous()
    narrower = made.dtype != tensor.dtype and (made.dtype == torch.float16 or tensor.dtype == torch.float64)
    if narrower and not made.isinf().equal(tensor.cpu().isinf()):
        what = str(made.dtype).removeprefix("torch.")
        wider = "float32 or bfloat16" if what == "float16" else "float64"
        raise OutputError(f"{name} has numbers too large for {what}; write {wider}", path=path, key=name)
    return made


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@dataclass
class _Run:
    """A storage of the file, to be pickled as a persistent id."""

    key: str
    entry: Pending


@dataclass
class _Stored:
    """A tensor of the file: all of its storage."""

    run: _Run

    def __reduce__(self) -> tuple[Any, ...]:
        shape = self.run.entry.shape
        return torch._utils._rebuild_tensor_v2, (self.run, 0, shape, contiguous(shape), False, OrderedDict())


class _Pickler(pickle.Pickler):
    """Writes storages as torch does: their class, the name of their file, their place and their length."""

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        if not isinstance(value, _Run):
            return None
        entry = value.entry
        return "storage", _STORAGE_TYPES[entry.dtype], value.key, "cpu", entry.size // entry.dtype.itemsize


_STORAGE_TYPES = {dtype: getattr(torch, name) for (_, name), dtype in STORAGES.items()}


def _torch(
    tensors: Mapping[str, Pending], path: Path, metadata: Mapping[str, str], descriptor: int, report: _Report
) -> None:
    runs = {name: _Run(str(i), entry) for i, (name, entry) in enumerate(tensors.items())}
    odd = next((name for name, entry in tensors.items() if entry.dtype not in _STORAGE_TYPES), None)
    if odd:
        what = f"{odd} has {tensors[odd].dtype} numbers, which this version does not write into torch files"
        raise OutputError(f"{what}; write a .safetensors", path=path, key=odd)
    if "state_dict" in metadata:
        raise ArgumentError(
            "metadata: state_dict is where a torch file keeps its tensors; leave it out", key="metadata"
        )
    text = io.BytesIO()
    _Pickler(text, protocol=2).dump(
        {**metadata, "state_dict": OrderedDict((name, _Stored(run)) for name, run in runs.items())}
    )
    with os.fdopen(os.dup(descriptor), "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("data.pkl", text.getvalue()), ("byteorder", b"little")):
            _add(archive, file, name, memoryview(data))
        for name, run in runs.items():
            tensor = _made(run.entry, path, name)
            _add(archive, file, f"data/{run.key}", _bytes(tensor))
            report(name, tensor)
        _add(archive, file, "version", memoryview(b"3\n"))


def _add(archive: zipfile.ZipFile, file: Any, name: str, data: memoryview) -> None:
    """An entry whose bytes begin at a multiple of ALIGNMENT in the file."""
    entry = zipfile.ZipInfo(f"archive/{name}")  # with zipfile's fixed date: the same tensors give the same bytes
    entry.file_size = len(data)
    wide = len(data) > zipfile.ZIP64_LIMIT // 2
    start = file.tell() + 30 + len(entry.filename) + (20 if wide else 0)
    padding = -(start + 4) % ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding  # the field in which torch pads, too
    with archive.open(entry, "w", force_zip64=wide) as out:
        out.write(data)
