"""The names of the original code, OpenCLIP, OpenAI's CLIP and transformers for the parameters that `ldm` names."""

from __future__ import annotations

import re
from collections.abc import Callable

from weights.names.places import Place

Places = Callable[[str], tuple[Place, ...]]  # our name inside a network -> where it may lie, under each known spelling


def ema(key: str) -> str:
    """Where the original's LitEma keeps the moving average of `key`, which must begin with `model.`.

    It is stored under the name inside `self.model` without any dots, so this can be computed but not inverted.
    """
    return "model_ema." + key.removeprefix("model.").replace(".", "")


# --- the original code ----------------------------------------------------------------------------------------------


def same(name: str) -> tuple[Place, ...]:
    """Networks whose published names are ours."""
    return (Place(name),)


def vae(name: str) -> tuple[Place, ...]:
    """The VAE. Some converters have stored its attention's 1x1 convolutions as matrices."""
    return (Place(name, "kernel" if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) else "whole"),)


def hugging_face(name: str) -> tuple[Place, ...]:
    """A text tower of transformers, some old and very new versions of which leave `text_model.` out."""
    bare = name.removeprefix("text_model.")
    return (Place(name),) if bare == name else (Place(name), Place(bare))


def hugging_face_vision(name: str) -> tuple[Place, ...]:
    """A vision tower of transformers, with `vision_model.` or without."""
    bare = name.removeprefix("vision_model.")
    return (Place(name),) if bare == name else (Place(name), Place(bare))


def doubled_vision(name: str) -> tuple[Place, ...]:
    """The safety checker.

    Its vision tower's prefix is doubled in the published file; newer versions of transformers write it once.
    """
    bare = name.removeprefix("vision_model.")
    return (Place(name),) if bare == name else (Place(name), Place(bare))


_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TEXT = {"text_model.embeddings.token_embedding.weight": "token_embedding.weight",
         "text_model.embeddings.position_embedding.weight": "positional_embedding",
         "text_model.final_layer_norm.weight": "ln_final.weight",
         "text_model.final_layer_norm.bias": "ln_final.bias"}  # fmt: skip
_VISION = {"vision_model.embeddings.class_embedding": "class_embedding",
           "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
           "vision_model.embeddings.position_embedding.weight": "positional_embedding",
           "vision_model.pre_layrnorm.weight": "ln_pre.weight",
           "vision_model.pre_layrnorm.bias": "ln_pre.bias", "vision_model.post_layernorm.weight": "ln_post.weight",
           "vision_model.post_layernorm.bias": "ln_post.bias"}  # fmt: skip


def openclip(name: str) -> tuple[Place, ...]:
    """A text tower of OpenCLIP.

    `text_projection` is a parameter there, x @ w. Files made by way of transformers hold the matrix of a Linear layer
    instead, which is its transpose, under two spellings.
    """
    if name == "text_projection.weight":
        return (
            Place("text_projection", "transposed"),
            Place("text_projection.weight"),
            Place("text_projection.weight.weight"),
        )
    return (Place(_TEXT[name]),) if name in _TEXT else (_block(name, "text_model"),)


def openai_vision(name: str) -> tuple[Place, ...]:
    """The vision tower of OpenAI's CLIP."""
    if name == "visual_projection.weight":
        return (Place("proj", "transposed"),)
    return (Place(_VISION[name]),) if name in _VISION else (_block(name, "vision_model"),)


def _block(name: str, model: str) -> Place:
    match = re.fullmatch(rf"{model}\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        raise KeyError(name)
    layer, inner, kind = match.groups()
    theirs = f"transformer.resblocks.{layer}"
    for how in ("q", "k", "v"):
        if inner == f"self_attn.{how}_proj":
            return Place(f"{theirs}.attn.in_proj_{kind}", how)
    return Place(f"{theirs}.{_BLOCK[inner]}.{kind}")
