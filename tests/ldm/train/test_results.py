"""What a run leaves, where the model that learnt is in one piece and where ranks share it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import weights
from ldm.train.modes import trainee
from ldm.train.ranks import ranks, share, whole
from ldm.train.recipe import Method, Recipe, Run
from ldm.train.results import save_results
from tests.made.families import build, tiny
from tests.made.forked import succeed, together

RECIPE = Recipe("left", method=Method(targets="attn2"), run=Run(save_dtype="float32"))


def saved(out: Path, how: str | None = None) -> None:
    """Save a model whose cross-attention has learnt that every number is 1 more, on as many ranks as there are."""
    with ranks("cpu") as place:
        made = trainee(build(tiny("sd1")), RECIPE)
        if how is not None:
            share(made.task, how, place)
        learnt = {name: whole(p) + 1 for name, p in made.parameters.items()}
        paths = save_results(made, learnt, RECIPE.method, RECIPE.run, out, SimpleNamespace(save=weights.save), place)
        assert paths == ([] if place.rank else [out / "model.safetensors"])


@pytest.mark.parametrize("how", [None, "ddp", "fsdp"])
def test_what_is_saved_is_the_whole_model_with_what_was_learnt(how: str | None, tmp_path: Path) -> None:
    if how is None:
        saved(tmp_path)
    else:
        with together(saved, tmp_path, how, world=2, said=tmp_path / "said") as processes:
            succeed(processes, tmp_path / "said")
    before, after = build(tiny("sd1")).state_dict(), weights.load(tmp_path / "model.safetensors").state_dict()
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name], value + 1 if "unet." in name and "attn2" in name else value)
        for name, value in before.items()
    )
