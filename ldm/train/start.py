"""The start of a run: the model as its recipe changes it before it learns, and its pictures of the class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

from ldm import tasks
from ldm.changes import surgery
from ldm.model import LatentDiffusion
from ldm.pictures.write import save
from ldm.targets import write_text
from ldm.train.data.opening import missing_prior
from ldm.train.ranks import Ranks, barrier
from ldm.train.recipe import Data, Start, wrong_key


@dataclass(frozen=True)
class Files:
    """The functions of `weights` that a run uses; nothing in this package imports them."""

    load: Callable[..., LatentDiffusion]  # path, or None for the model that ships
    load_vae: Callable[..., Any]
    load_vision: Callable[..., Any]
    save: Callable[..., Path]  # (model, path, dtype=, overwrite=)
    convert: Callable[..., Any]  # (file, folder, overwrite=)
    save_lora: Callable[..., Path]
    save_embedding: Callable[..., Path]
    embedded: Callable[[], Path]  # the path of the model that ships
    digest: Callable[[Path], str]  # of the contents of a file or folder


def begin(start: Start, files: Files, recipe: str) -> LatentDiffusion:
    """The model of section [model] in float32, with the inputs, conditioner and prediction that it is to have.

    recipe  its name, for errors
    Raises ArgumentError, FileError.
    """
    model = files.load(start.start or None)
    if start.family and model.config.name != start.family:
        what = f"is of family {model.config.name}, and the recipe {recipe} trains {start.family}; give such a model"
        raise wrong_key("model.start", what)
    if start.vae:
        model.vae = files.load_vae(start.vae, model.config.vae)
    if start.vision:
        model = surgery.swap_conditioner(model, files.load_vision(start.vision))
    if start.widen:
        model = surgery.widen(model, start.widen)
    return with_prediction(model, start)


def with_prediction(model: LatentDiffusion, start: Start) -> LatentDiffusion:
    """The model, in place, with the prediction and schedule to learn. Raises ArgumentError for eps at zero SNR."""
    config = model.config
    if start.prediction and start.prediction != config.prediction:
        twin = config.twin(start.prediction)
        config = replace(config, prediction=start.prediction, name=config.name if twin is None else twin.name)
    if start.zero_snr:
        if config.prediction != "v":
            what = "this model predicts eps, which says nothing where there is no signal"
            raise wrong_key("model.zero_snr", f'{what}; set model.prediction to "v"')
        config = replace(config, schedule=replace(config.schedule, zero_snr=True))
        model.schedule = config.schedule
    model.config = config
    return model


def complete_prior(data: Data, load: Callable[[], LatentDiffusion], place: Ranks, say: Callable[[str], None]) -> None:
    """Make the pictures of the class that are missing, a share on each rank.

    load  gives the model that draws them: as it was before its inputs or its task were changed
    """
    unused = (seed for seed in count() if not prior_path(data, seed).exists())
    missing = list(islice(unused, missing_prior(data)))
    barrier(place)  # all have counted before any of them makes one
    if mine := missing[place.rank :: place.world]:
        say(f"making {len(missing)} pictures of {data.prior_caption!r}")
        draw_prior(load().to(place.device), data, mine)
    barrier(place)


def prior_path(data: Data, seed: int) -> Path:
    """The file of the picture of the class from this seed."""
    return Path(data.prior) / f"prior-{seed:05d}.png"


def draw_prior(model: LatentDiffusion, data: Data, seeds: Sequence[int]) -> None:
    """Make pictures of the class with their caption beside them, each from a seed of its own."""
    size = data.size or model.config.size
    for seed in seeds:
        (picture,) = tasks.txt2img(model, data.prior_caption, seeds=[seed], steps=25, height=size, width=size)
        path = prior_path(data, seed)
        write_text(path.with_suffix(".txt"), data.prior_caption)
        save(picture, path)
