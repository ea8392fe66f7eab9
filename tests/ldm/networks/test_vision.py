"""The vision tower and its two preprocessings against the original implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.models.golden import VISION_TINY, fill, relative, tiny_vision
from benchmarks.models.seeded import golden, normal
from ldm.config import FAMILIES, VisionConfig
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.networks.vision import MEAN, STD, CLIPVision, preprocess
from tests.made.families import tiny
from tests.made.manifests import inside, manifest, shapes
from tests.made.pictures import resampling

TOLERANCE = 1e-5  # of the reference's rms; measured 0 on one machine, rounding elsewhere


@torch.no_grad()
def test_the_vision_tower_gives_what_transformers_gives() -> None:
    embedding = tiny_vision()(normal("clip-vision-tiny/pixels", (2, 3, 28, 28)))
    assert relative(embedding, golden("vision")["clip-vision-tiny/image_embeds"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_it_agrees_with_transformers_on_the_same_weights(activation: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the comparison needs the extra 'bench'")
    config = VisionConfig(
        image=42, patch=14, width=96, layers=2, heads=3, mlp=160, activation=activation, projection=40
    )
    ours = fill(CLIPVision(config), lambda key: f"vision/{key}")
    theirs = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=42,
            patch_size=14,
            hidden_act=activation,
            projection_dim=40,
        )
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    pixels = normal("vision/pixels", (3, 3, 42, 42))
    assert relative(ours(pixels), theirs(pixels).image_embeds) < TOLERANCE


def test_its_names_and_shapes_are_exactly_those_of_the_published_folder() -> None:
    published = manifest("diffusers/sd-image-variations/image_encoder")
    published.pop("vision_model.embeddings.position_ids")  # 0, 1, 2, ...: no weight
    with torch.device("meta"):
        assert shapes(CLIPVision(VisionConfig())) == published


def test_only_image_variations_have_a_vision_tower() -> None:
    assert [family for family, config in FAMILIES.items() if config.vision is not None] == ["sd-image-variations"]
    assert LatentDiffusion(tiny("sd1")).vision is None
    assert inside(shapes(LatentDiffusion(tiny("sd-image-variations"))), "vision.")["visual_projection.weight"] == (
        48,
        64,
    )


# --- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "corners"), [("original", True), ("card", False)])
@pytest.mark.parametrize("shape", [(37, 91), (300, 260)])
def test_both_preprocessings_are_bicubic_without_antialias_or_crop(
    how: str, corners: bool, shape: tuple[int, int]
) -> None:
    """Tolerance: 16 products of float32 weights, each rounded relative to values up to about 3 (noise), is 16 * 3 *
    6e-8 = 3e-6; and the place of a pixel, up to 300, is known to 300 * 6e-8 = 2e-5 pixels, over which noise changes by
    at most about 8 times that; divided by STD: 6e-4."""
    image = normal("picture", (2, 3, *shape)).clamp(-1, 1)
    down, across = (resampling(length, 56, corners) for length in shape)
    resized = torch.einsum("ih,bchw,jw->bcij", down, image.double(), across)
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    expected = ((resized + 1) / 2 - mean) / std
    ours = preprocess(image, how, 56)
    assert ours.dtype == torch.float32
    assert (ours - expected).abs().max() < 6e-4


def test_the_card_s_preprocessing_is_torchvision_s() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    image = normal("picture", (1, 3, 80, 61)).clamp(-1, 1)
    theirs = transforms.Compose(
        [
            transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BICUBIC, antialias=False),
            transforms.Normalize([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
        ]
    )((image + 1) / 2)
    # one resizes before (x + 1) / 2, the other after: both are linear, so that only rounding of values around 1
    # differs, divided by std 0.26
    assert torch.allclose(preprocess(image, "card"), theirs, atol=16 * 6e-8 / 0.26, rtol=0)


def test_the_two_preprocessings_differ_but_not_by_much() -> None:
    image = torch.linspace(-1, 1, 300)[None, None, None, :].expand(1, 3, 200, 300)
    original, card = preprocess(image), preprocess(image, "card")
    assert original.shape == card.shape == (1, 3, 224, 224)
    assert 1e-4 < (original - card).abs().max() < 0.02  # half a pixel of a ramp over 300
    assert torch.equal(original, preprocess(image, "original", 224))


@pytest.mark.parametrize("image", [torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8)])
def test_what_is_no_batch_of_pictures_is_refused(image: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"tensors \[b, 3, H, W\]"):
        preprocess(image)


def test_another_preprocessing_is_refused_with_the_names() -> None:
    with pytest.raises(ArgumentError, match="there are original, card"):
        preprocess(torch.zeros(1, 3, 8, 8), "clip")


def test_the_embedding_is_not_normalised_and_an_image_does_not_depend_on_its_batch() -> None:
    tower, pixels = tiny_vision(), normal("clip-vision-tiny/pixels", (2, 3, 28, 28))
    both = tower(pixels)
    assert (both.norm(dim=1) > 2).all()
    assert torch.allclose(tower(pixels[1:]), both[1:], atol=1e-5)
    assert both.shape == (2, VISION_TINY.projection)
