"""A LoRA of any trainer, a file or a folder, -> the changes that it makes to our parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch

from ldm.changes.lora import Change, Changes
from ldm.config import FAMILIES, ModelConfig, UNetConfig
from ldm.errors import AmbiguousCheckpoint, FileError
from weights.adapters.family import kinds, resolved
from weights.adapters.names import ALPHA_KEY, TOWERS, Dialect
from weights.adapters.spelled import by_spelling
from weights.files.opened import Weights, open_file
from weights.names.family import require_family

_SMALLEST = UNetConfig(
    model_channels=32, channel_mult=(1,), num_res_blocks=1, down_depth=((0,),), up_depth=((0, 0),), mid_depth=None,
    cross_only=(False,),
)  # fmt: skip
_DIFFUSERS, _PEFT = "pytorch_lora_weights", "adapter_model"


@dataclass(frozen=True)
class Source:
    """A LoRA that was read."""

    changes: Changes
    config: ModelConfig  # of the models that it is for
    dialect: Dialect
    metadata: Mapping[str, str]
    alpha_dtype: torch.dtype | None  # of its alpha tensors, where it has them and all are of one type


def load_lora(path: str | PathLike[str], model_config: ModelConfig, *, allow_unmatched: bool = False) -> Changes:
    """What a LoRA changes in a model of this config; `ldm.changes.lora.merge` applies it.

    path             .safetensors, .ckpt or .pt, with names of kohya (diffusers' or the original's), diffusers or peft
    allow_unmatched  leave out what this model has no place for, instead of refusing the file
    Alpha is the file's tensor; else, for peft's names, that in `lora_adapter_metadata` or in the adapter_config.json
    beside adapter_model.*; else the rank. Factors that need no conversion are mapped from the file.
    Raises FileError for no LoRA, a part of one, shapes that do not fit, or a LoRA of another family.
    """
    with open_file(path) as file:
        found, unmatched = resolved(file, *by_spelling(file), model_config, allow_unmatched)
        file.require_unchanged()
    return Changes(found, file.path.name, unmatched)


def read_lora(path: str | PathLike[str], model_config: ModelConfig | str | None = None) -> Source:
    """All changes of a LoRA, by our names.

    path          a file that `load_lora` reads; a folder with a pytorch_lora_weights.safetensors or an
                  adapter_model.safetensors; or one with a folder of peft's for each network: unet/, text_encoder/,
                  text_encoder_2/
    model_config  the family, or a model's config; None: the family whose targets it has
    Raises FileError as `load_lora` does, and AmbiguousCheckpoint for targets that several families have.
    """
    path = Path(path)
    if isinstance(model_config, str):
        require_family(model_config)
        model_config = FAMILIES[model_config]
    with contextlib.ExitStack() as stack:
        files = {network: stack.enter_context(open_file(file)) for network, file in _files(path).items()}
        config, found = (
            _of_family(path, files) if model_config is None else (model_config, _changes(files, model_config))
        )
        for file in files.values():
            file.require_unchanged()
    metadata = {key: value for file in files.values() for key, value in file.metadata.items()}
    specs = [item for file in files.values() for item in file.specs.items()]
    types = {spec.dtype for key, spec in specs if key.endswith(".alpha")}
    if ALPHA_KEY in metadata:
        types = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
        types = {dtype for dtype in types if str(dtype) == metadata[ALPHA_KEY]}
    alpha_dtype = types.pop() if len(types) == 1 else None
    if "" not in files or files[""].path.stem == _PEFT:
        dialect: Dialect = "peft"
    else:
        dialect = "kohya" if all(key.startswith("lora_") or "." not in key for key, _ in specs) else "diffusers"
    return Source(Changes(found, path.name), config, dialect, metadata, alpha_dtype)


def _files(path: Path) -> dict[str, Path]:
    """{network: its file}; one file of all networks is under ""."""
    if not path.is_dir():
        return {"": path}
    endings = (".safetensors", ".bin")
    networks = {
        name: file
        for name in ("unet", *TOWERS)
        for end in reversed(endings)
        if (file := path / name / f"{_PEFT}{end}").is_file()
    }
    if networks:
        return networks
    for stem in (_DIFFUSERS, _PEFT):
        for end in endings:
            if (file := path / f"{stem}{end}").is_file():
                return {"": file}
    what = f"is a directory without a LoRA ({_DIFFUSERS}.safetensors, {_PEFT}.safetensors or folders of peft)"
    raise FileError(f"{what}; name its file", path=path)


def _of_family(path: Path, files: Mapping[str, Weights]) -> tuple[ModelConfig, dict[str, Change]]:
    """The family that has all targets of a LoRA, in its shapes, and the changes by our names."""
    found: dict[str, dict[str, Change]] = {}
    faults = []
    for name in kinds():
        try:
            found[name] = _changes(files, FAMILIES[name])
        except FileError as fault:
            faults.append(fault)
    if len(found) == 1:
        ((name, changes),) = found.items()
        return FAMILIES[name], changes
    if found:
        raise AmbiguousCheckpoint(
            f"has targets that {', '.join(found)} have alike; say which with --family (model_config=)", path=path
        )
    if len({str(fault) for fault in faults}) == 1:  # the fault is not the family's
        raise faults[0]
    what = "has targets of no one family at its published sizes; name its model with --family or --ckpt (model_config=)"
    raise FileError(what, path=path)


def _changes(files: Mapping[str, Weights], config: ModelConfig) -> dict[str, Change]:
    """The changes in all files, by our names.

    In a folder of peft's the names do not say of which network they are. A tower is looked up in a model with the
    smallest UNet: the table of the real one would take a second to make.
    """
    found: dict[str, Change] = {}
    for network, file in files.items():
        spelled, strays = by_spelling(file)
        if network not in TOWERS:
            found |= resolved(file, spelled, strays, config)[0]
            continue
        i, towers = TOWERS.index(network), len(config.text)
        if i >= towers:
            raise FileError(
                f"is for text tower {i + 1}, a model of family {config.name} has {towers}; name its family",
                path=file.path,
            )
        alone = config if towers == 1 else replace(config, text=(config.text[i],), unet=_SMALLEST)
        changes, _ = resolved(file, spelled, strays, alone)
        found |= {name.replace("text.0.", f"text.{i}.", 1): change for name, change in changes.items()}
    return found
