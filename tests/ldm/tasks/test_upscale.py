"""The upscaler: what it sees, at every size."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ldm.errors import ArgumentError
from ldm.images import from_pil
from ldm.tasks import upscale
from samplers import seeded
from tests.made.families import borrowed
from tests.made.pictures import levels_of, photo_of


def test_the_upscaler_sees_the_small_picture_noised_to_its_level(shown, calls) -> None:
    m, init = borrowed("x4-upscaler"), photo_of(64, 64)
    (image,) = upscale(m, init, "a", seeds=[7], steps=1, noise_level=100)
    x, _, _, y = calls[0]
    noise = seeded([7])
    noise((1, 4, 64, 64))
    alpha = m.schedule.alphas_cumprod[100]
    low = math.sqrt(alpha) * from_pil(init) + math.sqrt(1 - alpha) * noise((1, 3, 64, 64))
    assert image.size == (256, 256)
    assert torch.allclose(x[:, 4:], low.expand(2, -1, -1, -1), atol=1e-6)
    assert y.tolist() == [100, 100]


def test_an_odd_picture_is_continued_for_the_upscaler_and_cut_again(shown, calls) -> None:
    (image,) = upscale(borrowed("x4-upscaler"), photo_of(50, 30), "a", seeds=[1], steps=1)
    assert image.size == (200, 120)
    assert calls[0][0].shape[2:] == (64, 64)


def test_windows_are_blended_without_changing_what_does_not_look_around(shown, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that sees one cell at a time gives the same with windows as without."""
    from ldm.networks.unet import UNet

    sides = []
    monkeypatch.setattr(
        UNet,
        "forward",
        lambda self, x, t, context, y=None: (sides.append(tuple(x.shape[2:])), torch.tanh(x[:, :4] + x[:, 4:5]))[1],
    )
    m, init = borrowed("x4-upscaler"), photo_of(192, 128)
    whole, tiled = (upscale(m, init, "a", seeds=[1], steps=2, window=window)[0] for window in (0, 64))
    assert np.abs(levels_of(whole) - levels_of(tiled)).max() <= 1
    assert sides == [(128, 192)] * 2 + [(64, 64)] * 2 * 3 * 5


def test_a_large_picture_is_seen_through_windows(shown, calls) -> None:
    upscale(borrowed("x4-upscaler"), photo_of(128, 64), "a", seeds=[1], steps=1, window=64)
    assert [tuple(c[0].shape[2:]) for c in calls] == [(64, 64)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_level": 351}, "noise_level: 351; give a whole number from 0 to 350"),
        ({"noise_level": 1.5}, "noise_level"),
        ({"window": 8}, "window: 8"),
    ],
)
def test_an_upscaling_option_out_of_range_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        upscale(borrowed("x4-upscaler"), photo_of(), "a", seeds=[1], **options)
    with pytest.raises(ArgumentError, match="is no upscaler"):
        upscale(borrowed("sd1"), photo_of(), "a", seeds=[1])
