"""Pictures and tensors: every level, every mode, every size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import images
from ldm.errors import ArgumentError, NonFinite
from ldm.images import fit, from_pil, to_pil
from tests.made.pictures import color

RED, WHITE = (255, 0, 0), (255, 255, 255)


def test_every_level_of_a_picture_comes_back_from_a_tensor_as_it_was(noisy):
    tensor = from_pil([noisy, noisy])
    assert tensor.shape == (2, 3, 24, 40)
    assert tensor.dtype == torch.float32
    assert -1 <= tensor.min() < -0.9 < 0.9 < tensor.max() <= 1
    assert all(np.array_equal(back, noisy) for back in to_pil(tensor))


@pytest.mark.parametrize(
    ("value", "level"), [(-7.0, 0), (-1.0, 0), (0.0, 128), (0.0039, 128), (0.9999, 255), (7.0, 255)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_clipped_and_rounded_to_the_nearest_level(value, level, dtype):
    assert color(to_pil(torch.full((1, 3, 2, 2), value, dtype=dtype))[0]) == (level,) * 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_no_number_is_an_error_and_never_a_black_picture(value):
    picture = torch.zeros(1, 3, 4, 4)
    picture[0, 1, 2, 3] = value
    with pytest.raises(NonFinite, match="NaN or infinity"):
        to_pil(picture)


def test_tensors_of_other_shapes_and_pictures_of_different_sizes_are_refused(noisy):
    with pytest.raises(ArgumentError, match=r"\[1, 4, 8, 8\]"):
        to_pil(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ArgumentError, match="one size"):
        from_pil([noisy, noisy.crop((0, 0, 8, 8))])
    with pytest.raises(ArgumentError, match="none"):
        from_pil([])


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "I;16"]
)
def test_every_mode_becomes_rgb(mode):
    white = Image.new("RGB", (3, 2), WHITE)
    image = (
        Image.new(mode, (3, 2), 65535)
        if mode.startswith("I")
        else white.convert("P").convert("PA")
        if mode == "PA"
        else white.convert(mode)
    )
    assert color(images.to_rgb(image)) == WHITE


def test_half_transparent_red_becomes_pink():
    assert color(images.to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 127)))) == (255, 128, 128)


def test_lengths_are_rounded_to_the_nearest_multiple():
    assert [images.nearest_multiple(n) for n in (1, 4, 11, 12, 100, 128, 131)] == [8, 8, 8, 16, 104, 128, 128]


def test_the_size_of_a_picture_follows_it_where_it_is_not_given():
    photo = Image.new("RGB", (300, 200))
    assert images.size_for(photo) == (304, 200)
    assert images.size_for(photo, 96) == (96, 64)
    assert images.size_for(photo, None, 64) == (96, 64)
    assert images.size_for(photo, 8, 16) == (8, 16)


def test_a_picture_is_scaled_to_cover_and_cut_evenly_not_stretched():
    flag = Image.new("RGB", (300, 100), WHITE)
    flag.paste(RED, (100, 0, 200, 100))  # a red square in the middle
    assert color(fit(flag, 40, 40).crop((4, 0, 36, 40))) == RED  # within 3 pixels of its edges Lanczos rings
    assert fit(flag, 40, 40).size == (40, 40)
    assert color(fit(Image.new("RGB", (1, 1), RED), 64, 32)) == RED


def test_a_picture_of_the_right_size_is_not_resampled(noisy):
    assert np.array_equal(fit(noisy, *noisy.size), noisy)
