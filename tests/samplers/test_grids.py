"""The time grids: those of the original code, of k-diffusion, and published ones."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from samplers import AYS_SD1, AYS_SDXL, GRIDS, Schedule
from samplers.fitted import beta_quantile

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "samplers.safetensors")
TIMESTEPS = json.loads((Path(__file__).parents[1] / "golden" / "samplers_timesteps.json").read_text())
SCHEDULE = Schedule()
ENDS_ABOVE_ZERO = ("ddim", "ddim_original", "dpm_solver")


def timesteps(grid: str, steps: int) -> list[float]:
    return [SCHEDULE.timestep(sigma) for sigma in GRIDS[grid](SCHEDULE, steps)[:-1]]


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
