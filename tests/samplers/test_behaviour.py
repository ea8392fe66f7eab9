"""What holds for every solver: batches, single steps, inversion, reports, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import samplers
from benchmarks.models.mixture import SCHEDULE, exact, slope
from benchmarks.models.seeded import normal, weight
from samplers import DEFAULT_GRID, GRIDS, SAMPLERS, Schedule, Step, calls, ddim, ddpm, finish, seeded, start, watched

NOISY = [
    "ddpm",
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "lcm",
]


def convolution(x: Tensor, sigma: float) -> Tensor:
    """A denoiser that mixes pixels and channels, as a network does, and not images."""
    inner = x / math.sqrt(1 + sigma * sigma)
    mixed = F.conv2d(
        torch.tanh(F.conv2d(inner, weight("a.weight", (16, 4, 3, 3)), padding=1)),
        weight("b.weight", (4, 16, 3, 3)),
        padding=1,
    )
    return inner / math.sqrt(1 + sigma * sigma) + mixed * (sigma / (1 + sigma))


def test_the_registry_has_exactly_the_promised_names():
    assert " ".join(SAMPLERS) == (
        "ddim ddpm plms euler euler_ancestral heun dpm_2 dpm_2_ancestral lms dpmpp_2s_ancestral dpmpp_2m dpmpp_sde "
        "dpmpp_2m_sde dpmpp_3m_sde unipc lcm"
    )
    assert set(DEFAULT_GRID) == set(SAMPLERS)
    assert set(DEFAULT_GRID.values()) <= set(GRIDS)
    assert all(getattr(samplers, name) is SAMPLERS[name] for name in SAMPLERS)  # no module hides a function of its name


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name):
    """The noise is bit-equal; the result within 1e-5, since a convolution may add in another order in another batch."""
    seeds, sigmas = [11, 12, 13, 14], GRIDS[DEFAULT_GRID[name]](SCHEDULE, 6)
    options = {"eta": 1.0} if name == "ddim" else {}

    def sample(seeds: list[int]) -> tuple[Tensor, list[Tensor]]:
        draws, source = [], seeded(seeds)

        def noise(shape: tuple[int, ...]) -> Tensor:
            draws.append(source(shape))
            return draws[-1]

        x = start(noise((len(seeds), 4, 8, 8)), sigmas)
        return SAMPLERS[name](convolution, x, sigmas, noise=noise, **options), draws

    alone = [sample([seed]) for seed in seeds]
    for batch in ([0, 1], [2, 3], [0, 1, 2, 3], [3, 1]):
        out, draws = sample([seeds[k] for k in batch])
        for place, k in enumerate(batch):
            one, one_draws = alone[k]
            assert len(draws) == len(one_draws)
            assert all(torch.equal(many[place], single[0]) for many, single in zip(draws, one_draws, strict=True))
            assert (out[place] - one[0]).abs().max() < 1e-5 * one.square().mean().sqrt()
    assert len(draws) == 1 or name in [*NOISY, "ddim"]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", GRIDS)
def test_one_two_and_three_steps_work_with_every_grid(name, grid):
    for steps in (1, 2) if grid == "ddim_original" else (1, 2, 3):
        sigmas = GRIDS[grid](SCHEDULE, steps)
        out = finish(
            SAMPLERS[name](exact, start(normal("x_T", (1, 4, 4, 4)), sigmas), sigmas, noise=seeded([0])), sigmas
        )
        assert out.dtype == torch.float32
        assert out.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_single_step_to_zero_returns_x0(name):
    x = normal("x_T", (1, 4, 4, 4)) * 14
    out = SAMPLERS[name](exact, x, [14.0, 0.0], noise=seeded([0]))
    assert torch.allclose(out, exact(x, 14.0), atol=14 * 2**-22)  # a few roundings of x


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_network_call_is_reported_before_its_result_is_used(name):
    seen: list[Step] = []
    asked: list[tuple[Tensor, float]] = []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        asked.append((x, sigma))
        assert len(seen) == len(asked) - 1
        return exact(x, sigma)

    sigmas = GRIDS["karras"](SCHEDULE, 5)
    x, total = normal("x_T", (1, 4, 4, 4)) * sigmas[0], calls(name, sigmas)
    plain = SAMPLERS[name](exact, x, sigmas, noise=seeded([0]))
    assert torch.equal(SAMPLERS[name](watched(denoise, seen.append, total), x, sigmas, noise=seeded([0])), plain)
    assert [(step.index, step.total) for step in seen] == [(i, total) for i in range(total)]
    assert all(step.x is x and step.sigma == sigma for step, (x, sigma) in zip(seen, asked, strict=True))
    assert all(torch.equal(step.x0, exact(step.x, step.sigma)) for step in seen)
    assert torch.equal(seen[0].x, x)
    assert {*sigmas[:-1]} <= {step.sigma for step in seen}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_solver_leaves_its_input_and_the_global_generator_alone(name):
    x = normal("x_T", (1, 4, 4, 4)) * 14
    before, state = x.clone(), torch.get_rng_state()
    SAMPLERS[name](exact, x, [14.0, 3.0, 1.0, 0.0], noise=seeded([0]))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NOISY)
def test_a_sampler_that_needs_noise_says_so(name):
    with pytest.raises(ValueError, match=r"pass noise=samplers\.seeded"):
        SAMPLERS[name](exact, normal("x_T", (1, 4, 4, 4)), [14.0, 3.0, 1.0])


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_refused_on_the_way_up(name):
    with pytest.raises(ValueError, match="eta=0"):
        SAMPLERS[name](exact, normal("x_T", (1, 4, 4, 4)), [1.0, 3.0, 14.0], noise=seeded([0]))


@pytest.mark.parametrize(
    "sigmas", [[], [1.0], [1.0, 1.0], [2.0, 3.0, 1.0], [0.0, 1.0], [math.inf, 1.0], [math.nan, 1.0], [1.0, -1.0]]
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_grid_that_is_none_is_refused(name, sigmas):
    with pytest.raises(ValueError, match=r"grid|sigma"):
        SAMPLERS[name](exact, normal("x_T", (1, 4, 4, 4)), sigmas, noise=seeded([0]))


@pytest.mark.parametrize(
    "name",
    ["ddim", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"],
)
def test_a_negative_eta_is_refused(name):
    with pytest.raises(ValueError, match="eta is -1"):
        SAMPLERS[name](exact, normal("x_T", (1, 4, 4, 4)), [14.0, 3.0, 1.0], eta=-1, noise=seeded([0]))


def test_ddim_with_eta_1_is_ddpm():
    """Song et al. 2021, section 4.1; the two are written from different formulas."""
    sigmas = GRIDS["ddim"](SCHEDULE, 20)
    x = normal("x_T", (2, 4, 8, 8)).double() * sigmas[0]
    assert torch.allclose(
        ddim(exact, x, sigmas, eta=1.0, noise=seeded([1, 2])),
        ddpm(exact, x, sigmas, noise=seeded([1, 2])),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("ddim", "euler"),
        ("euler_ancestral", "euler"),
        ("dpm_2_ancestral", "dpm_2"),
        ("dpmpp_sde", "dpmpp_2s_ancestral"),
        ("dpmpp_2m_sde", "dpmpp_2m"),
    ],
)
def test_without_noise_the_stochastic_solver_is_the_plain_one(name, plain):
    sigmas = GRIDS["karras"](SCHEDULE, 12)
    x = normal("x_T", (1, 4, 8, 8)).double() * sigmas[0]
    options = {"eta": 0.0} if plain == "dpmpp_2s_ancestral" else {}
    assert torch.allclose(
        SAMPLERS[name](exact, x, sigmas, eta=0.0), SAMPLERS[plain](exact, x, sigmas, **options), rtol=1e-12, atol=1e-12
    )


def test_s_noise_scales_the_fresh_noise_alone():
    sigmas, x = [10.0, 1.0, 0.5], normal("x_T", (1, 4, 4, 4))
    for name in (
        "euler_ancestral",
        "dpm_2_ancestral",
        "dpmpp_2s_ancestral",
        "dpmpp_sde",
        "dpmpp_2m_sde",
        "dpmpp_3m_sde",
    ):
        silent = SAMPLERS[name](exact, x, sigmas, s_noise=0.0, noise=seeded([0]))
        assert torch.equal(silent, SAMPLERS[name](exact, x, sigmas, noise=lambda shape: torch.zeros(tuple(shape))))


def test_ddim_inversion_comes_back_the_closer_the_smaller_the_steps():
    """Up and down again along the same grid: each way errs in first order, by opposite amounts to first order in the
    step."""
    latent = exact(normal("x0", (1, 4, 8, 8)).double() * 1.5, 0.3)

    def error(steps: int) -> float:
        sigmas = GRIDS["ddim"](SCHEDULE, steps)
        there = ddim(exact, latent, sigmas[::-1])
        return (ddim(exact, there, sigmas) - latent).square().mean().sqrt().item()

    assert error(200) < 0.02
    assert slope(error, (50, 100, 200)) == pytest.approx(1, abs=0.2)


def test_inversion_cannot_begin_at_zero():
    with pytest.raises(ValueError, match="drop the 0"):
        ddim(exact, normal("x0", (1, 4, 8, 8)), GRIDS["karras"](SCHEDULE, 5)[::-1])


def test_network_calls_are_counted_not_written_down():
    ten = GRIDS["karras"](SCHEDULE, 10)
    assert {name: calls(name, ten) for name in SAMPLERS} == dict.fromkeys(SAMPLERS, 10) | dict.fromkeys(
        ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"), 19
    ) | {"plms": 11}
    assert calls("heun", GRIDS["ddim"](SCHEDULE, 10)) == 20  # the original grids do not end at 0
    assert calls("dpm_2_ancestral", ten, eta=1e3) == 10  # all of the noise is fresh: each step goes down to 0 first


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", ["trailing", "karras", "ddim", "dpm_solver", "discrete"])
def test_a_zero_snr_schedule_keeps_float32_as_exact_as_float64(name, grid):
    """At sigma 4096, x = x0 + sigma * noise holds x0 only to 4096 roundings; the result must not: 1e-5 of its size.

    plms and lms add up stored slopes, whose float32 roundings a step in the thousands does multiply: 1e-4, a tenth of
    float16's."""
    sigmas = GRIDS[grid](Schedule(zero_snr=True), 12)
    x = start(normal("x_T", (1, 4, 8, 8)), sigmas)
    single, double = (
        SAMPLERS[name](exact, x.to(dtype), sigmas, noise=seeded([0])) for dtype in (torch.float32, torch.float64)
    )
    assert single.isfinite().all()
    limit = 1e-4 if name in ("plms", "lms") else 1e-5
    assert (single - double).square().mean().sqrt() < limit * double.square().mean().sqrt()
