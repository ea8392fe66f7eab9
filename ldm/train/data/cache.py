"""Tensors that are computed once and kept in safetensors files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ldm.targets import write_whole
from ldm.train.data.source import digest


class Cache:
    """Tensors by name in the files `directory`/`kind`-*.safetensors, each written whole or not at all.

    Several processes may read and write at once, so long as they do not write the same names.
    """

    def __init__(self, directory: Path, kind: str):
        self.directory, self.kind = directory, kind
        self.look()

    def look(self) -> None:
        """List the tensors on the disk, whichever process has written them."""
        self._pieces = {piece: _names(piece) for piece in sorted(self.directory.glob(f"{self.kind}-*.safetensors"))}
        self._where = {name: piece for piece, names in self._pieces.items() for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def get(self, name: str) -> Tensor:
        """A tensor, on the CPU, whichever process wrote it. Raises KeyError for one that no file has."""
        if name not in self._where:
            self.look()
        with safe_open(self._where[name], "pt") as file:
            return file.get_tensor(name)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep these, as one piece. Raises OutputError."""
        self._write(self.directory / f"{self.kind}-{digest(*sorted(tensors))}.safetensors", tensors)

    def keep(self, names: Collection[str]) -> None:
        """Delete every other tensor, and files that cannot be read. Raises OutputError."""
        wanted = set(names)
        for piece, held in list(self._pieces.items()):
            kept = [name for name in held if name in wanted]
            if not kept:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(piece)
                del self._pieces[piece]
            elif len(kept) < len(held):
                self._write(piece, {name: self.get(name) for name in kept})
        self._where = {name: piece for piece, held in self._pieces.items() for name in held}

    def _write(self, piece: Path, tensors: Mapping[str, Tensor]) -> None:
        write_whole(piece, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        self._pieces[piece] = list(tensors)
        self._where |= dict.fromkeys(tensors, piece)


def _names(piece: Path) -> list[str]:
    """The tensors of a file; none where it is damaged or was deleted meanwhile, so that they are made anew."""
    try:
        with safe_open(piece, "pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []


def weights_digest(*modules: nn.Module) -> str:
    """A digest of the names, types, shapes and values of networks' parameters."""
    h = sha256()
    for module in modules:
        for name, tensor in module.state_dict().items():
            h.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            h.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return h.hexdigest()
