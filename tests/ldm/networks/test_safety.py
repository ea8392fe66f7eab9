"""The safety checker and its preprocessing against the published ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.models.golden import VISION_TINY, relative, tiny_safety
from benchmarks.models.seeded import golden, normal
from ldm.config import VisionConfig
from ldm.errors import ArgumentError, NonFinite
from ldm.networks.safety import SafetyChecker, flagged, safety_pixels
from tests.made.manifests import manifest, shapes

TOLERANCE = 1e-5  # of the reference's rms, as in test_vision.py


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise on a slope, so that neither a shift nor a wrong filter goes unseen."""
    slope = np.linspace(0, 200, width * height).reshape(height, width, 1)
    noise = normal(f"{width}x{height}", (height, width, 3)).numpy() * 25
    return Image.fromarray((slope + noise).clip(0, 255).astype(np.uint8)).convert(mode)


def embeddings(checker: SafetyChecker, pixels: Tensor) -> Tensor:
    return checker.visual_projection(checker.vision_model["vision_model"](pixels))


@torch.no_grad()
def test_the_checker_gives_what_diffusers_gives() -> None:
    checker, file, pixels = tiny_safety(), golden("vision"), normal("safety/pixels", (6, 3, 28, 28))
    assert relative(embeddings(checker, pixels), file["safety-tiny/image_embeds"]) < TOLERANCE
    flags = checker(pixels)
    assert flags.dtype == torch.bool
    assert flags.tolist() == file["safety-tiny/flags"].bool().tolist()


@torch.no_grad()
def test_it_flags_what_diffusers_flags_on_the_same_weights() -> None:
    """400 pictures, of which some are flagged only for the 0.01 of special care."""
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    checker = tiny_safety()
    vision = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 7, "hidden_act": "quick_gelu", "projection_dim": 48,
    }  # fmt: skip
    theirs = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=48)).eval()
    single = (
        "vision_model.embeddings.class_embedding" in theirs.state_dict()
    )  # the second prefix went in transformers 5
    theirs.load_state_dict(
        {
            (name.replace("vision_model.", "", 1) if single else name): value
            for name, value in checker.state_dict().items()
        }
    )
    pixels = normal("safety/many", (400, 3, 28, 28)) + normal("safety/means", (400, 3, 1, 1))
    ours = checker(pixels)
    assert ours.tolist() == theirs(pixels, np.zeros((400, 1)))[1]
    checker.special_care_embeds_weights.fill_(1.0)  # nothing is this near
    assert 50 < checker(pixels).sum() < ours.sum() < 350


@torch.no_grad()
@pytest.mark.parametrize(("beyond", "special", "expected"), [
    (-0.0004, -0.1, False), (0.0004, -0.1, False), (0.0006, -0.1, True), (-0.0092, 0.0006, True),
    (-0.0092, 0.0004, False), (-0.0098, 0.1, False),
])  # fmt: skip
def test_a_threshold_counts_from_half_a_thousandth_on_and_special_care_lowers_it(
    beyond: float, special: float, expected: bool
) -> None:
    checker, pixels = tiny_safety(), normal("safety/pixels", (1, 3, 28, 28))
    near = F.normalize(embeddings(checker, pixels))
    checker.concept_embeds_weights.fill_(1.0)
    checker.special_care_embeds_weights.fill_(1.0)
    checker.concept_embeds_weights[4] = near[0] @ F.normalize(checker.concept_embeds)[4] - beyond
    checker.special_care_embeds_weights[1] = near[0] @ F.normalize(checker.special_care_embeds)[1] - special
    assert checker(pixels).tolist() == [expected]


@pytest.mark.parametrize("family", ["sd1", "sd-image-variations"])
def test_its_names_and_shapes_are_exactly_those_of_the_published_folder(family: str) -> None:
    published = manifest(f"diffusers/{family}/safety_checker")
    published.pop("vision_model.vision_model.embeddings.position_ids")  # 0, 1, 2, ...: no weight
    with torch.device("meta"):
        assert shapes(SafetyChecker(VisionConfig())) == published


# --- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(512, 512), (300, 401), (641, 480), (100, 90), (224, 224), (225, 224), (50, 400)])
def test_pictures_are_prepared_as_the_published_processor_does(size: tuple[int, int]) -> None:
    """Exact to rounding: (level / 255 - mean) / std, of values up to 2.7, has four roundings of at most 2^-24 times
    that, before and after 1 / std."""
    transformers = pytest.importorskip("transformers", reason="the comparison needs the extra 'bench'")
    make = (
        getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    )  # from transformers 5 on the other one is torchvision
    theirs = make(size={"shortest_edge": 224}, crop_size=224)(photo(*size), return_tensors="pt").pixel_values
    ours = safety_pixels([photo(*size)])
    assert ours.shape == (1, 3, 224, 224)
    assert (ours - theirs).abs().max() < 4 * 2.7 / 0.26 * 2**-24


def test_the_resize_is_antialiased_and_the_middle_is_kept() -> None:
    stripes = np.zeros((448, 1000, 3), np.uint8)
    stripes[:, ::2] = 255  # half of what is next to it, if averaged
    stripes[:, :200] = stripes[:, 800:] = 0  # outside of the middle 448 columns
    pixels = safety_pixels([Image.fromarray(stripes)])
    grey = safety_pixels([Image.new("RGB", (224, 224), (128, 128, 128))])
    assert (pixels - grey)[:, :, :, 8:-8].abs().max() < 0.06  # 4 levels of 255, divided by 0.26


def test_a_tensor_is_prepared_like_the_picture_that_would_be_saved() -> None:
    picture = photo(300, 200)
    tensor = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(safety_pixels(tensor), safety_pixels([picture]))
    assert torch.equal(
        safety_pixels(2 * torch.ones(1, 3, 8, 8), 8), safety_pixels([Image.new("RGB", (8, 8), "white")], 8)
    )


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_pictures_of_any_mode_and_of_different_sizes_can_be_checked_together(mode: str) -> None:
    assert safety_pixels([photo(60, 50, mode), photo(40, 80)]).shape == (2, 3, 224, 224)


def test_what_is_no_batch_of_pictures_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"tensors \[b, 3, H, W\]"):
        safety_pixels(torch.zeros(3, 8, 8))
    with pytest.raises(ArgumentError, match="no pictures to check"):
        safety_pixels([])


def test_a_picture_that_is_not_finite_is_an_error_and_no_black_picture() -> None:
    with pytest.raises(NonFinite, match="the decoded picture has NaN or infinity in it"):
        safety_pixels(torch.full((1, 3, 8, 8), torch.nan))


def test_flags_come_as_a_list_in_the_order_of_the_pictures() -> None:
    checker = tiny_safety()
    pictures = [photo(30 + i, 40) for i in range(8)]
    flags = flagged(checker, pictures)
    assert flags == checker(safety_pixels(pictures, VISION_TINY.image)).tolist()
    assert flagged(checker, pictures[::-1]) == flags[::-1]
    assert {type(flag) for flag in flags} == {bool}
