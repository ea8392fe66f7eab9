"""Names and shapes: of the published files, as golden lists, and of networks."""

from __future__ import annotations

import gzip
import json

import torch

from benchmarks.models.seeded import GOLDEN

Shapes = dict[str, tuple[int, ...]]


def manifest(name: str) -> Shapes:
    tensors = json.loads(gzip.decompress((GOLDEN / "manifests" / f"{name}.json.gz").read_bytes()))["tensors"]
    return {key: tuple(value["shape"]) for key, value in tensors.items()}


def inside(shapes: Shapes, prefix: str) -> Shapes:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def shapes(network: torch.nn.Module | dict) -> Shapes:
    state = network if isinstance(network, dict) else network.state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items()}
