"""The way between two prompts or two seeds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from benchmarks.models.seeded import normal
from ldm.errors import ArgumentError
from ldm.tasks import interpolate, txt2img
from tests.made.families import borrowed
from tests.made.pictures import levels_of


def test_the_way_between_two_prompts_begins_and_ends_as_they_do() -> None:
    frames = interpolate(borrowed("sd1"), ["a cat", "a dog"], seeds=[3], frames=4, steps=2, sampler="euler_ancestral")
    assert len(frames) == 4
    for frame, prompt in ((frames[0], "a cat"), (frames[-1], "a dog")):
        (end,) = txt2img(borrowed("sd1"), prompt, seeds=[3], steps=2, sampler="euler_ancestral")
        assert np.abs(levels_of(frame) - levels_of(end)).max() <= 1
    steps = [np.abs(levels_of(a) - levels_of(b)).mean() for a, b in itertools.pairwise(frames)]
    assert min(steps) > 0


def test_the_way_between_two_seeds_keeps_the_noise_at_its_length() -> None:
    from ldm.tasks.interpolate import slerp

    a, b = normal("a", (1, 4096)), normal("b", (1, 4096))
    for t in (0.25, 0.5):
        assert slerp(a, b, t).norm().item() == pytest.approx(torch.lerp(a.norm(), b.norm(), t).item(), rel=1e-5)
    assert torch.allclose(slerp(a, a, 0.3), a)
    assert not slerp(torch.zeros_like(a), torch.zeros_like(a), 0.3).any(), "zeros have no direction"
    frames = interpolate(borrowed("sdxl-base"), "a", seeds=[1, 2, 3], frames=5, steps=1, batch=2)
    for k, seed in ((0, 1), (2, 2), (4, 3)):
        assert (
            np.abs(
                levels_of(frames[k]) - levels_of(txt2img(borrowed("sdxl-base"), "a", seeds=[seed], steps=1)[0])
            ).max()
            <= 1
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": [1]}, "1 with 1 seeds"),
        ({"seeds": [1, 2, 3], "prompts": ["a", "b"]}, "2 with 3 seeds"),
        ({"seeds": [1, 2], "frames": 1}, "frames: 1"),
    ],
)
def test_a_way_needs_two_stations_and_two_frames(given: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        interpolate(borrowed("sd1"), given.pop("prompts", "a"), **given)
