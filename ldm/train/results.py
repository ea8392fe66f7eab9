"""What a run leaves: weights in the layouts that other programs read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.changes.inversion import as_embedding
from ldm.changes.lora_layers import changes
from ldm.model import LatentDiffusion
from ldm.train.modes import Trainee
from ldm.train.ranks import Ranks, whole
from ldm.train.recipe import Recipe
from ldm.train.start import Files


def result(model: LatentDiffusion, averaged: Mapping[str, Tensor]) -> LatentDiffusion:
    """The model with these values of its parameters, on the CPU, whole where it is shared among ranks: all of them call this."""
    state = {name: averaged[name] if name in averaged else whole(tensor) for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        made = LatentDiffusion(model.config)
    made.load_state_dict(state, assign=True)
    return made


def save_results(
    trainee: Trainee, averaged: Mapping[str, Tensor], recipe: Recipe, out: Path, files: Files, ranks: Ranks
) -> list[Path]:
    """Write what was learnt, with these values of the parameters, into directory `out`; return the files and folders. All ranks call it, the first writes.

    model.safetensors in the original layout, diffusers/ as a folder; of a LoRA lora.safetensors in kohya's names and lora-diffusers.safetensors;
    of a new word embedding.safetensors. What is there from an earlier end of the same run is replaced.
    """
    dtype, kind = getattr(torch, recipe.run.save_dtype), recipe.method.kind
    model = trainee.model if kind in ("lora", "inversion") else result(trainee.model, averaged)
    if ranks.rank:
        return []
    if kind == "lora":
        learnt = changes(model, averaged)
        spelled = {"kohya": out / "lora.safetensors", "diffusers": out / "lora-diffusers.safetensors"}
        return [
            files.save_lora(learnt, spelled[to], model.config, to, dtype=dtype, overwrite=True)
            for to in recipe.run.formats or ("kohya", "diffusers")
        ]
    if kind == "inversion":
        word = as_embedding(recipe.method.token, averaged)
        return [files.save_embedding(word, out / "embedding.safetensors", model.config, overwrite=True)]
    formats, written = recipe.run.formats or ("original",), []
    single = out / "model.safetensors"
    files.save(model, single, dtype=dtype, overwrite=True)
    if "diffusers" in formats:
        files.convert(single, out / "diffusers", overwrite=True)
        written.append(out / "diffusers")
    if "original" in formats:
        return [single, *written]
    single.unlink()
    return written
