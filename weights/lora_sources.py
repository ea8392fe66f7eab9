"""A LoRA of any trainer, as a file or a folder -> its changes, with the family that it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal

import torch

from ldm.config import FAMILIES, ModelConfig, UNetConfig
from ldm.errors import AmbiguousCheckpoint, FileError
from ldm.lora import Change, Changes
from weights.detect import require_family
from weights.files import open_file
from weights.load import described, open_any
from weights.lora import KIN, load_lora

Dialect = Literal["kohya", "diffusers", "peft"]
ALPHA_KEY = "ldm.lora.alpha_dtype"  # in the metadata: the type of the alpha tensors of the kohya file that this one was made from
TOWERS = ("text_encoder", "text_encoder_2")
_SMALLEST = UNetConfig(model_channels=32, channel_mult=(1,), num_res_blocks=1, down_depth=((0,),), up_depth=((0, 0),), mid_depth=None, cross_only=(False,))
_DIFFUSERS, _PEFT = "pytorch_lora_weights", "adapter_model"


@dataclass(frozen=True)
class Source:
    """A LoRA that was read."""

    changes: Changes
    config: ModelConfig  # of the models that it is for
    dialect: Dialect
    metadata: Mapping[str, str]
    alpha_dtype: torch.dtype | None  # of its alpha tensors, where it has them and all are of one type


def read_lora(path: str | PathLike[str], model_config: ModelConfig | str | None = None) -> Source:
    """All changes of a LoRA, by our names.

    path          a file that `load_lora` reads; a folder with pytorch_lora_weights.safetensors or adapter_model.safetensors in it; or one
                  with a folder of peft's for each network: unet/, text_encoder/, text_encoder_2/
    model_config  the family, or a model's config; None: the family whose targets it has
    Raises FileError as `load_lora` does, and AmbiguousCheckpoint for targets that several families have.
    """
    path = Path(path)
    files = _files(path)
    if isinstance(model_config, str):
        require_family(model_config)
        model_config = FAMILIES[model_config]
    config = family_of(path, files) if model_config is None else model_config
    found: dict[str, Change] = {}
    metadata: dict[str, str] = {}
    keys: set[str] = set()
    dtypes: set[torch.dtype] = set()
    for network, file in files.items():
        found |= _load(network, file, config)
        with open_file(file) as opened:
            metadata |= opened.metadata
            keys |= set(opened)
            dtypes |= {spec.dtype for key, spec in opened.specs.items() if key.endswith(".alpha")}
    if ALPHA_KEY in metadata:
        dtypes = {dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) if str(dtype) == metadata[ALPHA_KEY]}
    alpha_dtype = dtypes.pop() if len(dtypes) == 1 else None
    return Source(Changes(found, path.name), config, _dialect(path, files, keys), metadata, alpha_dtype)


def family_of(path: Path, files: Mapping[str, Path]) -> ModelConfig:
    """The family that has all targets of a LoRA, in its shapes. Families of one kind (sd1 and sd1-inpainting) share their targets: it is the first."""
    found = {name: _fault(files, FAMILIES[name]) for name in KIN}
    fitting, faults = [name for name, fault in found.items() if fault is None], [fault for fault in found.values() if fault is not None]
    if len(fitting) == 1:
        return FAMILIES[fitting[0]]
    if fitting:
        raise AmbiguousCheckpoint(f"has targets that {', '.join(fitting)} have alike; say which with --family (model_config=)", path=path)
    if len({str(fault) for fault in faults}) == 1:  # not the family is at fault
        raise faults[0]
    raise FileError("has targets of no one family at its published sizes; name its model with --family or --ckpt (model_config=)", path=path)


def _fault(files: Mapping[str, Path], config: ModelConfig) -> FileError | None:
    """Why a LoRA is none for this family; None: it is one."""
    try:
        for network, file in files.items():
            _load(network, file, config)
    except FileError as fault:
        return fault
    return None


def config_of(path: str | PathLike[str]) -> ModelConfig:
    """The config of the model in a file or folder, of which only the header is read."""
    with open_any(path) as file:
        return described(file)[0]


def _files(path: Path) -> dict[str, Path]:
    """{network: its file}; one file of all networks is under ""."""
    if not path.is_dir():
        return {"": path}
    networks = {name: path / name / f"{_PEFT}{end}" for name in ("unet", *TOWERS) for end in (".bin", ".safetensors") if (path / name / f"{_PEFT}{end}").is_file()}
    if networks:
        return networks
    there = [path / f"{stem}{end}" for stem in (_DIFFUSERS, _PEFT) for end in (".safetensors", ".bin") if (path / f"{stem}{end}").is_file()]
    if not there:
        raise FileError(f"is a directory without a LoRA ({_DIFFUSERS}.safetensors, {_PEFT}.safetensors or folders of peft); name its file", path=path)
    return {"": there[0]}


def _load(network: str, file: Path, config: ModelConfig) -> dict[str, Change]:
    """The changes in one file, by our names. In a folder of peft's, of one network, names do not say which
    network they are of; a tower's names no part of the UNet, whose table would take a second to make."""
    if network not in TOWERS:
        return dict(load_lora(file, config))
    i = TOWERS.index(network)
    if i >= len(config.text):
        raise FileError(f"is for text tower {i + 1}, a model of family {config.name} has {len(config.text)}; name its family", path=file)
    alone = load_lora(file, config if len(config.text) == 1 else replace(config, text=(config.text[i],), unet=_SMALLEST))
    return {name.replace("text.0.", f"text.{i}.", 1): change for name, change in alone.items()}


def _dialect(path: Path, files: Mapping[str, Path], keys: set[str]) -> Dialect:
    if "" not in files or files[""].stem == _PEFT:
        return "peft"
    kohya = all(key.startswith("lora_") or "." not in key for key in keys)
    return "kohya" if kohya else "diffusers"
