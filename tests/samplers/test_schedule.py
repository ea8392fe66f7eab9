"""The trained schedule, the grids, and where pictures enter and leave them."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samplers import AYS_SD1, AYS_SDXL, GRIDS, Schedule, finish, noised, start, tail
from samplers.grids import beta_quantile

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "samplers.safetensors")
TIMESTEPS = json.loads((Path(__file__).parents[1] / "golden" / "samplers_timesteps.json").read_text())
SCHEDULE = Schedule()
ENDS_ABOVE_ZERO = ("ddim", "ddim_original", "dpm_solver")


def timesteps(grid: str, steps: int) -> list[float]:
    return [SCHEDULE.timestep(sigma) for sigma in GRIDS[grid](SCHEDULE, steps)[:-1]]


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
    """Lin et al. 2023, section 3.1: sqrt(alpha_bar) is shifted and scaled, so that the first stays and the last is 0 (here: next to it)."""
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


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 30, 50, 333, 500, 501, 999, 1000])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_falls_from_a_trained_level_in_as_many_steps_as_asked(grid, steps, zero_snr):
    schedule = Schedule(zero_snr=zero_snr)
    if grid == "ddim_original" and steps in (3, 333, 501, 999, 1000):
        with pytest.raises(ValueError, match=f"no {steps} steps"):
            GRIDS[grid](schedule, steps)
        return
    sigmas = GRIDS[grid](schedule, steps)
    assert all(type(sigma) is float and math.isfinite(sigma) for sigma in sigmas)
    assert all(a > b for a, b in pairwise(sigmas))
    assert sigmas[0] <= schedule.sigma_max * (1 + 1e-12)
    assert sigmas[-2] >= schedule.sigma_min * (1 - 1e-12)
    assert sigmas[-1] == (schedule.sigma_min if grid in ENDS_ABOVE_ZERO and (grid, steps) != ("ddim", 1000) else 0.0)
    if grid != "ddim_original":
        assert len(sigmas) == steps + 1


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid not in ("ddim", "ddim_original")])
def test_every_other_grid_begins_at_the_noisiest_level(grid):
    for steps in (1, 4, 30):
        assert GRIDS[grid](SCHEDULE, steps)[0] == pytest.approx(SCHEDULE.sigma_max, rel=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_counts_of_steps_that_cannot_be_are_refused(grid):
    for steps in (0, -1, 2.5, math.nan, True, "10"):
        with pytest.raises(ValueError, match="whole number from 1 to 1000"):
            GRIDS[grid](SCHEDULE, steps)
    with pytest.raises(ValueError, match=r"at most 1000 \(the model has 1000 training steps\)"):
        GRIDS[grid](SCHEDULE, 1001)


@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("grid", ["discrete", "karras"])
def test_k_diffusion_sigmas_are_met(grid, steps):
    """To the float32 that the originals were computed in: rho 7 multiplies its roundings."""
    assert torch.allclose(
        torch.tensor(GRIDS[grid](SCHEDULE, steps)), GOLDEN[f"k/sigmas/{grid}/{steps}"], rtol=2e-6, atol=0
    )


def test_the_original_timesteps_are_met():
    assert timesteps("ddim", 10) == timesteps("ddim_original", 10) == TIMESTEPS["ddim/eps/steps10/cfg1.0/eta0.0"]
    assert timesteps("ddim", 50) == timesteps("ddim_original", 50) == TIMESTEPS["ddim/eps/steps50/cfg1.0/eta0.0"]
    original = TIMESTEPS["dpmpp_2m_stability/eps/steps10/cfg1.0"]
    assert np.array(timesteps("dpm_solver", 10), dtype=np.float32).tolist() == original


def test_the_original_count_is_31_for_30_and_the_default_is_what_was_asked():
    assert timesteps("ddim_original", 30) == [float(t) for t in range(991, 0, -33)]
    assert timesteps("ddim", 30) == [float(t) for t in range(958, 0, -33)]


def test_where_the_original_would_fail_the_nearest_counts_are_named():
    for steps, near in ((3, "use 2 or 4"), (9, "use 8 or 10"), (36, "use 35 or 38"), (1000, "use 500")):
        with pytest.raises(ValueError, match=near):
            GRIDS["ddim_original"](SCHEDULE, steps)


def test_published_spacings_are_met():
    assert timesteps("trailing", 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]  # Lin et al. 2023, table 2
    assert timesteps("linspace", 10) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert timesteps("sgm_uniform", 10) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert timesteps("sgm_uniform", 4) == [999, 749, 499, 249]
    assert timesteps("simple", 4) == [999, 749, 499, 249]
    assert timesteps("trailing", 3) == [999, 666, 332]


def test_align_your_steps_meets_its_published_timesteps_and_sigmas():
    assert timesteps("ays", 10) == pytest.approx(AYS_SD1, abs=1e-6)
    assert timesteps("ays_sdxl", 10) == pytest.approx(AYS_SDXL, abs=1e-6)
    sd1 = [
        14.615,
        6.475,
        3.861,
        2.697,
        1.886,
        1.396,
        0.963,
        0.652,
        0.399,
        0.152,
    ]  # the authors' guide, three decimals of nearby levels
    assert GRIDS["ays"](SCHEDULE, 10)[:-1] == pytest.approx(sd1, rel=5e-3)
    ten, twenty = GRIDS["ays"](SCHEDULE, 10), GRIDS["ays"](SCHEDULE, 20)
    assert twenty[::2] == pytest.approx(ten)
    assert twenty[1] == pytest.approx(math.sqrt(ten[0] * ten[1]))


def test_polyexponential_with_rho_1_is_exponential():
    assert GRIDS["polyexponential"](SCHEDULE, 12) == GRIDS["exponential"](SCHEDULE, 12)
    ratios = [b / a for a, b in pairwise(GRIDS["exponential"](SCHEDULE, 12)[:-1])]
    assert ratios == pytest.approx([ratios[0]] * 11)
    assert GRIDS["polyexponential"](SCHEDULE, 12, rho=2.0)[6] < GRIDS["exponential"](SCHEDULE, 12)[6]


def test_beta_quantiles_are_those_of_known_distributions():
    p = np.linspace(0, 1, 101)
    assert beta_quantile(p, 1.0, 1.0) == pytest.approx(p, abs=1e-14)
    assert beta_quantile(p, 0.5, 0.5) == pytest.approx(np.sin(np.pi * p / 2) ** 2, abs=1e-14)  # arcsine
    assert beta_quantile(p, 2.0, 1.0) == pytest.approx(np.sqrt(p), abs=1e-14)
    assert beta_quantile(p, 1.0, 3.0) == pytest.approx(1 - (1 - p) ** (1 / 3), abs=1e-13)
    assert beta_quantile(p, 0.6, 0.6) == pytest.approx(1 - beta_quantile(1 - p, 0.6, 0.6), abs=1e-13)


def test_beta_timesteps_crowd_at_both_ends():
    t = timesteps("beta", 20)
    gaps = [a - b for a, b in pairwise(t)]
    assert t[0] == 999
    assert gaps[0] < gaps[10] / 2
    assert gaps[-1] < gaps[10]


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
