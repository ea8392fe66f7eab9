"""LoRAs as files, seeded and at the published sizes, and the tiny models that they change."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import weights
from benchmarks.models.seeded import GOLDEN, normal
from ldm.changes.lora import LowRank
from ldm.config import ModelConfig
from ldm.model import LatentDiffusion
from tests.made.checkpoints import TINY, save_safetensors
from tests.made.families import build
from tests.made.families import tiny as wide
from weights.adapters import names as lora_names

FAMILY = {"sd1": "sd1", "sd2": "sd2-base", "sdxl": "sdxl-base", "ssd-1b": "ssd-1b"}  # manifest -> key of FAMILIES
HALF = 2**-24  # half the distance of 1 to the next float32
Q = "unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"  # [32, 32] in TINY
CONV = "unet.input_blocks.1.0.in_layers.2.weight"  # [32, 32, 3, 3]
FC = "text.0.text_model.encoder.layers.1.mlp.fc1.weight"  # [256, 64]
KEYS = {
    Q: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
    CONV: "lora_unet_down_blocks_0_resnets_0_conv1",
    FC: "lora_te_text_model_encoder_layers_1_mlp_fc1",
}


def targets(manifest: str) -> list[dict]:
    return json.loads(gzip.decompress((GOLDEN / f"lora/{manifest}.json.gz").read_bytes()))["targets"]


def published(manifest: str) -> dict[str, Tensor]:
    """A LoRA of every target of a family at its published size, under kohya's own spelling, with ranks 1 and 2 and
    alphas of all kinds."""
    tensors: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for i, target in enumerate(targets(manifest)):
        shape, r = target["shape"], 1 + (i % 7 == 0)
        # sd-scripts has the UNets of SDXL and SSD-1B under the original's names
        original = manifest in ("sdxl", "ssd-1b") and target["kohya"][0].startswith("lora_unet_")
        name = target["kohya"][1 if original else 0]
        tensors[f"{name}.lora_down.weight"] = torch.randn(r, *shape[1:], generator=generator).half()
        tensors[f"{name}.lora_up.weight"] = torch.randn(
            shape[0], r, *(1 for _ in shape[2:]), generator=generator
        ).half()
        tensors[f"{name}.alpha"] = torch.tensor((1.0, 0.3, 8.0)[i % 3], dtype=torch.float16)
    return tensors


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether both have the same names, types and bits, those of zeros and NaN included."""
    return a.keys() == b.keys() and all(
        x.dtype == b[name].dtype and x.shape == b[name].shape and torch.equal(octets(x), octets(b[name]))
        for name, x in a.items()
    )


def octets(x: Tensor) -> Tensor:
    return x.flatten().view(torch.uint8)


def some_lora(path: Path, *, metadata: dict[str, str] | None = None, rank: int = 4, alpha: float = 2.0) -> Path:
    """A LoRA in kohya's names of a matrix and a kernel of TINY's UNet and of a matrix of its text tower."""
    shapes = lora_names.shapes(TINY)
    tensors = {}
    for name, key in KEYS.items():
        shape = shapes[name]
        tensors[f"{key}.lora_down.weight"] = normal(f"{name} down", (rank, *shape[1:])) * 0.1
        tensors[f"{key}.lora_up.weight"] = normal(f"{name} up", (shape[0], rank, *(1 for _ in shape[2:]))) * 0.1
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return save_safetensors(tensors, path, metadata)


def product(change: LowRank, shape: tuple[int, ...]) -> Tensor:
    """What a change adds, in float64."""
    alpha = change.down.shape[0] if change.alpha is None else change.alpha
    return (change.up.double().flatten(1) @ change.down.double().flatten(1) * alpha / change.down.shape[0]).reshape(
        shape
    )


def spectrum(matrix: Tensor) -> np.ndarray:
    """Singular values by numpy, in float64."""
    return np.linalg.svd(matrix.double().flatten(1).numpy(), compute_uv=False)


def blank_lora(
    manifest: str, groups: tuple[str, ...] = ("lora",), *, unet: bool = True, text: bool = True, spelling: int = 0
) -> dict[str, Tensor]:
    """A LoRA of rank 1 with kohya's names for all of a family's targets, as zeros."""
    tensors: dict[str, Tensor] = {}
    for target in targets(manifest):
        names, shape = target["kohya"], target["shape"]
        if target["group"] not in groups or not (unet if names[0].startswith("lora_unet_") else text):
            continue
        name = names[min(spelling, len(names) - 1)]
        tensors[f"{name}.lora_down.weight"] = torch.zeros(1, *shape[1:], dtype=torch.float16)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(shape[0], 1, *(1 for _ in shape[2:]), dtype=torch.float16)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def close(ours: Tensor, exact: Tensor) -> bool:
    """Within what float32 loses: 64 roundings (no sum here is longer) of the largest number."""
    assert ours.dtype == torch.float32
    return (ours.double() - exact).abs().max().item() <= 64 * 2**-24 * exact.abs().max().item()


HADA = {
    f"{KEYS[Q]}.hada_{part}": normal(part, (32, 2) if part.endswith("a") else (2, 32))
    for part in ("w1_a", "w1_b", "w2_a", "w2_b")
}
KERNEL = {
    "lora_down.weight": normal("d", (2, 32, 1, 1)),
    "lora_up.weight": normal("u", (32, 2, 1, 1)),
    "lora_mid.weight": normal("m", (2, 2, 3, 3)),
}


def shallow(family: str) -> ModelConfig:
    """The family with tiny networks and few tokens."""
    config = wide(family)
    return replace(config, text=tuple(replace(tower, vocab=128) for tower in config.text))


@lru_cache(maxsize=8)
def seeded(config: ModelConfig) -> LatentDiffusion:
    """A model to borrow: who changes it puts it back."""
    return build(config)


def saved(
    path: Path,
    config: ModelConfig = TINY,
    change: Callable[[dict[str, Tensor]], None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A seeded model of these sizes, its parameters changed, as a checkpoint."""
    model = seeded(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = dict(before)
    if change:
        change(state)
    try:
        model.load_state_dict(state)
        return weights.save(model, path, dtype=dtype)
    finally:
        model.load_state_dict(before)


def adding(names: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(state: dict[str, Tensor]) -> None:
        for name, tensor in names.items():
            state[name] = state[name] + tensor

    return change


def model(config: ModelConfig = TINY) -> LatentDiffusion:
    torch.manual_seed(0)
    made = LatentDiffusion(config).requires_grad_(False).eval()
    # the last layers start as zeros
    made.load_state_dict({name: normal(name, p.shape) * 0.1 for name, p in made.state_dict().items()})
    return made


def state(of: LatentDiffusion) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}
