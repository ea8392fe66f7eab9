"""A whole model into a file, under the names of the original checkpoints of its make."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ldm.config import ModelConfig
from ldm.model import LatentDiffusion
from weights.files.write import pending, write
from weights.names.layout import Layout, Part
from weights.names.metadata import CONFIG_KEY, to_json
from weights.names.places import Place, joined, openai_vision, openclip
from weights.names.prediction import marks


def published(config: ModelConfig) -> Layout:
    """The layout in which models of this make were published: where `save` puts their parameters."""
    parts = [Part("unet.", "model.diffusion_model."), Part("vae.", "first_stage_model.")]
    last = len(config.text) - 1
    for i in range(len(config.text)):
        prefix = f"conditioner.embedders.{i}." if config.unet.vector_dim is not None else "cond_stage_model."
        by_openclip = config.unet.linear_proj and i == last  # SD 1 and the first tower of SDXL have OpenAI's CLIP
        parts.append(
            Part(f"text.{i}.", f"{prefix}model.", openclip)
            if by_openclip
            else Part(f"text.{i}.", f"{prefix}transformer.")
        )
    if config.vision is not None:
        parts.append(Part("vision.", "cond_stage_model.model.visual.", openai_vision))
    parts.append(Part("depth.", "depth_model.model."))
    return Layout(tuple(parts), ())


def original_state(model: LatentDiffusion) -> dict[str, Tensor]:
    """The model's parameters under their names in the original checkpoints of its make.

    The tensors are the model's own, except where the original has another form: OpenCLIP's attention and projections.
    """
    layout = published(model.config)
    gathered: dict[str, list[tuple[Place, Tensor]]] = {}
    for name, tensor in model.state_dict().items():
        place = layout.places(name)[0]
        gathered.setdefault(place.key, []).append((place, tensor.detach()))
    return {key: joined(key, parts) for key, parts in gathered.items()}


def save(
    model: LatentDiffusion, path: str | PathLike[str], metadata: Mapping[str, str] | None = None, *,
    dtype: torch.dtype | None = torch.float16, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write a checkpoint that `load` and other tools for its family read, under the original names.

    dtype     of all numbers; None: as they are
    metadata  text by name, added to our own

    A model of zero terminal SNR also gets the marks by which other tools know one: the empty tensors v_pred and ztsnr.

    All or nothing: a temporary file beside it takes the place of `path` when it is complete and on the disk.
    Raises OutputError, also where `path` exists and `overwrite` is false.
    """
    tensors = {name: pending(tensor, dtype) for name, tensor in original_state(model).items()}
    tensors |= {mark: pending(torch.zeros(0)) for mark in marks(model.config)}
    return write(
        tensors, path, {"format": "pt", CONFIG_KEY: to_json(model.config), **(metadata or {})}, overwrite=overwrite
    )
