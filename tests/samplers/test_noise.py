"""Noise is a function of (seed, draw) and of nothing else."""

from __future__ import annotations

import pytest
import torch

from samplers import seeded

SHAPE = (4, 8, 8)


def test_image_k_of_a_batch_draws_what_it_draws_alone():
    together = seeded([5, 6, 7])
    alone = [seeded([seed]) for seed in (5, 6, 7)]
    for _ in range(3):
        batch = together((3, *SHAPE))
        assert all(torch.equal(batch[k : k + 1], alone[k]((1, *SHAPE))) for k in range(3))


def test_the_same_seeds_give_the_same_draws_and_other_seeds_others():
    first, again, other = seeded([1, 2]), seeded([1, 2]), seeded([3, 2])
    a, b, c = first((2, *SHAPE)), again((2, *SHAPE)), other((2, *SHAPE))
    assert torch.equal(a, b)
    assert torch.equal(a[1], c[1])
    assert not torch.equal(a[0], c[0])
    assert not torch.equal(a, first((2, *SHAPE)))


def test_a_draw_is_what_torch_draws_on_the_cpu_from_that_seed():
    assert torch.equal(
        seeded([42])((1, *SHAPE)), torch.randn((1, *SHAPE), generator=torch.Generator("cpu").manual_seed(42))
    )


def test_draws_are_standard_normal_float32():
    draw = seeded(range(4))((4, 4, 64, 64))
    assert draw.dtype == torch.float32
    assert abs(draw.mean()) < 5 / draw.numel() ** 0.5  # five standard errors
    assert abs(draw.var() - 1) < 5 * (2 / draw.numel()) ** 0.5


def test_the_global_generator_neither_changes_the_noise_nor_is_changed_by_it():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    a = seeded([9])((1, *SHAPE))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(seeded([9])((1, *SHAPE)), a)


def test_the_device_dtype_and_number_of_threads_do_not_change_the_noise():
    before, a = torch.get_num_threads(), seeded([9])((1, *SHAPE))
    default = torch.get_default_dtype()
    try:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        assert torch.equal(seeded([9])((1, *SHAPE)), a)
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(default)


@pytest.mark.gpu
def test_noise_on_cuda_is_the_noise_of_the_cpu():
    there = seeded([9, 10], device="cuda")((2, *SHAPE))
    assert there.device.type == "cuda"
    assert torch.equal(there.cpu(), seeded([9, 10])((2, *SHAPE)))


@pytest.mark.parametrize("seed", [1.5, "7", None, True, 2**64, -(2**63) - 1])
def test_a_seed_that_is_no_64_bit_integer_is_refused(seed):
    with pytest.raises(ValueError, match="64"):
        seeded([seed])


@pytest.mark.parametrize("seed", [0, -1, 2**64 - 1, -(2**63)])
def test_every_64_bit_integer_is_a_seed(seed):
    assert seeded([seed])((1, *SHAPE)).isfinite().all()


def test_no_seeds_and_too_few_seeds_are_refused():
    with pytest.raises(ValueError, match="no seeds"):
        seeded([])
    with pytest.raises(ValueError, match="3 images, but 2 seeds"):
        seeded([1, 2])((3, *SHAPE))
