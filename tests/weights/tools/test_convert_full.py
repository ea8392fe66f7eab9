"""Conversions at full size: time, peak memory, bits; and what diffusers computes from the folders. Minutes each, up to
25 GB of disk and 12 GB of memory."""

from __future__ import annotations

import gc
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models.folders import STATISTIC
from benchmarks.models.golden import relative
from benchmarks.models.published import manifest
from benchmarks.models.seeded import normal, weight
from weights import load, open_file
from weights.files.write import Pending, cast, write

pytestmark = pytest.mark.slow

LIMIT = 1e9  # bytes that a conversion may have in memory, torch and all
CONVERT = """
import json, sys, time
from benchmarks.machine import peak_memory
from weights import convert
began = time.perf_counter()
made = convert(sys.argv[1], sys.argv[2])
print(json.dumps([time.perf_counter() - began, peak_memory(), made.bytes]))
"""


def published(name: str, path: Path, dtype: torch.dtype) -> Path:
    """A seeded checkpoint with the names and shapes of a published file, written without ever being whole in memory."""

    def make(key: str, shape: tuple[int, ...], stored: torch.dtype) -> Tensor:
        if key == STATISTIC and name == "sd2-v":
            return torch.tensor([0.2, -0.2] * 160)
        return (
            weight(key, shape)
            if stored.is_floating_point
            else torch.arange(shape[-1]).expand(shape)
            if shape
            else torch.tensor(470_000).to(stored)
        )

    entries = {
        key: Pending(cast(stored, dtype), shape, lambda args=(key, shape, stored): make(*args))
        for key, (shape, stored) in manifest(name).items()
    }
    return write(entries, path, {"format": "pt"})


def converted(source: Path, target: Path) -> str:
    """Convert in a process of its own; what it took."""
    run = subprocess.run([sys.executable, "-c", CONVERT, source, target], capture_output=True, text=True, check=True)
    seconds, peak, size = json.loads(run.stdout)
    print(
        f"{source.name} -> {target.name}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s, "
        f"peak {peak / 1e6:.0f} MB"
    )
    assert peak < LIMIT
    return run.stdout


def digests(path: Path) -> dict[str, str]:
    with open_file(path) as file:
        return {
            key: hashlib.sha256(file.read(key, mapped=False).reshape(-1).view(torch.uint8).numpy()).hexdigest()
            for key in file
        }


@pytest.mark.parametrize(
    ("name", "dtype"), [("sd1", torch.float32), ("sd2-v", torch.float16), ("sdxl-base", torch.float16)]
)
def test_a_full_size_file_comes_back_bit_by_bit_in_less_than_a_gigabyte(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    source = published(name, tmp_path / "source.safetensors", dtype)
    wanted = digests(source)
    converted(source, tmp_path / "pickled.ckpt")
    assert digests(tmp_path / "pickled.ckpt") == wanted
    source.unlink()
    converted(tmp_path / "pickled.ckpt", tmp_path / "folder")
    (tmp_path / "pickled.ckpt").unlink()
    converted(tmp_path / "folder", tmp_path / "back.safetensors")
    assert digests(tmp_path / "back.safetensors") == wanted
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()


@pytest.mark.parametrize("name", ["sd1", "sd2-v", "sdxl-base", "ssd-1b"])
@torch.no_grad()
def test_diffusers_computes_the_same_from_a_full_size_folder(name: str, tmp_path: Path) -> None:
    """In float32, from weights in float16: one program's networks after the other's, since both do not fit. What the
    VAE decodes is compared element by element in float64: in float32 single elements differ by up to 2e-5 of the rms on
    processors without AVX-512, by their rounding."""
    pytest.importorskip("diffusers")
    source = published(name, tmp_path / "source.safetensors", torch.float16)
    converted(source, tmp_path / "folder")
    ours = _ours(source)
    source.unlink()
    gc.collect()
    for network, theirs in _theirs(tmp_path / "folder", ours).items():
        error = relative(ours[network], theirs)
        print(f"{name} {network}: {error:.1e}")
        assert theirs.std() > 0.01
        assert error < 1e-5, network
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()


IDS = torch.tensor([[49406, 320, 2103, 4558, 539, 49407, *[49407] * 71]])


def _inputs(context_dim: int, vector_dim: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return (
        normal("x", (1, 4, 16, 16)),
        torch.tensor([500]),
        normal("context", (1, 77, context_dim)),
        None if vector_dim is None else normal("pooled", (1, vector_dim - 6 * 256)),
    )


def _ours(source: Path) -> dict[str, Tensor]:
    from ldm.conditioning.cond import size_embedding

    model = load(source)
    config = model.config.unet
    x, t, context, pooled = _inputs(config.context_dim, config.vector_dim)
    y = (
        None
        if pooled is None
        else torch.cat([pooled, size_embedding(torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]))], 1)
    )
    outputs = {
        "unet": model.unet(x, t, context, y),
        "moments": model.vae.moments(normal("image", (1, 3, 64, 64)).clamp(-1, 1)),
        "decoded": model.vae.double().decode(x.double() * model.config.vae.scale),
    }
    for i, tower in enumerate(model.text):
        tokens, last = tower(IDS, tower.config.skip, tower.config.norm)
        outputs[f"text {i}"] = tokens
        if tower.config.projection and config.vector_dim is not None:
            outputs["pooled"] = last
    return outputs


def _theirs(folder: Path, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    outputs = {}
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
    vector_dim = unet.config.projection_class_embeddings_input_dim
    x, t, context, pooled = _inputs(unet.config.cross_attention_dim, vector_dim)
    more = (
        {}
        if pooled is None
        else {
            "added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])}
        }
    )
    outputs["unet"] = unet(x, t, context, **more).sample
    del unet
    gc.collect()
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
    outputs["moments"] = vae.encode(normal("image", (1, 3, 64, 64)).clamp(-1, 1)).latent_dist.parameters
    outputs["decoded"] = vae.double().decode(x.double()).sample
    for i, name in enumerate(path.name for path in sorted(folder.glob("text_encoder*"))):
        kind = CLIPTextModelWithProjection if "pooled" in ours and i == 1 else CLIPTextModel
        tower = kind.from_pretrained(folder / name, torch_dtype=torch.float32).eval()
        out = tower(IDS, output_hidden_states=True)
        outputs[f"text {i}"] = out.hidden_states[-2] if vector_dim else out.last_hidden_state
        if "pooled" in ours and i == 1:
            outputs["pooled"] = out.text_embeds
    return outputs
