"""The changes that training made -> a LoRA file for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch

from ldm.config import ModelConfig
from ldm.errors import ArgumentError
from ldm.lora import Changes, require_fit
from weights import lora_names
from weights.load import require_dtype
from weights.lora_sources import Dialect
from weights.lora_tools import network_facts, require_dialect
from weights.lora_write import require_held, write_lora
from weights.output import require_writable


def save_lora(
    changes: Changes, path: str | PathLike[str], config: ModelConfig, to: Dialect = "kohya", *,
    metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write a LoRA that `load_lora` and other programs read.

    changes  of `ldm.lora_layers.changes`, or any other
    config   of the model that they change
    to       "kohya": a file for kohya's scripts, A1111 and ComfyUI, that notes rank and alpha as they do; "diffusers": a file for
             `pipe.load_lora_weights`; "peft": a directory with a folder for each network
    dtype    of the factors; None: as they are. alpha keeps its value exactly
    All or nothing. Raises ArgumentError, also for changes that do not fit the config; FileError for one that the dialect has no way to
    say; OutputError, also where `path` exists and `overwrite` is false.
    """
    require_dialect(to)
    if dtype is not None:
        require_dtype(dtype)
    _require_fit(changes, config)
    require_writable(path, overwrite, directory=to == "peft")
    require_held(changes, to, config, Path(path))
    return write_lora(changes, path, to, config, network_facts(changes) | dict(metadata or {}), source=Path(path), dtype=dtype, overwrite=overwrite)


def _require_fit(changes: Changes, config: ModelConfig) -> None:
    if not changes:
        raise ArgumentError(f"{changes.name}: there is no change to save")
    shapes = lora_names.shapes(config)
    for name, change in changes.items():
        if name not in shapes:
            raise ArgumentError(f"{changes.name}: a model of family {config.name} has no parameter {name}; give the config that was trained", key=name)
        try:
            require_fit(change, shapes[name])
        except ArgumentError as fault:
            raise ArgumentError(f"{changes.name}: {name}: {fault}", key=name) from None
