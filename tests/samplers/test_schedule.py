"""The trained schedule, and where pictures enter and leave it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from samplers import GRIDS, Schedule, finish, noised, start, tail

SCHEDULE = Schedule()


def test_the_schedule_has_the_published_ends():
    assert SCHEDULE.sigma_min == pytest.approx(0.0291672, abs=5e-8)
    assert SCHEDULE.sigma_max == pytest.approx(14.6146412, abs=5e-8)
    assert len(SCHEDULE.sigmas) == len(SCHEDULE.alphas_cumprod) == 1000
    assert all(a < b for a, b in pairwise(SCHEDULE.sigmas))
    assert SCHEDULE.alphas_cumprod[0] == 1 - 0.00085


def test_timesteps_and_sigmas_invert_each_other():
    assert [SCHEDULE.timestep(sigma) for sigma in SCHEDULE.sigmas] == list(range(1000))
    assert [SCHEDULE.sigma(t) for t in range(1000)] == list(SCHEDULE.sigmas)
    for t in np.linspace(0, 999, 777):
        assert SCHEDULE.timestep(SCHEDULE.sigma(float(t))) == pytest.approx(t, abs=1e-8)


def test_between_timesteps_log_alpha_bar_is_linear():
    log = [math.log(a) for a in SCHEDULE.alphas_cumprod]
    for t in (0.25, 1.5, 500.9, 998.5):
        i, w = int(t), t - int(t)
        assert -math.log1p(SCHEDULE.sigma(t) ** 2) == pytest.approx(log[i] * (1 - w) + log[i + 1] * w, rel=1e-12)


def test_sigmas_beyond_the_trained_ones_have_the_timestep_of_the_nearest():
    assert SCHEDULE.timestep(0.0) == SCHEDULE.timestep(0.01) == 0
    assert SCHEDULE.timestep(20.0) == SCHEDULE.timestep(math.inf) == 999
    for sigma in (-1.0, math.nan):
        with pytest.raises(ValueError, match="noise level"):
            SCHEDULE.timestep(sigma)
    for t in (-0.1, 999.1, math.nan):
        with pytest.raises(ValueError, match="timestep"):
            SCHEDULE.sigma(t)


@pytest.mark.parametrize(
    "options", [{"start": 0}, {"start": 0.1, "end": 0.01}, {"end": 1.0}, {"steps": 0}, {"start": math.nan}]
)
def test_a_schedule_that_is_none_is_refused(options):
    with pytest.raises(ValueError, match="betas from"):
        Schedule(**options)


def test_zero_snr_keeps_the_first_level_and_ends_without_signal():
    """Lin et al. 2023, section 3.1: sqrt(alpha_bar) is shifted and scaled, so that the first stays and the last is 0
    (here: next to it)."""
    zero = Schedule(zero_snr=True)
    before, after = (np.sqrt(np.array(schedule.alphas_cumprod)) for schedule in (SCHEDULE, zero))
    assert after[0] == pytest.approx(before[0], rel=1e-15)
    assert after[-1] == 2**-12
    assert after[-1] < torch.finfo(torch.float16).eps / 2
    ratio = (after[:-1] - 0) / (before[:-1] - before[-1])
    assert ratio == pytest.approx(np.full(999, ratio[0]), rel=1e-12)
    assert zero.sigma_max == pytest.approx(4096, rel=1e-7)
    assert all(a < b for a, b in pairwise(zero.sigmas))
    assert all(a < b for a, b in pairwise(Schedule(zero_snr=True, steps=4000, end=0.012).sigmas))


def test_at_zero_snr_the_network_sees_noise_and_its_v_is_minus_x0():
    sigmas = GRIDS["trailing"](Schedule(zero_snr=True), 10)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x, sigma = start(noise, sigmas), sigmas[0]
    assert torch.allclose(x / math.sqrt(1 + sigma**2), noise, rtol=1e-6)
    v = torch.full_like(noise, 0.5)
    x0 = x / (1 + sigma**2) - v * sigma / math.sqrt(1 + sigma**2)
    assert torch.allclose(x0, -v, atol=4 * 2**-12)  # what is left of the signal, times the largest noise


def test_start_and_finish_scale_to_unit_variance():
    one = torch.ones(1, 4, 2, 2)
    assert torch.allclose(start(one, [3.0, 0.0]), one * math.sqrt(10))
    assert torch.allclose(finish(one, [3.0, 2.0]), one / math.sqrt(5))
    assert torch.equal(finish(one, [3.0, 0.0]), one)


def test_strength_keeps_the_end_of_the_grid():
    sigmas = GRIDS["karras"](SCHEDULE, 10)
    assert tail(sigmas, 1.0) == sigmas
    assert tail(sigmas, 0.6) == sigmas[4:]
    assert tail(sigmas, 0.1) == sigmas[9:]
    with pytest.raises(ValueError, match=r"give at least 0\.1, "):
        tail(sigmas, 0.09)
    for strength in (0, -0.5, 1.1, math.nan):
        with pytest.raises(ValueError, match="more than 0 and at most 1"):
            tail(sigmas, strength)


def test_the_least_strength_that_is_named_works():
    for steps in range(1, 1001):
        assert len(tail([float(steps - i) for i in range(steps + 1)], math.ceil(10000 / steps) / 10000)) >= 2


def test_a_picture_is_noised_to_where_its_tail_begins():
    sigmas = GRIDS["ddim"](SCHEDULE, 10)
    latent, noise = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 2.0)
    x, part = noised(latent, noise, sigmas, strength=0.5)
    assert part == sigmas[5:]
    assert torch.allclose(x, latent + noise * sigmas[5])
    x, part = noised(latent, noise, sigmas, strength=0.5, original=True)
    assert part == sigmas[5:]
    assert torch.allclose(x / math.sqrt(1 + part[0] ** 2), (latent + noise * sigmas[4]) / math.sqrt(1 + sigmas[4] ** 2))
    x, part = noised(latent, noise, sigmas, strength=1.0, original=True)
    assert part == sigmas[1:]
    with pytest.raises(ValueError, match="original=False"):
        noised(latent, noise, sigmas[-2:], strength=1.0, original=True)
