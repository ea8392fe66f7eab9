"""How what is frozen is held while a run learns."""

from __future__ import annotations

import pytest
import torch

from benchmarks.models.seeded import normal
from ldm.train import modes
from ldm.train.draws import Draws
from ldm.train.recipe import Method, Recipe, Run
from tests.made.families import build, tiny
from tests.made.pictures import batch_of


@pytest.mark.parametrize("dora", [False, True])
def test_frozen_matrices_held_in_half_precision_change_nothing(dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe("held", method=Method(kind="lora", rank=4, dora=dora), run=Run(dtype="bfloat16"))
    losses = []
    for hold in (modes.hold_in, lambda network, dtype: None):
        monkeypatch.setattr(modes, "hold_in", hold)
        made = modes.trainee(build(tiny("sd1")), recipe)
        for name, p in made.parameters.items():
            p.data.add_(0.02 * normal(name, tuple(p.shape)))
        assert (made.model.unet.out[2].weight.dtype == torch.bfloat16) == (not losses)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(made.task(batch_of(), Draws(0, [0, 1])).each)
    assert torch.equal(*losses)
