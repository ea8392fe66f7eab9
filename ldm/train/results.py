"""The results of a run: weights in the layouts that other programs read."""

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
from ldm.train.recipe import Method, Run
from ldm.train.start import Files


def result(model: LatentDiffusion, averaged: Mapping[str, Tensor]) -> LatentDiffusion:
    """The model with these values of its parameters, whole and on the CPU; all ranks call it."""
    state = {name: averaged[name] if name in averaged else whole(tensor) for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        made = LatentDiffusion(model.config)
    made.load_state_dict(state, assign=True)
    return made


def save_results(
    trainee: Trainee, averaged: Mapping[str, Tensor], method: Method, run: Run, out: Path, files: Files, ranks: Ranks
) -> list[Path]:
    """Write what was learnt into directory `out`; return the files and folders. All ranks call it, the first writes.

    averaged  the values of the parameters that changed
    model.safetensors in the original layout, diffusers/ as a folder; of a LoRA lora.safetensors in kohya's names and
    lora-diffusers.safetensors; of a new word embedding.safetensors. They replace those of an earlier end.
    """
    dtype = getattr(torch, run.save_dtype)
    model = trainee.model if method.kind in ("lora", "inversion") else result(trainee.model, averaged)
    if ranks.rank:
        return []
    if method.kind == "lora":
        learnt = changes(model, averaged)
        paths = {"kohya": out / "lora.safetensors", "diffusers": out / "lora-diffusers.safetensors"}
        return [
            files.save_lora(learnt, paths[dialect], model.config, dialect, dtype=dtype, overwrite=True)
            for dialect in run.formats or paths
        ]
    if method.kind == "inversion":
        word = as_embedding(method.token, averaged)
        return [files.save_embedding(word, out / "embedding.safetensors", model.config, overwrite=True)]
    formats, single, folder = run.formats or ("original",), out / "model.safetensors", out / "diffusers"
    files.save(model, single, dtype=dtype, overwrite=True)
    if "diffusers" in formats:
        files.convert(single, folder, overwrite=True)
    if "original" not in formats:
        single.unlink()
    return [path for name, path in (("original", single), ("diffusers", folder)) if name in formats]
