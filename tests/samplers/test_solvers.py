"""Every solver against the original implementation's run on the analytic network (origin of the data:
tests/golden/README.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.models.mixture import RUNS, SCHEDULE, SHAPE, TIMESTEPS, run
from benchmarks.models.seeded import golden, normal
from samplers import GRIDS, finish, noised

GOLDEN = golden("samplers")


def error(out: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference, relative to the reference's."""
    return ((out - reference).square().mean() / reference.square().mean()).sqrt().item()


def test_the_golden_file_holds_the_runs_that_are_tested_here():
    assert len(RUNS) == 63
    assert torch.equal(GOLDEN["x_T"], normal("x_T", SHAPE))
    assert torch.equal(GOLDEN["cond"], 0.5 * normal("cond", SHAPE))


@pytest.mark.parametrize("key", RUNS)
def test_every_solver_does_what_the_original_did(key):
    """DDIM, PLMS and DPM++ 2M to 1.5e-6, a dozen float32 roundings. The rest to 1e-5: with guidance 5 elements near the
    border between the two modes are driven apart, so that a nudge of x_T by one rounding (1.2e-7) already moves the
    result by up to 19 times as much, and a run rounds dozens of times. Both sides are equally far from the same run in
    float64 (at most 3e-6)."""
    out, timesteps = run(key)
    assert error(out, GOLDEN[key]) < (
        1.5e-6 if key.startswith(("ddim", "plms", "dpmpp_2m_stability", "k/dpmpp_2m/", "img2img")) else 1e-5
    )
    if not key.startswith("k/"):
        assert timesteps == TIMESTEPS[key]


def test_the_original_img2img_noises_one_step_beyond_where_it_starts():
    sigmas = GRIDS["ddim"](SCHEDULE, 50)
    latent, noise = normal("init_latent", SHAPE), normal("enc_noise", SHAPE)
    x, tail = noised(latent, noise, sigmas, strength=0.6, original=True)
    assert error(finish(x, tail[:1]), GOLDEN["img2img/encoded_strength0.6"]) < 3e-7
    straight, same_tail = noised(latent, noise, sigmas, strength=0.6)
    assert tail == same_tail
    assert error(finish(straight, tail[:1]), GOLDEN["img2img/encoded_strength0.6"]) > 1e-2
