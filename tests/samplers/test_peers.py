"""Solvers that have no golden run, against diffusers' on the same analytic network, where diffusers is installed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.models.mixture import SCHEDULE, SHAPE, network
from benchmarks.models.seeded import normal
from samplers import lcm, unipc
from samplers.ddim import ddpm

diffusers = pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def eps(x: Tensor, t: float) -> Tensor:
    return network("eps", x, t, 0.5 * normal("cond", SHAPE))


def denoise(x: Tensor, sigma: float) -> Tensor:
    return x - eps(x / math.sqrt(1 + sigma * sigma), SCHEDULE.timestep(sigma)) * sigma


def theirs(scheduler, **options) -> Tensor:
    """Their loop, on x / sqrt(1 + sigma^2)."""
    x = normal("x_T", SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, float(t)), t, x, **options).prev_sample
    return x


def sigma(t: int) -> float:
    return SCHEDULE.sigmas[int(t)]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_unipc_is_diffusers_unipc(order, end):
    """To 3e-6: their alphas are a float32 product of a thousand factors, off by 1e-6."""
    scheduler = diffusers.UniPCMultistepScheduler(
        **BETAS,
        solver_order=order,
        solver_type="bh2",
        final_sigmas_type=end,
        timestep_spacing="trailing",
        lower_order_final=True,
    )
    scheduler.set_timesteps(12)
    sigmas = [sigma(t) for t in scheduler.timesteps] + [0.0 if end == "zero" else SCHEDULE.sigma_min]
    x = normal("x_T", SHAPE) * math.sqrt(1 + sigmas[0] ** 2)
    ours = unipc(denoise, x, sigmas, order=order) / math.sqrt(1 + sigmas[-1] ** 2)
    assert relative(ours, theirs(scheduler)) < 3e-6


def test_ddpm_is_diffusers_ddpm():
    scheduler = diffusers.DDPMScheduler(
        **BETAS, variance_type="fixed_small", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(20)
    sigmas = [sigma(t) for t in scheduler.timesteps] + [0.0]
    generator = torch.Generator().manual_seed(3)
    x = normal("x_T", SHAPE) * math.sqrt(1 + sigmas[0] ** 2)
    ours = ddpm(denoise, x, sigmas, noise=lambda shape: torch.randn(tuple(shape), generator=generator))
    assert relative(ours, theirs(scheduler, generator=torch.Generator().manual_seed(3))) < 3e-6


def test_lcm_is_diffusers_lcm():
    """But for their skip weight, which is 0 here: c_skip below 3e-6 and c_out within 1e-6 of 1 at every timestep of
    theirs."""
    scheduler = diffusers.LCMScheduler(**BETAS, original_inference_steps=50, set_alpha_to_one=True)
    scheduler.set_timesteps(4)
    sigmas = [sigma(t) for t in scheduler.timesteps] + [0.0]
    generator = torch.Generator().manual_seed(3)
    x = normal("x_T", SHAPE) * math.sqrt(1 + sigmas[0] ** 2)
    ours = lcm(denoise, x, sigmas, noise=lambda shape: torch.randn(tuple(shape), generator=generator))
    assert relative(ours, theirs(scheduler, generator=torch.Generator().manual_seed(3))) < 3e-6
