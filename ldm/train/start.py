"""What a run starts from: a model as its recipe changes it before anything is learnt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm import surgery
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.recipe import Recipe, Start
from samplers import Schedule


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
        raise ArgumentError(f"model.start: is of family {model.config.name}, and the recipe {recipe.name} trains {wanted.family}; give such a model", key="model.start")
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
        name = {"sd2-base": "sd2-v", "sd2-v": "sd2-base"}.get(config.name, config.name)  # the families that differ in this alone
        config = replace(config, prediction=wanted.prediction, name=name)
    if wanted.zero_snr:
        if config.prediction != "v":
            raise ArgumentError('model.zero_snr: this model predicts eps, which says nothing where there is no signal; set model.prediction to "v"', key="model.zero_snr")
        config = replace(config, schedule=replace(config.schedule, zero_snr=True))
        model.schedule = Schedule(config.schedule.start, config.schedule.end, config.schedule.steps, zero_snr=True)
    model.config = config
    return model
