"""`LatentDiffusion` -> `.safetensors` in the layout its family was published in, with its sizes in the metadata."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ldm.errors import ArgumentError, OutputError
from ldm.model import LatentDiffusion
from weights.files import DTYPES
from weights.layout import published
from weights.metadata import CONFIG_KEY, to_json

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_numbers = itertools.count()


def original_state(model: LatentDiffusion) -> dict[str, Tensor]:
    """The model's parameters under their names in the original checkpoints of its make.

    The tensors are the model's own, except where the original stores them in another form: OpenCLIP's attention and projections.
    """
    layout = published(model.config)
    gathered: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        place = layout.places(name)[0]
        gathered.setdefault(place.key, {})[place.how] = tensor.detach()
    return {key: _stored(parts) for key, parts in gathered.items()}


def _stored(parts: dict[str, Tensor]) -> Tensor:
    if "q" in parts:
        return torch.cat([parts[how] for how in ("q", "k", "v")])
    ((how, tensor),) = parts.items()
    return tensor.T.contiguous() if how == "transposed" else tensor


def save(
    model: LatentDiffusion,
    path: str | PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = torch.float16,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that `load` and other tools for its family read: original names, `dtype` (None: as they are), own metadata added.

    All or nothing: a temporary file in the same directory takes the place of `path` when it is complete and on the disk.
    Raises OutputError, also where `path` exists and `overwrite` is false.
    """
    return write(original_state(model), path, {"format": "pt", CONFIG_KEY: to_json(model.config), **(metadata or {})}, dtype=dtype, overwrite=overwrite)


def write(
    tensors: Mapping[str, Tensor],
    path: str | PathLike[str],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Path:
    """Write named tensors as `.safetensors`, converted to `dtype` one at a time. As careful as `save`."""
    path = Path(path)
    if not all(type(word) is str for pair in metadata.items() for word in pair):
        raise ArgumentError("metadata must be text: names and values", key="metadata")
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    order = sorted(tensors, key=lambda name: (-(dtype or tensors[name].dtype).itemsize, name))  # widest first: all aligned
    for name in order:
        kind = dtype or tensors[name].dtype
        size = tensors[name].numel() * kind.itemsize
        header[name] = {"dtype": _NAMES[kind], "shape": list(tensors[name].shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(path, overwrite) as descriptor:
        _write_all(descriptor, len(text).to_bytes(8, "little") + text)
        for name in order:
            _write_all(descriptor, memoryview(_converted(tensors[name], dtype, path, name).view(-1).view(torch.uint8).numpy()))
    return path


def _converted(tensor: Tensor, dtype: torch.dtype | None, path: Path, name: str) -> Tensor:
    tensor = tensor.detach()
    if dtype == torch.float16 and tensor.dtype != dtype and tensor.numel() and tensor.abs().max() > torch.finfo(dtype).max:
        raise OutputError(f"{name} has numbers too large for float16; save with dtype=torch.float32", path=path, key=name)
    return tensor.to(device="cpu", dtype=dtype or tensor.dtype).contiguous()


@contextlib.contextmanager
def _replacing(path: Path, overwrite: bool) -> Iterator[int]:
    """A descriptor of a temporary file that becomes `path` if the block ends well and is removed if it does not."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        status = None
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", path=path) from None
    if status is not None and not (stat.S_ISREG(status.st_mode) and overwrite):
        raise OutputError("exists already; choose another name or overwrite=True" if stat.S_ISREG(status.st_mode) else "exists and is not a regular file", path=path)
    temporary = path.parent / f".{path.name}.ldm-{os.getpid()}-{next(_numbers)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror} ({path.parent})", path=path) from None
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and not isinstance(error, OutputError):
            raise OutputError(f"could not be written: {error.strerror}", path=path) from None
        raise


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


def _sync_directory(directory: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
