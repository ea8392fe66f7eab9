"""Tensors that a name alone determines, the same on every machine: the weights and inputs behind the golden outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from zlib import crc32

import numpy as np
import torch
from torch import Tensor


def normal(name: str, shape: Sequence[int]) -> Tensor:
    """N(0, 1) float32 of `shape`: numpy's PCG64 seeded with the CRC-32 of the name."""
    values = np.random.Generator(np.random.PCG64(crc32(name.encode()))).standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(values)


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """The parameter of this checkpoint key: matrices and kernels N(0, 1 / fan-in), one-dimensional `.weight`s 1 + 0.1 N, the rest 0.1 N."""
    values = normal(name, shape)
    if len(shape) > 1:
        return values / math.sqrt(max(1, math.prod(shape[1:])))
    return 1 + 0.1 * values if name.endswith(".weight") else 0.1 * values
