"""Inpainting and outpainting: what the network sees, and that every pixel outside the mask stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import ArgumentError
from ldm.images import from_pil
from ldm.tasks import inpaint, outpaint
from samplers import seeded
from tests.made.families import borrowed
from tests.made.pictures import half_white, levels_of, photo_of


@pytest.mark.parametrize("family", ["sd1-inpainting", "sd2-inpainting", "sdxl-inpainting"])
def test_an_inpainting_model_sees_latent_mask_and_the_picture_with_a_grey_hole(family: str, calls) -> None:
    m, init = borrowed(family), photo_of()
    inpaint(m, init, half_white(), "a", seeds=[7], steps=2)
    x = calls[0][0]
    noise = seeded([7])
    first = noise((1, 4, 4, 4))
    image, hole = from_pil(init), torch.zeros(1, 1, 32, 32)
    hole[..., 16:] = 1
    masked = m.vae.encode(image * (1 - hole), noise((1, 4, 4, 4)))
    assert x.shape[1] == 9
    assert torch.allclose(x[0, :4], first[0], atol=1e-5), "unit variance at the first step"
    assert torch.equal(x[0, 4], torch.tensor([0.0, 0, 1, 1]).expand(4, 4))
    assert torch.allclose(x[0, 5:], masked[0], atol=1e-6)
    assert torch.equal(x[0, 4:], x[1, 4:]), "both conditions are told the same"


@pytest.mark.parametrize("family", ["sd1", "sd1-inpainting", "sdxl-base"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_every_pixel_outside_the_mask_stays(family: str, strength: float) -> None:
    init = photo_of(45, 37)  # a size that no latent has
    (image,) = inpaint(borrowed(family), init, half_white(45, 37), "a", seeds=[1], steps=2, strength=strength)
    assert image.size == (45, 37)
    assert np.array_equal(levels_of(image)[:, :22], levels_of(init)[:, :22])
    assert np.abs(levels_of(image)[:, 22:] - levels_of(init)[:, 22:]).mean() > 5


def test_feathering_fades_in_inside_the_mask_alone() -> None:
    hard, soft = (
        inpaint(borrowed("sd1"), photo_of(), half_white(), "a", seeds=[1], steps=2, feather=f)[0] for f in (0, 4)
    )
    assert np.array_equal(levels_of(soft)[:, :16], levels_of(photo_of())[:, :16])
    assert np.array_equal(levels_of(soft)[:, 21:], levels_of(hard)[:, 21:])
    assert not np.array_equal(levels_of(soft)[:, 16:20], levels_of(hard)[:, 16:20])


def test_a_size_asked_for_scales_picture_and_mask(calls) -> None:
    (image,) = inpaint(
        borrowed("sd1"), photo_of(64, 64), half_white(64, 64), "a", seeds=[1], steps=1, width=40, height=40
    )
    assert image.size == (40, 40)
    assert calls[0][0].shape[2:] == (5, 5)


def test_outpainting_keeps_the_picture_and_adds_its_surroundings() -> None:
    init = photo_of()
    (image,) = outpaint(borrowed("sd1"), init, {"left": 8, "bottom": 11}, "a", seeds=[1], steps=2)
    assert image.size == (40, 43)
    assert np.array_equal(levels_of(image)[:32, 8:], levels_of(init))
    assert levels_of(image)[:, :8].std() > 1


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        ({}, "nothing to add"),
        ({"left": 0}, "nothing to add"),
        ({"up": 8}, "'up' is no side; there are left, right, top, bottom"),
        ({"top": -1}, "top=-1"),
        ({"top": 1.5}, r"top=1\.5"),
    ],
)
def test_an_extension_that_makes_no_sense_is_refused(extend: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        outpaint(borrowed("sd1"), photo_of(), extend, "a", seeds=[1])


def test_inpainting_needs_something_to_paint_and_a_model_that_reads_text() -> None:
    with pytest.raises(ArgumentError, match="nothing to paint"):
        inpaint(borrowed("sd1"), photo_of(), Image.new("L", (32, 32)), "a", seeds=[1])
    with pytest.raises(ArgumentError, match="strength: 0 would paint nothing"):
        inpaint(borrowed("sd1"), photo_of(), half_white(), "a", seeds=[1], strength=0)
    with pytest.raises(ArgumentError, match="use upscale"):
        inpaint(borrowed("x4-upscaler"), photo_of(), half_white(), "a", seeds=[1])
