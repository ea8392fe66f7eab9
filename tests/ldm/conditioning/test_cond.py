"""Conditions joined to batches, and the sizes on which SDXL is conditioned."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models.golden import relative
from benchmarks.models.seeded import golden
from ldm.conditioning.cond import Cond, Sizes, size_embedding
from ldm.errors import ArgumentError

TOLERANCE = 1e-5  # of the reference's rms, as in test_unet.py


def test_conditions_that_differ_in_kind_are_no_batch() -> None:
    context = torch.zeros(1, 77, 64)
    with pytest.raises(ArgumentError, match="all have y, or none"):
        Cond.cat([Cond(context), Cond(context, y=torch.zeros(1, 8))])


def test_conditions_of_one_kind_are_joined_in_order() -> None:
    joined = Cond.cat(
        [Cond(torch.zeros(1, 2, 3), y=torch.tensor([1])), Cond(torch.ones(2, 2, 3), y=torch.tensor([2, 3]))]
    )
    assert joined.context.shape == (3, 2, 3)
    assert joined.y.tolist() == [1, 2, 3]
    assert joined.concat is None


def test_sizes_are_embedded_as_in_the_original() -> None:
    file = golden("unet")
    assert relative(size_embedding(file["sdxl/sizes"]), file["sdxl/size_embedding_original_crop_target"]) < TOLERANCE


def test_a_vector_without_room_for_six_or_five_sizes_is_refused() -> None:
    with pytest.raises(ArgumentError, match="has room for 4 sizes; SDXL has 6, its refiner 5"):
        Sizes().numbers((64, 64), 4)
