"""Files that commands are given in tests: a tiny model and what can be added to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import weights
from benchmarks.models.seeded import weight
from tests.made.families import build, tiny

QUERY = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, another VAE, two LoRAs, an embedding and a photo."""
    path = tmp_path_factory.mktemp("files")
    weights.save(build(tiny("sd1")), path / "tiny.safetensors")
    vae = {name: weight(f"another {name}", value.shape) for name, value in build(tiny("sd1")).vae.state_dict().items()}
    save_file(vae, path / "vae.safetensors")
    factors = {
        f"{QUERY}.lora_down.weight": weight("down", (4, 32)),
        f"{QUERY}.lora_up.weight": 3 * weight("up", (32, 4)),
        f"{QUERY}.alpha": torch.tensor(4.0),
    }
    save_file(factors, path / "style.safetensors")
    strange = {key.replace("to_q", "to_nowhere"): value.clone() for key, value in factors.items()}
    save_file(factors | strange, path / "partly.safetensors")
    save_file({"emb_params": weight("word", (2, 64))}, path / "zebra.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(path / "photo.png")
    return path


@pytest.fixture
def here(tmp_path, folder, monkeypatch) -> Path:
    """A working directory with these files."""
    monkeypatch.chdir(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path
