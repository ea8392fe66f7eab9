"""Classifier-free guidance, its rescaling and its interval, and keeping known regions."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.models.mixture import SCHEDULE, exact
from benchmarks.models.seeded import normal
from samplers import GRIDS, SAMPLERS, cfg, keep_known, seeded, start

SHAPE = (2, 4, 8, 8)
UNCOND, COND = normal("guidance/uncond", SHAPE), normal("guidance/cond", SHAPE) * 0.7


def test_guidance_extrapolates_from_uncond_through_cond():
    assert torch.allclose(cfg(7.5)([UNCOND, COND], 1.0), -6.5 * UNCOND + 7.5 * COND, atol=7.5 * 2**-21)


@pytest.mark.parametrize(
    ("scale", "needed"), [(1, (1,)), (1.0, (1,)), (0, (0,)), (7.5, (0, 1)), (-1, (0, 1)), (1.0001, (0, 1))]
)
def test_one_pass_suffices_at_scale_one_and_zero(scale, needed):
    guide = cfg(scale)
    assert guide.needs(1.0) == needed
    both = [UNCOND, COND]
    if len(needed) == 1:
        assert guide([both[needed[0]]], 1.0) is both[needed[0]]
        assert guide(both, 1.0) is both[needed[0]]


def test_guidance_stays_within_its_interval():
    guide = cfg(5.0, interval=(0.3, 5.0))
    assert [guide.needs(sigma) for sigma in (14.0, 5.0, 1.0, 0.3, 0.1)] == [(1,), (0, 1), (0, 1), (1,), (1,)]
    assert guide([UNCOND, COND], 14.0) is COND
    assert torch.equal(guide([UNCOND, COND], 1.0), cfg(5.0)([UNCOND, COND], 1.0))


def test_full_rescale_gives_every_image_the_deviation_of_cond():
    out = cfg(7.5, rescale=1.0)([UNCOND, COND], 1.0)
    assert torch.allclose(out.std((1, 2, 3)), COND.std((1, 2, 3)), rtol=1e-5)
    plain = cfg(7.5)([UNCOND, COND], 1.0)
    assert torch.allclose(cfg(7.5, rescale=0.7)([UNCOND, COND], 1.0), 0.7 * out + 0.3 * plain, atol=1e-5)  # eq. 16


def test_rescale_does_not_depend_on_the_batch():
    guide = cfg(7.5, rescale=0.7)
    assert torch.allclose(guide([UNCOND, COND], 1.0)[:1], guide([UNCOND[:1], COND[:1]], 1.0), atol=1e-6)


def test_rescale_survives_a_constant_prediction():
    assert cfg(7.5, rescale=1.0)([torch.zeros(SHAPE), torch.zeros(SHAPE)], 1.0).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"scale": math.nan},
        {"scale": math.inf},
        {"scale": 5, "rescale": 1.1},
        {"scale": 5, "rescale": -0.1},
        {"scale": 5, "interval": (2, 1)},
    ],
)
def test_senseless_guidance_is_refused(options):
    with pytest.raises(ValueError, match="guidance"):
        cfg(**options)


def test_a_wrong_number_of_predictions_is_refused():
    with pytest.raises(ValueError, match="1 predictions"):
        cfg(5.0)([COND], 1.0)
    with pytest.raises(ValueError, match="3 predictions"):
        cfg(5.0)([COND, COND, COND], 1.0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_known_comes_back_untouched_and_the_rest_is_painted(name):
    known = normal("known", (1, 4, 8, 8))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    sigmas = GRIDS["karras"](SCHEDULE, 8)
    noise = seeded([3])
    first = noise((1, 4, 8, 8))
    seen = []

    def watched(x, sigma):
        seen.append((x, sigma))
        return exact(x, sigma)

    out = SAMPLERS[name](keep_known(watched, known, mask, first), start(first, sigmas), sigmas, noise=noise)
    if name in ("plms", "lms"):  # they reach 0 along stored slopes, and so x0 up to their roundings
        assert torch.allclose(out[..., :4], known[..., :4], atol=14.6 * 2**-20)
    else:
        assert torch.equal(out[..., :4], known[..., :4])
    assert (out[..., 4:] - known[..., 4:]).abs().mean() > 0.1
    assert all(
        torch.allclose(x[..., :4], (known + first * sigma)[..., :4]) for x, sigma in seen
    )  # the network sees the known part noised
