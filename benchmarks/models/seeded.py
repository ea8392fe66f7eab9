"""Tensors that a name alone determines, the same on every machine, and the golden outputs of networks made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"


def normal(name: str, shape: Sequence[int]) -> Tensor:
    """N(0, 1) float32 of `shape`: numpy's PCG64 seeded with the CRC-32 of the name."""
    values = np.random.Generator(np.random.PCG64(crc32(name.encode()))).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(values)


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """The parameter of this checkpoint key: N(0, 1 / fan-in); of vectors `.weight`s 1 + 0.1 N, the others 0.1 N."""
    values = normal(name, shape)
    if len(shape) > 1:
        return values / math.sqrt(max(1, math.prod(shape[1:])))
    return 1 + 0.1 * values if name.endswith(".weight") else 0.1 * values


def golden(file: str) -> dict[str, Tensor]:
    """The tensors of one golden file."""
    return load_file(GOLDEN / f"{file}.safetensors")
