"""Which component of a diffusers folder holds which network, and which of its keys may be ignored, with the reason."""

from __future__ import annotations

import re
from collections.abc import Container

from ldm.config import ModelConfig
from weights.names import places as names
from weights.names.detect import Shown, shown
from weights.names.diffusers import (
    in_diffusers_unet,
    in_diffusers_vae,
    in_transformers_dpt,
    read_diffusers_unet,
    read_diffusers_vae,
)
from weights.names.layout import LEFTOVERS, POSITION_IDS, Layout, Part
from weights.names.sizes import Shapes

FOLDER = (
    POSITION_IDS,
    (r"text_encoder(_2)?/(text_model\.)?logit_scale", "temperature of CLIP's training loss"),
    (r"image_encoder/(text_model\..+|text_projection\.weight|logit_scale)",
     "text half of CLIP, which image variations do not use"),
    (r"text_encoder/text_projection\.weight",
     "projection of the pooled text, which no family reads of its first tower"),
    (r"vae/(loss|model_ema)\..+", "leftover of the VAE's training"),
    (r"safety_checker/.+", "safety checker, which is no part of the model"),
    (rf"{re.escape(LEFTOVERS)}/.+", "of the original file, and no picture is computed from it"),
)  # fmt: skip


def bare(folders: Container[str]) -> Layout:
    """The layout of those components of a diffusers folder whose names are the same in every model."""
    towers = [name for name in ("text_encoder", "text_encoder_2") if name in folders]  # the refiner has only the second
    parts = [Part(f"text.{i}.", f"{name}/", names.hugging_face) for i, name in enumerate(towers)]
    return Layout((*parts, Part("vision.", "image_encoder/", names.hugging_face_vision)), FOLDER)


def diffusers(config: ModelConfig, folders: Container[str]) -> Layout:
    """The layout of a diffusers folder with these components."""
    parts = [
        Part("unet.", "unet/", in_diffusers_unet(config.unet)),
        Part("vae.", "vae/", in_diffusers_vae(config.vae)),
    ]
    parts += bare(folders).parts
    if config.depth is not None:
        parts.append(Part("depth.", "depth_estimator/", in_transformers_dpt(config.depth)))
    return Layout(tuple(parts), FOLDER)


def shown_in_folder(shapes: Shapes) -> Shown:
    """The networks that the tensors of a folder show."""
    unet, vae = read_diffusers_unet(shapes, "unet/"), read_diffusers_vae(shapes, "vae/")
    return shown(shapes, bare({key.split("/")[0] for key in shapes}), unet, vae)
