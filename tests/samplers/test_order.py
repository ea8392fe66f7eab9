"""How fast each solver converges on the analytic mixture, in float64, against its paper's order."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.models.mixture import exact, slope
from samplers import SAMPLERS

HIGH, LOW = 10.0, 0.1
STEPS = (40, 80, 160)


def x_high() -> Tensor:
    return torch.linspace(-20, 20, 24, dtype=torch.float64).reshape(1, 1, 4, 6)


def geometric(steps: int) -> list[float]:
    return np.geomspace(HIGH, LOW, steps + 1).tolist()


def even(steps: int) -> list[float]:
    return np.linspace(HIGH, LOW, steps + 1).tolist()


@cache
def solution(steps: int = 3000) -> Tensor:
    """The probability flow from HIGH to LOW by classical Runge-Kutta in log sigma, dx / dlog sigma = x - x0: none of
    the solvers' own code."""
    x, h = x_high(), math.log(LOW / HIGH) / steps

    def f(log: float, x: Tensor) -> Tensor:
        return x - exact(x, math.exp(log))

    for i in range(steps):
        log = math.log(HIGH) + i * h
        k1 = f(log, x)
        k2 = f(log + h / 2, x + k1 * (h / 2))
        k3 = f(log + h / 2, x + k2 * (h / 2))
        k4 = f(log + h, x + k3 * h)
        x = x + (k1 + 2 * k2 + 2 * k3 + k4) * (h / 6)
    return x


def test_the_reference_solution_is_exact_to_rounding():
    assert (solution(3000) - solution(1500)).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("ddim", {}, 1),
        ("euler", {}, 1),
        ("euler_ancestral", {"eta": 0.0}, 1),
        ("heun", {}, 2),
        ("dpm_2", {}, 2),
        ("dpm_2_ancestral", {"eta": 0.0}, 2),
        ("dpmpp_2s_ancestral", {"eta": 0.0}, 2),
        ("dpmpp_2m", {}, 2),
        ("dpmpp_sde", {"eta": 0.0}, 2),
        ("dpmpp_2m_sde", {"eta": 0.0}, 2),
        (
            "dpmpp_3m_sde",
            {"eta": 0.0},
            2,
        ),  # not 3: the published coefficient of the second difference is half of Newton's
        ("lms", {"order": 1}, 1),
        ("lms", {"order": 2}, 2),
        ("plms", {}, 2),  # its weights are those of equal steps; see below
        ("unipc", {"order": 1, "lower_order_final": False}, 2),  # p + 1: the corrector adds one
        ("unipc", {"order": 2, "lower_order_final": False}, 3),
        ("unipc", {"order": 3, "lower_order_final": False}, 4),
        ("unipc", {"order": 2}, 2),
    ],
)
def test_a_solver_converges_with_the_order_of_its_paper(name, options, order):
    def error(steps: int) -> float:
        return (SAMPLERS[name](exact, x_high(), geometric(steps), **options) - solution()).square().mean().sqrt().item()

    assert slope(error, STEPS) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ["plms", "lms"])
def test_four_step_multistep_is_nearly_of_fourth_order_on_equal_steps(name):
    """The first steps are of lower order, where the slope hardly changes: they cost a tenth or two of the fourth."""

    def error(steps: int) -> float:
        return (SAMPLERS[name](exact, x_high(), even(steps)) - solution()).square().mean().sqrt().item()

    assert slope(error, (80, 160, 320)) > 3.6


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("ddim", 1), ("ddpm", 1), ("euler_ancestral", 1), ("dpmpp_sde", 1), ("dpm_2_ancestral", 2),
        ("dpmpp_2s_ancestral", 2), ("dpmpp_2m_sde", 2), ("dpmpp_3m_sde", 2),
    ],
)  # fmt: skip
def test_a_stochastic_solver_ends_with_the_variance_of_the_data(name, order):
    """For Gaussian data the result is linear in the start and in every draw: its variance is the sum of the squared
    responses to each alone."""
    data = 0.25

    def variance(steps: int) -> float:
        sigmas = geometric(steps)
        x = torch.zeros(
            2 * steps + 1, 1, 1, 1, dtype=torch.float64
        )  # element 0 responds to the start, element k to draw k
        x[0] = math.sqrt(data + HIGH**2)
        count = 0

        def impulse(shape: tuple[int, ...]) -> Tensor:
            nonlocal count
            count += 1
            one = torch.zeros(tuple(shape), dtype=torch.float64)
            one[count] = 1
            return one

        options = {"eta": 1.0} if name == "ddim" else {}
        out = SAMPLERS[name](lambda x, sigma: x * (data / (data + sigma**2)), x, sigmas, noise=impulse, **options)
        return out.square().sum().item()

    assert slope(lambda steps: abs(variance(steps) - data - LOW**2), STEPS) == pytest.approx(order, abs=0.2)


def test_lcm_with_a_consistency_function_lands_on_the_data_in_one_step_and_in_four():
    """The exact flow of Gaussian data from sigma to 0 is x * sqrt(d / (d + sigma^2)): any number of steps must give
    variance d."""
    data, x = 0.25, torch.randn(200_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for sigmas in ([14.6, 0.0], [14.6, 4.0, 1.0, 0.3, 0.0]):
        out = SAMPLERS["lcm"](
            lambda x, sigma: x * math.sqrt(data / (data + sigma**2)),
            x * math.sqrt(data + 14.6**2),
            sigmas,
            noise=lambda shape: torch.randn(tuple(shape), generator=generator),
        )
        assert out.var().item() == pytest.approx(data, rel=5 * math.sqrt(2 / 200_000))  # five standard errors
