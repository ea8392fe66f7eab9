"""Generated names against the lists of the published diffusers folders."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models.seeded import GOLDEN
from ldm.config import FAMILIES
from ldm.networks.unet import UNet
from ldm.networks.vae import VAE
from tests.made.manifests import manifest, shapes
from weights.names.diffusers import diffusers_unet, diffusers_vae


@pytest.mark.parametrize(
    "family",
    [
        "sd1",
        "sd1-inpainting",
        "sd2-base",
        "sd2-v",
        "sd2-inpainting",
        "sd2-depth",
        "x4-upscaler",
        "sdxl-base",
        "sdxl-inpainting",
        "sdxl-refiner",
        "ssd-1b",
    ],
)
def test_generated_diffusers_names_are_exactly_those_of_the_published_folders(family: str) -> None:
    config = FAMILIES[family]
    with torch.device("meta"):
        unet, vae = shapes(UNet(config.unet)), shapes(VAE(config.vae))
    ours = {theirs: unet[name] for name, theirs in diffusers_unet(config.unet).items()}
    assert ours == manifest(f"diffusers/{family}/unet")
    if (GOLDEN / f"manifests/diffusers/{family}/vae.json.gz").exists():
        folder = manifest(f"diffusers/{family}/vae")
        matrices = {theirs: vae[name] for name, theirs in diffusers_vae(config.vae).items()}
        assert {name: shape[:2] if ".to_" in name else shape for name, shape in matrices.items()} == folder
