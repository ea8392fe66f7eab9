"""`LatentDiffusion` -> `.safetensors` in the layout its family was published in, with its sizes in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ldm.model import LatentDiffusion
from weights.layout import published
from weights.metadata import CONFIG_KEY, to_json
from weights.prediction import marks
from weights.write import pending, write


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

    A model of zero terminal SNR also gets the marks by which other tools know one: the empty tensors v_pred and ztsnr.

    All or nothing: a temporary file in the same directory takes the place of `path` when it is complete and on the disk.
    Raises OutputError, also where `path` exists and `overwrite` is false.
    """
    tensors = {name: pending(tensor, dtype) for name, tensor in original_state(model).items()}
    tensors |= {mark: pending(torch.zeros(0)) for mark in marks(model.config)}
    return write(tensors, path, {"format": "pt", CONFIG_KEY: to_json(model.config), **(metadata or {})}, overwrite=overwrite)
