"""A word that was learnt -> a textual-inversion file for other programs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch

from ldm.config import ModelConfig
from ldm.errors import ArgumentError
from ldm.prompts import Embedding
from weights.load import require_dtype
from weights.write import pending, write

NAME_KEY = "ldm.embedding.name"  # in the metadata: the word, which the keys of SDXL's files do not say
SDXL = ("clip_l", "clip_g")  # what kohya's scripts, diffusers and ComfyUI call its towers; the refiner has the second alone
MISREAD = re.compile("^lora_|\\.lora_|_lora\\.|hada_w|lokr_w|^string_to_|^clip_[lg]$")  # names that files of other kinds have


def save_embedding(
    embedding: Embedding, path: str | PathLike[str], config: ModelConfig, *,
    metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write a word in the form that `load_embedding`, diffusers, kohya's scripts, A1111 and ComfyUI read.

    path    .safetensors; A1111 and ComfyUI call the word by the file's name
    config  of the model that learnt it. One tensor under the word's name; for the SDXL kind clip_l and clip_g
    dtype   of the vectors; None: as they are
    All or nothing. Raises ArgumentError for another ending, an embedding of other widths than the model's, and a word that would be
    read as something else; OutputError, also where `path` exists and `overwrite` is false.
    """
    if dtype is not None:
        require_dtype(dtype)
    if Path(path).suffix != ".safetensors":
        raise ArgumentError(f"{Path(path).name[-60:]}: other programs read a word from a .safetensors; give it that ending", key="path")
    widths = [tower.width for tower in config.text]
    if sorted(widths) != sorted(embedding.vectors):
        mine, theirs = (" and ".join(map(str, sorted(each))) or "no width" for each in (embedding.vectors, widths))
        raise ArgumentError(f"embedding {embedding.name[:40]}: made for text of width {mine}; this model's is {theirs}: give the config that was trained")
    of_sdxl = config.unet.vector_dim is not None
    if not of_sdxl and MISREAD.search(embedding.name):
        raise ArgumentError(f"embedding {embedding.name[:40]}: a file with a tensor of this name is read as something else; choose another word", key="embedding")
    names = SDXL[-len(widths) :] if of_sdxl else [embedding.name]
    tensors = {name: pending(embedding.vectors[width].detach().contiguous(), dtype) for name, width in zip(names, widths, strict=True)}
    return write(tensors, path, {"format": "pt", NAME_KEY: embedding.name, **(metadata or {})}, overwrite=overwrite)
