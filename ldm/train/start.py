"""What a run starts from: a model as its recipe changes it before anything is learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from ldm import tasks
from ldm.changes import surgery
from ldm.disk import write_text
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.pictures.write import save
from ldm.train.data.opening import missing_prior
from ldm.train.ranks import Ranks, all_agree
from ldm.train.recipe import Data, Recipe, Start


@dataclass(frozen=True)
class Files:
    """The functions of `weights` that a run uses; it imports none of them."""

    load: Callable[..., LatentDiffusion]  # path, or None for the model that ships
    load_vae: Callable[..., Any]
    load_vision: Callable[..., Any]
    save: Callable[..., Path]  # (model, path, dtype=, overwrite=)
    convert: Callable[..., Any]  # (file, folder, overwrite=)
    save_lora: Callable[..., Path]
    save_embedding: Callable[..., Path]
    embedded: Callable[[], Path]  # where the model that ships lies
    digest: Callable[[Path], str]  # of a file's or folder's contents


def begin(recipe: Recipe, files: Files) -> LatentDiffusion:
    """The model that the recipe names, in float32, with its inputs, conditioner and prediction as they are to be. Raises ArgumentError, FileError."""
    wanted = recipe.model
    model = files.load(wanted.start or None)
    if wanted.family and model.config.name != wanted.family:
        raise ArgumentError(
            f"model.start: is of family {model.config.name}, and the recipe {recipe.name} trains {wanted.family}; give such a model",
            key="model.start",
        )
    if wanted.vae:
        model.vae = files.load_vae(wanted.vae, model.config.vae)
    if wanted.vision:
        model = surgery.swap_conditioner(model, files.load_vision(wanted.vision))
    if wanted.widen:
        model = surgery.widen(model, wanted.widen)
    return told_to_predict(model, wanted)


def told_to_predict(model: LatentDiffusion, wanted: Start) -> LatentDiffusion:
    """The model, in place, with the prediction and the schedule that it is going to learn. Raises ArgumentError for eps without signal."""
    config = model.config
    if wanted.prediction and wanted.prediction != config.prediction:
        twin = config.twin(wanted.prediction)
        name = config.name if twin is None else twin.name
        config = replace(config, prediction=wanted.prediction, name=name)
    if wanted.zero_snr:
        if config.prediction != "v":
            raise ArgumentError(
                'model.zero_snr: this model predicts eps, which says nothing where there is no signal; set model.prediction to "v"',
                key="model.zero_snr",
            )
        config = replace(config, schedule=replace(config.schedule, zero_snr=True))
        model.schedule = config.schedule
    model.config = config
    return model


def complete_prior(recipe: Recipe, files: Files, place: Ranks, say: Callable[[str], None]) -> None:
    """Make the pictures of the class that are missing, a share on each rank, with the model as it was before its inputs or its task were changed."""
    data = recipe.data
    missing = list(
        islice((seed for seed in count() if not prior_path(data, seed).exists()), missing_prior(data))
    )  # the first seeds of which there is none yet
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
