"""Names and shapes of every family's networks against the lists of the published files."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models.published import from_openclip
from ldm.config import FAMILIES
from ldm.model import LatentDiffusion
from ldm.networks.clip import CLIPText
from ldm.networks.unet import UNet
from ldm.networks.vae import VAE
from tests.made.manifests import inside, manifest, shapes

# family -> its manifest, and for each of its text towers the prefix in that file and whose names it has
TOWERS = {
    "sd1": [("cond_stage_model.transformer.", "hf")],
    "sd1-inpainting": [("cond_stage_model.transformer.", "hf")],
    "sd2-base": [("cond_stage_model.model.", "openclip")],
    "sd2-v": [("cond_stage_model.model.", "openclip")],
    "sd2-inpainting": [("cond_stage_model.model.", "openclip")],
    "sd2-depth": [("cond_stage_model.model.", "openclip")],
    "x4-upscaler": [("cond_stage_model.model.", "openclip")],
    "sdxl-base": [("conditioner.embedders.0.transformer.", "hf"), ("conditioner.embedders.1.model.", "openclip")],
    "sdxl-inpainting": [("conditioner.embedders.0.transformer.", "hf"), ("conditioner.embedders.1.model.", "openclip")],
    "sdxl-refiner": [("conditioner.embedders.0.model.", "openclip")],
    "ssd-1b": [("conditioner.embedders.0.transformer.", "hf"), ("conditioner.embedders.1.model.", "openclip")],
    "sd-image-variations": [],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_unet_and_vae_have_exactly_the_names_and_shapes_of_the_original(family: str) -> None:
    published, config = manifest(family), FAMILIES[family]
    with torch.device("meta"):
        assert shapes(UNet(config.unet)) == inside(published, "model.diffusion_model.")
        assert shapes(VAE(config.vae)) == inside(published, "first_stage_model.")


@pytest.mark.parametrize("family", FAMILIES)
def test_text_towers_have_exactly_the_names_and_shapes_of_the_original(family: str) -> None:
    published, config = manifest(family), FAMILIES[family]
    assert len(TOWERS[family]) == len(config.text)
    for (prefix, kind), text in zip(TOWERS[family], config.text, strict=True):
        theirs = inside(published, prefix)
        if kind == "openclip":
            theirs = shapes(from_openclip({key: torch.empty(shape, device="meta") for key, shape in theirs.items()}))
        theirs.pop("text_model.embeddings.position_ids", None)
        with torch.device("meta"):
            assert shapes(CLIPText(text)) == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_meta_costs_nothing(family: str) -> None:
    with torch.device("meta"):
        model = LatentDiffusion(FAMILIES[family])
    assert all(p.is_meta for p in model.parameters())
    assert not [*model.buffers()]
