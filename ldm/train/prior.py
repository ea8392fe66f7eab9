"""Pictures of a class, made by the model before it learns one particular thing of it (DreamBooth, Ruiz et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count, islice
from pathlib import Path

from ldm import tasks
from ldm.data.opening import missing_prior
from ldm.disk import write_text
from ldm.images import save
from ldm.model import LatentDiffusion
from ldm.recipe import Data, Recipe
from ldm.train.ranks import Ranks, all_agree
from ldm.train.start import Files


def complete_prior(recipe: Recipe, files: Files, place: Ranks, say: Callable[[str], None]) -> None:
    """Make the pictures of the class that are missing, a share on each rank, with the model as it was before its inputs or its task were changed."""
    data = recipe.data
    missing = list(islice((seed for seed in count() if not prior_path(data, seed).exists()), missing_prior(data)))  # the first seeds of which there is none yet
    all_agree("counted", place)  # before any of them makes one
    if mine := missing[place.rank :: place.world]:
        say(f"making {len(missing)} pictures of {data.prior_caption!r}")
        draw_prior(files.load(recipe.model.start or None).to(place.device), recipe, mine)
    all_agree("here", place)


def prior_path(data: Data, seed: int) -> Path:
    """Where the picture of the class from this seed lies."""
    return Path(data.prior) / f"prior-{seed:05d}.png"


def draw_prior(model: LatentDiffusion, recipe: Recipe, seeds: Sequence[int]) -> None:
    """Make pictures of the class with their caption beside them, each from a seed of its own."""
    data, size = recipe.data, recipe.data.size or model.config.size
    for seed in seeds:
        (picture,) = tasks.txt2img(model, data.prior_caption, seeds=[seed], steps=25, height=size, width=size)
        path = prior_path(data, seed)
        write_text(path.with_suffix(".txt"), data.prior_caption)
        save(picture, path)
