"""Files of weights at their published size that take no room: a true header, a few numbers, and holes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.models.published import manifest
from weights.files.write import NAMES

Listed = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def sparse(
    path: Path, tensors: Listed, numbers: Mapping[str, Tensor] | None = None, metadata: Mapping[str, str] | None = None
) -> Path:
    """A .safetensors with these names, shapes and types; zeros but for `numbers`."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at, places = 0, {}
    for key, (shape, dtype) in tensors.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        places[key], at = at, at + size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + at)
        for key, value in (numbers or {}).items():
            assert tuple(value.shape) == tensors[key][0]
            file.seek(8 + len(raw) + places[key])
            file.write(value.to(tensors[key][1]).numpy().tobytes())
    return path


def published(
    name: str, path: Path, numbers: Mapping[str, Tensor] | None = None, metadata: Mapping[str, str] | None = None
) -> Path:
    """A published file at its size, its position_ids as they should be."""
    listed = manifest(name)
    ids = {key: torch.arange(shape[-1])[None] for key, (shape, _) in listed.items() if key.endswith("position_ids")}
    return sparse(path, listed, {**ids, **(numbers or {})}, metadata)
