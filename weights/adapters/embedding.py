"""The word that a textual-inversion file of any trainer teaches, read and written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ldm.conditioning.prompts import Embedding
from ldm.config import ModelConfig
from ldm.errors import ArgumentError, printable
from weights.checkpoint import require_dtype
from weights.files.opened import Tensors, open_file
from weights.files.write import pending, write
from weights.names.instead import LORA

MAX_VECTORS = 1000
# Keys of A1111's web UI and the original trainer, which keep dictionaries by placeholder.
PARAMETERS, TOKENS = "string_to_param.", "string_to_token."
# SDXL's towers in the files of kohya, diffusers and ComfyUI; the refiner has the second alone.
SDXL = ("clip_l", "clip_g")
NAME_KEY = "ldm.embedding.name"  # metadata: the word, which the keys of SDXL's files do not have


def load_embedding(path: str | PathLike[str], name: str | None = None) -> Embedding:
    """The word of a textual-inversion file (Gal et al. 2022), its vectors in float32 by the width of their text tower.

    path  .pt of A1111's web UI or the original trainer, .bin or .safetensors of diffusers or kohya, SDXL's clip_l and
          clip_g, or one tensor alone
    name  what stands for it in prompts; None: the file's name without its extension
    Raises FileError for a file that holds anything else.
    """
    with open_file(path) as file:
        vectors: dict[int, Tensor] = {}
        for key in vector_keys(file):
            tensor = _vectors(file, key)
            if tensor.shape[1] in vectors:
                raise file.error(f"has two sets of vectors of width {tensor.shape[1]}; a text tower takes one", key)
            vectors[tensor.shape[1]] = tensor
        if len({len(tensor) for tensor in vectors.values()}) > 1:
            counts = " and ".join(f"{len(tensor)} of width {width}" for width, tensor in vectors.items())
            raise file.error(f"has {counts} vectors; an embedding has the same number for each text tower")
        file.require_unchanged()
        return Embedding(file.path.stem if name is None else name, vectors)


def save_embedding(
    embedding: Embedding, path: str | PathLike[str], config: ModelConfig, *,
    metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write a word in the form that `load_embedding`, diffusers, kohya's scripts, A1111 and ComfyUI read.

    path    .safetensors; A1111 and ComfyUI call the word by the file's name
    config  of the model that learnt it. One tensor under the word's name; for the SDXL kind clip_l and clip_g
    dtype   of the vectors; None: as they are
    All or nothing. Raises ArgumentError for another ending, an embedding of other widths than the model's, and a word
    that would be read as something else; OutputError, also where `path` exists and `overwrite` is false.
    """
    if dtype is not None:
        require_dtype(dtype)
    if Path(path).suffix != ".safetensors":
        raise ArgumentError(
            f"{Path(path).name[-60:]}: other programs read a word from a .safetensors; give it that ending", key="path"
        )
    widths = [tower.width for tower in config.text]
    if sorted(widths) != sorted(embedding.vectors):
        own, model = (" and ".join(map(str, sorted(each))) or "no width" for each in (embedding.vectors, widths))
        what = f"embedding {embedding.name[:40]}: made for text of width {own}; this model's is {model}"
        raise ArgumentError(f"{what}: give the config that was trained")
    of_sdxl = config.unet.vector_dim is not None
    if not of_sdxl and re.search(rf"{LORA}|^string_to_|^clip_[lg]$", embedding.name):
        what = f"embedding {embedding.name[:40]}: a file with a tensor of this name is read as something else"
        raise ArgumentError(f"{what}; choose another word", key="embedding")
    names = SDXL[-len(widths) :] if of_sdxl else [embedding.name]
    vectors = {name: embedding.vectors[width].detach().contiguous() for name, width in zip(names, widths, strict=True)}
    tensors = {name: pending(tensor, dtype) for name, tensor in vectors.items()}
    return write(tensors, path, {"format": "pt", NAME_KEY: embedding.name, **(metadata or {})}, overwrite=overwrite)


def vector_keys(file: Tensors) -> list[str]:
    """The keys of the vectors. Raises FileError, with what it is where that shows, for a file that is no embedding."""
    if lora := next((key for key in file if re.search(LORA, key)), None):
        raise file.error(f"is a LoRA ({lora[:60]}), not an embedding; use --lora, or weights.load_lora", lora)
    parameters = [key for key in file if key.startswith(PARAMETERS)]
    if parameters:
        strays = [key for key in file if not key.startswith((PARAMETERS, TOKENS))]
    elif {*SDXL} & set(file):
        parameters, strays = [key for key in file if key in SDXL], [key for key in file if key not in SDXL]
        if not strays:
            return parameters
    else:
        parameters, strays = list(file), []
    if len(parameters) == 1 and not strays:
        return parameters
    raise file.error(_instead([*file], parameters, strays), next(iter(strays or parameters)))


def _instead(keys: list[str], parameters: list[str], strays: list[str]) -> str:
    """What a file with these keys is."""
    if len(keys) > 10:
        return f"has {len(keys)} tensors ({keys[0][:60]}, ...): a model or a part of one, not an embedding; use --ckpt"
    if strays:
        return f"has {strays[0][:60]} beside its vectors, which no embedding has; use the file as its trainer wrote it"
    what = f"holds {len(parameters)} tensors ({', '.join(parameters)[:60]})"
    return f"{what}; an embedding file holds one word: save each in a file of its own"


def _vectors(file: Tensors, key: str) -> Tensor:
    """[n, width], finite. Checked by shape before anything is read."""
    spec, shown = file.specs[key], printable(key.removeprefix(PARAMETERS))[:40]
    n, width = (1, *spec.shape)[-2:] if spec.shape else (0, 0)
    if len(spec.shape) not in (1, 2) or not 1 <= n <= MAX_VECTORS or not width:
        what = f"{shown} has the shape {list(spec.shape)[:6]}"
        raise file.error(f"{what}; an embedding is [width] or [n, width] with n up to {MAX_VECTORS}", key)
    if not spec.dtype.is_floating_point:
        raise file.error(
            f"{shown} holds {str(spec.dtype).removeprefix('torch.')} numbers; an embedding is made of floats", key
        )
    tensor = file.read(key, dtype=torch.float32).reshape(n, width).clone()
    if not tensor.isfinite().all():
        raise file.error(
            f"{shown} holds NaN or infinity, which would make every picture black; use another file of this embedding",
            key,
        )
    return tensor
