"""The record of a conversion: where every key of the source went, what was done to it, and the sha256 of the result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import ModelConfig
from weights.files.opened import Tensors
from weights.files.write import NAMES
from weights.tools.routes import Route


@dataclass(frozen=True)
class Conversion:
    """What was done; `route.files` and `dropped` account for every key of the source."""

    path: Path
    config: ModelConfig | None  # None: the source is no model, or of an unknown kind, and only its container changed
    route: Route
    dropped: Mapping[str, str]  # key in the source -> why it is nowhere in the target

    @property
    def tensors(self) -> int:
        """How many were written."""
        return sum(map(len, self.route.files.values()))

    @property
    def bytes(self) -> int:
        """Of all tensors written."""
        return sum(move.pending.size for moves in self.route.files.values() for move in moves.values())


def sha256(tensor: Tensor) -> str:
    """Of a tensor's numbers, contiguous and little-endian."""
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def manifest(file: Tensors, made: Conversion, facts: Mapping[str, str], digests: Mapping[tuple[str, str], str]) -> str:
    """The record as JSON: {"source", "target", "facts", "tensors", "synthesised", "dropped"}.

    tensors      {key of the source: [{"target", "done", "dtype", "shape", "sha256"}]}
    synthesised  [{"target", ...}]
    dropped      {key of the source: why}
    A target in a folder is the path of its file, a colon and its key.
    """
    tensors: dict[str, list[dict[str, Any]]] = {}
    synthesised = []
    for path, moves in made.route.files.items():
        for key, move in moves.items():
            entry = {
                "target": f"{path}:{key}" if path else key, "done": move.done, "dtype": NAMES[move.pending.dtype],
                "shape": list(move.pending.shape), "sha256": digests[path, key],
            }  # fmt: skip
            for source in move.sources:
                stored = file.specs[source].dtype
                tensors.setdefault(source, []).append(
                    entry | ({"from": NAMES[stored]} if stored != move.pending.dtype else {})
                )
            if not move.sources:
                synthesised.append(entry)
    keys = len(tensors) + len(made.dropped)
    family = made.config and made.config.name
    whole = {
        "source": {"name": file.path.resolve().name, "sha256": facts["ldm.source_sha256"], "keys": keys},
        "target": {"name": made.path.resolve().name, "family": family, "tensors": made.tensors, "bytes": made.bytes},
        "facts": dict(facts), "tensors": tensors, "synthesised": synthesised, "dropped": dict(made.dropped),
    }  # fmt: skip
    return json.dumps(whole, indent=1, ensure_ascii=True) + "\n"
