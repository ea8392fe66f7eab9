"""Pictures from pictures: image to image, from depth, and variations."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import ArgumentError
from ldm.images import from_pil, to_pil
from ldm.tasks import depth2img, img2img, txt2img, variations
from samplers import Step, karras, seeded
from tests.made.families import batch_sizes, borrowed
from tests.made.pictures import levels, photo_of


def test_img2img_starts_from_a_noised_sample_of_the_picture(model, photo):
    """The posterior's sample comes first from the picture's own noise, then the noise of the first level, as in the
    original code."""
    steps: list[Step] = []
    img2img(model, photo, "a", seeds=[7], strength=0.5, steps=6, on_step=steps.append)
    sigmas = karras(model.schedule, 6)[3:]
    noise = seeded([7])
    latent = model.vae.encode(from_pil(photo), noise((1, 4, 4, 4)))
    assert [step.sigma for step in steps] == sigmas[:-1]
    assert torch.equal(steps[0].x, latent + noise((1, 4, 4, 4)) * sigmas[0])


def test_strength_zero_takes_the_picture_through_the_vae_and_back(model, photo, monkeypatch):
    sizes = batch_sizes(model, monkeypatch)
    images = img2img(model, photo, "a", seeds=[1, 2], strength=0)
    (back,) = to_pil(model.vae.decode(model.vae.encode(from_pil(photo))))
    assert all(np.abs(levels([image]) - levels([back])).max() <= 1 for image in images)
    assert sizes == []


def test_more_strength_runs_more_steps_and_strays_further(model, photo, monkeypatch):
    sizes = batch_sizes(model, monkeypatch)
    base = levels(img2img(model, photo, "a", seeds=[1], strength=0))
    distances = []
    for strength, calls in ((0.1, 1), (0.5, 5), (1.0, 10)):
        sizes.clear()
        distances.append(
            np.abs(levels(img2img(model, photo, "a", seeds=[1], strength=strength, steps=10)) - base).mean()
        )
        assert len(sizes) == calls
    assert distances[0] < distances[1]
    assert distances[0] < distances[2]


def test_a_picture_made_from_another_does_not_depend_on_its_batch(model, photo):
    def make(seeds: list[int], batch: int | None = None) -> np.ndarray:
        return levels(img2img(model, photo, "a", seeds=seeds, steps=4, sampler="euler_ancestral", batch=batch))

    alone = np.concatenate([make([seed]) for seed in (5, 6, 7)])
    assert np.array_equal(make([5, 6, 7], batch=1), alone)
    assert np.abs(make([5, 6, 7]) - alone).max() <= 1


def test_the_size_of_the_first_picture_is_rounded_kept_or_followed(model, photo):
    def size(**given: int) -> tuple[int, int]:
        return img2img(model, photo.resize((50, 37)), "a", seeds=[1], strength=0, **given)[0].size

    assert size() == (48, 40)
    assert size(width=24) == (24, 16)
    assert size(width=16, height=32) == (16, 32)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1"])
def test_a_first_picture_of_any_mode_will_do(mode, model, photo):
    assert img2img(model, photo.convert(mode), "a", seeds=[1], strength=0.5, steps=2)[0].mode == "RGB"


def test_img2img_works_in_half_precision(model, photo):
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert levels(img2img(half, photo, "a", seeds=[1], steps=2)).std() > 1


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf"), "half", True, None])
def test_a_strength_outside_zero_to_one_is_refused(strength, model, photo):
    with pytest.raises(ArgumentError, match=r"strength: .*; give a number from 0 to 1"):
        img2img(model, photo, "a", seeds=[1], strength=strength)


def test_a_strength_too_small_for_a_step_is_an_error_that_names_the_least(model, photo):
    with pytest.raises(ArgumentError, match=r"strength: 0\.01 leaves none of 25 steps: give at least 0\.04"):
        img2img(model, photo, "a", seeds=[1], strength=0.01)


def test_a_depth_model_sees_the_depth_that_is_given(calls) -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    depth2img(borrowed("sd2-depth"), photo_of(), "a", seeds=[1], depth=ramp, steps=2, strength=0.5)
    near = calls[0][0][:, 4]
    assert near.shape == (2, 4, 4)
    assert (near[:, :, 1:] > near[:, :, :-1]).all(), "light is near"
    assert near.amin() == pytest.approx(-1, abs=1e-3)
    assert near.amax() == pytest.approx(1, abs=2e-3)


def test_depth_comes_from_the_models_own_network_otherwise(calls) -> None:
    depth2img(borrowed("sd2-depth"), photo_of(), "a", seeds=[1], steps=2, strength=0.5)
    depth2img(borrowed("sd2-depth"), photo_of(), "a", seeds=[2], steps=2, strength=0.5)
    assert torch.equal(calls[0][0][:, 4], calls[1][0][:, 4])
    assert calls[0][0][:, 4].std() > 0.01


def test_a_depth_map_of_another_shape_or_a_model_without_depth_is_refused() -> None:
    with pytest.raises(ArgumentError, match="depth: it is 32x16 and the picture 32x32"):
        depth2img(borrowed("sd2-depth"), photo_of(), "a", seeds=[1], depth=photo_of(32, 16))
    with pytest.raises(ArgumentError, match="takes no depth"):
        depth2img(borrowed("sd1"), photo_of(), "a", seeds=[1])


@pytest.mark.parametrize("preprocessing", ["card", "original"])
def test_variations_are_told_one_token_and_steer_away_from_zeros(preprocessing: str, calls) -> None:
    m = borrowed("sd-image-variations")
    variations(m, photo_of(60, 40), seeds=[1], steps=1, preprocessing=preprocessing)
    context = calls[0][2]
    assert context.shape == (2, 1, 48)
    assert not context[0].any()
    from ldm.networks.vision import preprocess

    assert torch.allclose(
        context[1:, 0], m.vision(preprocess(from_pil(photo_of(60, 40)), preprocessing, 28)), atol=1e-6
    )


def test_variations_need_a_model_that_looks_and_no_words() -> None:
    with pytest.raises(ArgumentError, match="takes text, not a picture"):
        variations(borrowed("sd1"), photo_of(), seeds=[1])
    with pytest.raises(ArgumentError, match="negative: image variations have no negative prompt"):
        variations(borrowed("sd-image-variations"), photo_of(), seeds=[1], negative="rain")
    with pytest.raises(ArgumentError, match="preprocessing: 'cards' is unknown; card"):
        variations(borrowed("sd-image-variations"), photo_of(), seeds=[1], preprocessing="cards")
    with pytest.raises(ArgumentError, match="use variations"):
        txt2img(borrowed("sd-image-variations"), "a", seeds=[1])
