"""What is converted to a folder is read by diffusers and transformers, which compute the same from it as we do."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from benchmarks.models import families
from benchmarks.models.folders import FOLDERS, single
from benchmarks.models.golden import relative
from benchmarks.models.published import tiny
from ldm import tasks
from samplers import seeded
from tests.made.checkpoints import save_safetensors
from weights import convert, load
from weights.models import embedded

os.environ["HF_HUB_OFFLINE"] = "1"
TOLERANCE = 1e-5  # float32


@pytest.mark.parametrize("family", FOLDERS)
@torch.no_grad()
def test_diffusers_reads_the_folder_of_every_family_and_computes_the_same(family: str, tmp_path: Path) -> None:
    source = save_safetensors(single(family), tmp_path / "a.safetensors")
    convert(source, tmp_path / family, config=tiny(family), shard_size=2**21 if family == "ssd-1b" else None)
    for name, ours, theirs in families.compared(family, load(source, tiny(family)), tmp_path / family):
        assert theirs.std() > 0.01, name
        assert relative(ours, theirs) < TOLERANCE, name


@torch.no_grad()
def test_transformers_reads_the_depth_network_and_computes_the_same(tmp_path: Path) -> None:
    from transformers import DPTForDepthEstimation

    source = save_safetensors(single("sd2-depth"), tmp_path / "a.safetensors")
    convert(source, tmp_path / "b", config=tiny("sd2-depth"))
    ours = load(source, tiny("sd2-depth")).depth.double()
    theirs = DPTForDepthEstimation.from_pretrained(tmp_path / "b" / "depth_estimator").eval().double()
    size = ours.config.image
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).clamp(-1, 1).double()
    assert (
        relative(ours(x).flatten(), theirs(x).predicted_depth.flatten()) < 1e-10
    )  # the settings are the same: what float32 would hide of them shows


@torch.no_grad()
def test_the_pipeline_of_a_folder_draws_the_picture_that_we_draw(tmp_path: Path) -> None:
    """The model that ships, with its text tower of 32 tokens: prompt, tokens, guidance, sampler and VAE are theirs."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    convert(embedded(), tmp_path / "blocks", dtype=torch.float32)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "blocks")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    prompt = "a red cube on top of a blue sphere"
    model = load()
    theirs = pipeline(
        prompt, num_inference_steps=8, guidance_scale=5.0, latents=seeded([3])((1, 4, 16, 16)), output_type="np"
    ).images[0]
    (ours,) = tasks.txt2img(model, [prompt], seeds=[3], steps=8, cfg=5.0, sampler="ddim")
    assert theirs.std() > 0.1
    assert np.abs(np.asarray(ours) / 255 - theirs).max() < 0.5 / 255 + 1e-4  # ours is rounded to eight bits
