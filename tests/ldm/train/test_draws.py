"""What is drawn at random: by seed, example and purpose alone."""

from __future__ import annotations

import pytest
import torch

import weights
from ldm.model import LatentDiffusion
from ldm.train.draws import Draws
from ldm.train.recipe import Objective
from ldm.train.tasks import Diffusion


@pytest.fixture(scope="module")
def shipped() -> LatentDiffusion:
    return weights.load()


def test_what_is_drawn_depends_on_seed_example_and_purpose_alone() -> None:
    both, second = Draws(3, [7, 8]), Draws(3, [8])
    assert torch.equal(both.normal("noise", (2, 2))[1:], second.normal("noise", (2, 2)))
    assert torch.equal(both.integers("timestep", 1000)[1:], second.integers("timestep", 1000))
    for other in (
        Draws(4, [8]).normal("noise", (9,)),
        Draws(3, [9]).normal("noise", (9,)),
        second.normal("offset", (9,)),
    ):
        assert not torch.equal(second.normal("noise", (9,)), other)
    u = Draws(0, range(2000)).uniform("caption")
    assert 0 <= u.min() < 0.01
    assert 0.99 < u.max() < 1


def test_every_micro_batch_sees_all_noise_levels_in_time(shipped: LatentDiffusion) -> None:
    """Every other one may be of other pictures: were the parts dealt out in order, those would never see much noise, or
    little."""
    task = Diffusion(shipped, Objective(timesteps="spread"), batch=8)
    seen = (
        torch.stack([task.timesteps(Draws(0, range(8 * update, 8 * update + 4))) for update in range(500)]) * 8 // 1000
    )
    assert torch.bincount(seen.flatten(), minlength=8).tolist() == pytest.approx(
        [250] * 8, abs=5 * (250 * 0.5) ** 0.5
    )  # five deviations of 500 coins
    alone = [task.timesteps(Draws(0, [i])).item() for i in range(24, 32)]
    assert alone == task.timesteps(Draws(0, range(24, 32))).tolist(), "whatever is at once"


def test_timesteps_are_drawn_alone_or_one_from_each_part(shipped: LatentDiffusion) -> None:
    draws = Draws(0, range(16, 32))
    spread = Diffusion(shipped, Objective(timesteps="spread"), batch=16).timesteps(draws)
    assert sorted(t * 16 // 1000 for t in spread.tolist()) == list(range(16))
    uniform = Diffusion(shipped, Objective()).timesteps(Draws(0, range(4000)))
    assert uniform.min() < 5
    assert uniform.max() > 994
    assert uniform.float().mean() == pytest.approx(499.5, abs=3 * 288.7 / 4000**0.5)
