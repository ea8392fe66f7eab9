"""Changes of a model -> a LoRA that kohya's scripts, diffusers or peft read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import get_args

import torch

from ldm.changes.lora import Change, Changes, require_fit
from ldm.config import ModelConfig
from ldm.disk import write_all
from ldm.errors import ArgumentError
from ldm.targets import replacing, replacing_directory, require_writable
from weights.adapters import names as lora_names
from weights.adapters.kohya import kohya_tensors, network_facts
from weights.adapters.names import ALPHA_KEY, TOWERS, Dialect
from weights.adapters.peft import ADAPTER, by_network, peft_tensors, settings
from weights.checkpoint import require_dtype
from weights.files.write import OnWrite, Pending, write

HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")  # metadata: of the tensors as they were


def save_lora(
    changes: Changes, path: str | PathLike[str], config: ModelConfig, to: Dialect = "kohya", *,
    metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write a LoRA that `load_lora` and other programs read.

    changes  of `ldm.changes.lora_layers.changes`, or any other
    config   of the model that they change
    to       "kohya": a file for kohya's scripts, A1111 and ComfyUI, with rank and alpha in its metadata; "diffusers":
             a file for `pipe.load_lora_weights`; "peft": a directory with a folder for each network
    dtype    of the factors; None: as they are. alpha keeps its value exactly
    All or nothing. Raises ArgumentError, also for changes that do not fit the config; FileError for a change that the
    dialect cannot hold; OutputError, also where `path` exists and `overwrite` is false.
    """
    require_dialect(to)
    if dtype is not None:
        require_dtype(dtype)
    _require_fit(changes, config)
    require_writable(path, overwrite, directory=to == "peft")
    metadata = network_facts(changes) | dict(metadata or {})
    return write_lora(changes, path, to, config, metadata, source=Path(path), dtype=dtype, overwrite=overwrite)


def write_lora(
    changes: Mapping[str, Change], path: str | PathLike[str], to: Dialect, config: ModelConfig,
    metadata: Mapping[str, str], *, source: Path, dtype: torch.dtype | None = None,
    alpha_dtype: torch.dtype | None = None, more: Mapping[str, Pending] | None = None, overwrite: bool = False,
    on_write: OnWrite | None = None,
) -> Path:  # fmt: skip
    """Write a LoRA: a file with kohya's or diffusers' names, or for peft a folder for each network.

    changes      by our names of parameters
    source       the file that they are from, for errors
    dtype        of the factors; None: as they are. alpha keeps its value exactly, whatever its type
    alpha_dtype  of the alpha tensors, where it holds them exactly; peft and diffusers keep alpha as text
    more         tensors under their names in the file, for kohya
    Raises FileError, with the first module, for a change that the dialect cannot hold; OutputError.
    """
    untrue = (*HASHES, ADAPTER, ALPHA_KEY)  # these tell of the file that the changes are from
    facts = {"format": "pt", **{key: value for key, value in metadata.items() if key not in untrue}}
    if to == "kohya":
        tensors = kohya_tensors(changes, config, dtype, alpha_dtype) | dict(more or {})
        return write(tensors, path, facts, overwrite=overwrite, on_write=on_write)
    if alpha_dtype is not None:
        facts[ALPHA_KEY] = str(alpha_dtype)
    networks = by_network(changes, to, config, source)
    if to == "diffusers":
        made = {f"{name}.": (peft_tensors(network, dtype), settings(network)) for name, network in networks.items()}
        tensors = {network + key: tensor for network, (tensors, _) in made.items() for key, tensor in tensors.items()}
        adapter = {network + key: value for network, (_, values) in made.items() for key, value in values.items()}
        facts[ADAPTER] = json.dumps(adapter, indent=2, sort_keys=True)
        return write(tensors, path, facts, overwrite=overwrite, on_write=on_write)
    with replacing_directory(path, overwrite) as folder:
        for name, network in networks.items():
            (folder / name).mkdir()
            # transformers 5 has no text_model. in CLIPTextModel, but in the second tower's class; peft maps no names
            bare = "text_model." if name == TOWERS[0] else ""
            tensors = {
                f"base_model.model.{key.removeprefix(bare)}": tensor
                for key, tensor in peft_tensors(network, dtype).items()
            }
            write(tensors, folder / name / "adapter_model.safetensors", facts, on_write=on_write)
            config_json = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "bias": "none"}
            text = json.dumps(config_json | settings(network), indent=2, sort_keys=True)
            with replacing(folder / name / "adapter_config.json", False) as descriptor:
                write_all(descriptor, text.encode())
    return Path(path)


def require_dialect(to: str) -> None:
    """Refuse what is no dialect."""
    if to not in get_args(Dialect):
        raise ArgumentError(f"to {str(to)[:20]!r}: there are {', '.join(get_args(Dialect))}", key="to")


def _require_fit(changes: Changes, config: ModelConfig) -> None:
    if not changes:
        raise ArgumentError(f"{changes.name}: there is no change to save")
    shapes = lora_names.shapes(config)
    for name, change in changes.items():
        if name not in shapes:
            what = f"{changes.name}: a model of family {config.name} has no parameter {name}"
            raise ArgumentError(f"{what}; give the config that was trained", key=name)
        try:
            require_fit(change, shapes[name])
        except ArgumentError as fault:
            raise ArgumentError(f"{changes.name}: {name}: {fault}", key=name) from None
