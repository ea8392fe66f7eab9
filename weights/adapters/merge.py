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
from ldm.disk import require_writable
from ldm.errors import ArgumentError, FileError
from weights.adapters import names as lora_names
from weights.adapters.read import read_lora
from weights.files.folders import is_folder
from weights.files.opened import Weights, open_file
from weights.files.write import OnWrite, Pending, cast, guarded, write
from weights.models import described, require_dtype
from weights.names.layout import Layout, original
from weights.names.places import Place, Shape

LORAS, DROPPED = "ldm.merged_loras", "ldm.dropped"  # keys of the metadata
EMA = "model_ema."
BOOKKEEPING = {"model_ema.decay", "model_ema.num_updates"}  # all that is left of an average that already is the weights
UNTRUE = (
    "modelspec.hash_sha256",
    "sshs_model_hash",
    "sshs_legacy_hash",
)  # metadata: hashes of the tensors as they were

Scale = float | tuple[float, float]  # of all; or of the UNet, and of the text towers
Terms = list[tuple[Change, float]]
Part = tuple[Place, Shape, Terms]  # where one of our parameters lies, its shape here, what is added to it


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
    model_config: ModelConfig | None = None, dtype: torch.dtype | None = None, overwrite: bool = False, on_write: OnWrite | None = None,
) -> MergedFile:  # fmt: skip
    """Write a checkpoint with LoRAs merged into it: the numbers that `ldm.lora.merge` gives the loaded model.

    checkpoint    .safetensors or .ckpt. Every key keeps its name, layout and type; only the targets of the LoRAs change
    loras         (whatever `read_lora` reads, its scale): a number, or one for the UNet and one for the text towers
    model_config  None: found out from the checkpoint
    dtype         of the networks' tensors; None: each as it is. Noise schedules and position_ids always stay as they are
    Changes are computed from the weights as they were and summed in float32, then rounded once. A moving average of changed weights
    (`model_ema.*`) is left out, as it would no longer be theirs. Raises FileError, ArgumentError, OutputError.
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
        config, layout = described(file) if model_config is None else (model_config, original(file))
        sources = [(read_lora(path, config).changes, _pair(scale)) for path, scale in loras]
        terms = _terms(sources)
        places = _places(file, layout, terms, config)
        dropped = _dropped(file, places)
        tensors = {
            key: Pending(_dtype(file, layout, key, dtype), file.shape(key), partial(_merged, file, key, places.get(key, ())))
            for key in file if key not in dropped
        }  # fmt: skip
        metadata = _metadata(file.metadata, loras, dropped)
        written = write(tensors, dst, metadata, overwrite=overwrite, on_write=guarded([file], on_write))
    lines = tuple(
        f"{changes.name} at {_said(scale)}: {changes.report()}"
        for (changes, _), (_, scale) in zip(sources, loras, strict=True)
    )
    return MergedFile(written, config.name, tuple(terms), lines, dropped)


def _pair(scale: Scale) -> tuple[float, float]:
    return (float(scale[0]), float(scale[1])) if isinstance(scale, tuple) else (float(scale), float(scale))


def _said(scale: Scale) -> str:
    unet, text = _pair(scale)
    return f"{unet:g}" if unet == text else f"{unet:g} (UNet) and {text:g} (text)"


def _require_scale(path: str | PathLike[str], scale: Scale) -> None:
    values = scale if isinstance(scale, tuple) else (scale, scale)
    if len(values) != 2 or any(
        not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) for value in values
    ):
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


def _places(file: Weights, layout: Layout, terms: Mapping[str, Terms], config: ModelConfig) -> dict[str, list[Part]]:
    """{key of the file: the parameters of ours in it}: three in a matrix of q, k and v."""
    shapes = lora_names.shapes(config)
    found: dict[str, list[Part]] = {}
    for parameter, added in terms.items():
        place = place_of(file, layout, parameter)
        if place is None:
            raise file.error(f"has no {parameter[-60:]}, which the LoRA changes; use a complete checkpoint", parameter)
        if (
            not place.fits(file.shape(place.key), shapes[parameter])
            or not file.specs[place.key].dtype.is_floating_point
        ):
            spec = file.specs[place.key]
            raise file.error(
                f"{place.key[-60:]} is {list(spec.shape)} of {spec.dtype}, where {list(shapes[parameter])} floating-point numbers belong",
                place.key,
            )
        found.setdefault(place.key, []).append((place, shapes[parameter], added))
    return found


def place_of(file: Weights, layout: Layout, parameter: str) -> Place | None:
    """Where one of our parameters lies; None: nowhere. Raises FileError where there are two of it."""
    there = [place for place in layout.places(parameter) if all(key in file for key in place.keys)]
    if len(there) > 1:
        raise file.error(
            f"has {there[0].key[-50:]} twice, also as {there[1].key[-50:]}; which is right cannot be known",
            there[1].key,
        )
    return there[0] if there else None


def _dropped(file: Weights, places: Iterable[str]) -> dict[str, str]:
    """The moving average, if there is one and it is of weights that change: LitEma averages what lies under `model.`."""
    averages = [key for key in file if key.startswith(EMA)]
    if set(averages) <= BOOKKEEPING or not any(key.startswith("model.") for key in places):
        return {}
    return dict.fromkeys(averages, "moving average of the weights before the LoRA, no longer theirs")


def _dtype(file: Weights, layout: Layout, key: str, dtype: torch.dtype | None) -> torch.dtype:
    stored = file.specs[key].dtype
    network = any(key.startswith(part.theirs) for part in layout.parts) and not key.endswith("position_ids")
    return cast(stored, dtype) if network else stored


def _merged(file: Weights, key: str, parts: Sequence[Part]) -> Tensor:
    """The tensor as stored, or the sum in float32 where it changes."""
    if not parts:
        return file.read(key, mapped=False)
    stored = file.read(key, dtype=torch.float32, mapped=False)
    for place, shape, terms in parts:
        rows = place.rows(tuple(stored.shape))
        ours = place.turned(stored if rows is None else stored[rows], shape)
        changed = ours + total(ours, terms)
        back = (
            changed.T
            if place.how == "transposed"
            else changed.reshape(ours.shape if rows is not None else stored.shape)
        )
        stored = back if rows is None else torch.cat([stored[: rows.start], back, stored[rows.stop :]])
    return stored


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
    metadata = {key: value for key, value in before.items() if key not in UNTRUE} | {LORAS: json.dumps(merged)}
    if dropped:
        metadata[DROPPED] = f"{len(dropped)} tensors of {EMA}*: {next(iter(dropped.values()))}"
    return metadata
