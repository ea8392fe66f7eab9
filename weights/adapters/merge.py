"""A checkpoint file and LoRAs -> a checkpoint file, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ldm.changes.lora import Change, Changes, delta
from ldm.config import ModelConfig
from ldm.errors import ArgumentError, FileError
from ldm.targets import require_writable
from weights.adapters import names as lora_names
from weights.adapters.read import read_lora
from weights.adapters.write import HASHES
from weights.checkpoint import Checkpoint, described, require_dtype
from weights.files.opened import Weights, is_folder, open_file
from weights.files.write import OnWrite, Pending, cast, guarded, write

LORAS, DROPPED = "ldm.merged_loras", "ldm.dropped"  # keys of the metadata
EMA = "model_ema."
BOOKKEEPING = {"model_ema.decay", "model_ema.num_updates"}  # all that is left of an average that already is the weights

Scale = float | tuple[float, float]  # of all; or of the UNet, and of the text towers
Terms = list[tuple[Change, float]]


@dataclass(frozen=True)
class MergedFile:
    """What `merge_lora` wrote."""

    path: Path
    family: str
    parameters: tuple[str, ...]  # our names of those that were changed
    lines: tuple[str, ...]  # one per LoRA
    dropped: Mapping[str, str]  # key -> why it is not in the new file


def merge_lora(
    checkpoint: str | PathLike[str], loras: Sequence[tuple[str | PathLike[str], Scale]], dst: str | PathLike[str], *,
    model_config: ModelConfig | None = None, dtype: torch.dtype | None = None, overwrite: bool = False,
    on_write: OnWrite | None = None,
) -> MergedFile:  # fmt: skip
    """Write a checkpoint with LoRAs merged into it: the numbers that `ldm.changes.lora.merge` gives the loaded model.

    checkpoint    .safetensors or .ckpt. Every key keeps its name, layout and type; only the targets of the LoRAs change
    loras         (whatever `read_lora` reads, its scale): a number, or one for the UNet and one for the text towers
    model_config  None: found out from the checkpoint
    dtype         of the networks' tensors; None: each as it is. Noise schedules and position_ids keep their types
    Changes are computed from the weights as they were and summed in float32, then rounded once. A moving average of
    changed weights (`model_ema.*`) is left out, as it would no longer be theirs. Raises FileError, ArgumentError,
    OutputError.
    """
    if not loras:
        raise ArgumentError("no LoRA was named; name at least one", key="loras")
    for path, scale in loras:
        _require_scale(path, scale)
    if dtype is not None:
        require_dtype(dtype)
    require_writable(dst, overwrite)
    if is_folder(checkpoint):
        raise FileError(
            "is a diffusers folder; make it one file first with 'ldm convert', or load the LoRA beside it",
            path=checkpoint,
        )
    with open_file(checkpoint) as file:
        model = described(file, model_config)
        config = model.config
        sources = [(read_lora(path, config).changes, _pair(scale)) for path, scale in loras]
        terms = _terms(sources)
        changed = _changed(model, terms)
        dropped = _dropped(file, changed)
        makers = {key: partial(_tensor, model, key, terms if key in changed else None) for key in file}
        tensors = {
            key: Pending(_dtype(model, key, dtype), file.shape(key), make)
            for key, make in makers.items()
            if key not in dropped
        }
        metadata = _metadata(file.metadata, loras, dropped)
        written = write(tensors, dst, metadata, overwrite=overwrite, on_write=guarded([file], on_write))
    lines = tuple(f"{changes.name} at {_shown(*scales)}: {changes.report()}" for changes, scales in sources)
    return MergedFile(written, config.name, tuple(terms), lines, dropped)


def _pair(scale: Scale) -> tuple[float, float]:
    return (float(scale[0]), float(scale[1])) if isinstance(scale, tuple) else (float(scale), float(scale))


def _shown(unet: float, text: float) -> str:
    return f"{unet:g}" if unet == text else f"{unet:g} (UNet) and {text:g} (text)"


def _require_scale(path: str | PathLike[str], scale: Scale) -> None:
    values = scale if isinstance(scale, tuple) else (scale, scale)
    real = all(isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) for value in values)
    if len(values) != 2 or not real:
        raise ArgumentError(f"{Path(path).name[:60]}: scale {str(scale)[:40]} is no finite number", key="scale")


def _terms(sources: Iterable[tuple[Changes, tuple[float, float]]]) -> dict[str, Terms]:
    """{our parameter: what is added to it}, without what is added 0 times."""
    terms: dict[str, Terms] = {}
    for changes, (unet, text) in sources:
        for parameter, change in changes.items():
            scale = unet if parameter.startswith("unet.") else text
            if scale != 0:
                terms.setdefault(parameter, []).append((change, scale))
    return terms


def _changed(model: Checkpoint, terms: Mapping[str, Terms]) -> set[str]:
    """The keys of the file that change. Raises FileError for a parameter that the file lacks or has in another form."""
    file, shapes = model.file, lora_names.shapes(model.config)
    model.require_single(terms)
    changed = set()
    for parameter in terms:
        place = model.places.get(parameter)
        if place is None:
            raise file.error(f"has no {parameter[-60:]}, which the LoRA changes; use a complete checkpoint", parameter)
        spec = file.specs[place.key]
        if not place.fits(spec.shape, shapes[parameter]) or model.integers(parameter) is not None:
            what = f"{place.key[-60:]} is {list(spec.shape)} of {spec.dtype}"
            raise file.error(f"{what}, where {list(shapes[parameter])} floating-point numbers belong", place.key)
        changed.add(place.key)
    return changed


def _dropped(file: Weights, places: Iterable[str]) -> dict[str, str]:
    """The moving average, where weights change that it averages: LitEma's are those under `model.`."""
    averages = [key for key in file if key.startswith(EMA)]
    if set(averages) <= BOOKKEEPING or not any(key.startswith("model.") for key in places):
        return {}
    return dict.fromkeys(averages, "moving average of the weights before the LoRA, no longer theirs")


def _dtype(model: Checkpoint, key: str, dtype: torch.dtype | None) -> torch.dtype:
    stored = model.file.specs[key].dtype
    network = any(key.startswith(part.theirs) for part in model.layout.parts) and not key.endswith("position_ids")
    return cast(stored, dtype) if network else stored


def _tensor(model: Checkpoint, key: str, terms: Mapping[str, Terms] | None) -> Tensor:
    """The tensor as it is stored, or the sum in float32 where it changes."""
    if terms is None:
        return model.file.read(key, mapped=False)

    def parameter(name: str) -> Tensor:
        weight = model.read(name, torch.float32)
        return weight + total(weight, terms[name]) if name in terms else weight

    return model.stored(key, parameter)


def total(weight: Tensor, terms: Terms) -> Tensor:
    """What is added to a weight, summed in float32."""
    added = torch.zeros_like(weight)
    for change, scale in terms:
        added += scale * delta(change, weight)
    return added


def _metadata(
    before: Mapping[str, str], loras: Sequence[tuple[str | PathLike[str], Scale]], dropped: Mapping[str, str]
) -> dict[str, str]:
    merged = [{"name": Path(path).name, "unet": _pair(scale)[0], "text": _pair(scale)[1]} for path, scale in loras]
    metadata = {key: value for key, value in before.items() if key not in HASHES} | {LORAS: json.dumps(merged)}
    if dropped:
        metadata[DROPPED] = f"{len(dropped)} tensors of {EMA}*: {next(iter(dropped.values()))}"
    return metadata
