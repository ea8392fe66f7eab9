"""Where our parameters lie in a file: what a place is, and the names of the original code and of CLIP."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Shape = tuple[int, ...]

# whole       as it is
# q, k, v     a third of the rows: OpenCLIP stacks the three matrices (and biases) of an attention in this order
# transposed  `x @ w` there, `x @ w.T` here
# kernel      a 1x1 convolution here; there too, or the same numbers as a matrix
How = Literal["whole", "q", "k", "v", "transposed", "kernel"]


@dataclass(frozen=True)
class Place:
    """A tensor of a file, or the part of it that is ours; or several whose rows, one after the other, are ours."""

    key: str
    how: How = "whole"
    more: tuple[str, ...] = ()  # keys whose rows follow

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys that are read."""
        return (self.key, *self.more)

    def under(self, prefix: str) -> Place:
        """The same place in a network whose keys begin with `prefix`."""
        return Place(prefix + self.key, self.how, tuple(prefix + key for key in self.more))

    def rows(self, stored: Shape) -> slice | None:
        """The rows that are ours of a tensor of this shape; None: all of them."""
        if self.how not in ("q", "k", "v"):
            return None
        n, i = stored[0] // 3, "qkv".index(self.how)
        return slice(i * n, (i + 1) * n)

    def stored(self, ours: Shape) -> Shape:
        """The shape in the file, under each key, of what has shape `ours` here."""
        if self.how in ("q", "k", "v"):
            return (3 * ours[0], *ours[1:])
        if self.more:
            return (ours[0] // len(self.keys), *ours[1:])
        return ours[::-1] if self.how == "transposed" else ours

    def fits(self, stored: Shape, ours: Shape) -> bool:
        """Can a tensor of shape `stored` give ours?"""
        if self.how == "kernel" and stored == ours[:2] and ours[2:] == (1, 1):
            return True
        return stored == self.stored(ours)

    def ours(self, stored: Shape) -> Shape:
        """The shape here of what has shape `stored` in the file; of a kernel that, since only our network knows."""
        if self.how in ("q", "k", "v"):
            return (stored[0] // 3, *stored[1:]) if stored else ()
        return stored[::-1] if self.how == "transposed" else stored

    def turned(self, tensor: Tensor, ours: Shape) -> Tensor:
        """Ours, from the rows that were read."""
        if self.how == "transposed":
            return tensor.T.contiguous()
        return tensor.view(ours) if self.how == "kernel" else tensor


def joined(key: str, parts: Sequence[tuple[Place, Tensor]]) -> Tensor:
    """The tensor that a file has under a key, from ours that lie in it and their places. Kernels keep our shape."""
    rows = []
    for place, tensor in sorted(parts, key=lambda part: "qkv".find(part[0].how)):
        if place.more:
            tensor = tensor.chunk(len(place.keys))[place.keys.index(key)]
        rows.append(tensor.T.contiguous() if place.how == "transposed" else tensor)
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def short(key: str, limit: int = 34) -> str:
    """The telling end of a long name."""
    return key if len(key) <= limit else "..." + key[3 - limit :]


Places = Callable[[str], tuple[Place, ...]]  # our name inside a network -> where it may lie, under each known spelling


def ema(key: str) -> str:
    """Where the original's LitEma keeps the moving average of `key`, which must begin with `model.`.

    It is stored under the name inside `self.model` without any dots, so this can be computed but not inverted.
    """
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def same(name: str) -> tuple[Place, ...]:
    """Networks whose published names are ours."""
    return (Place(name),)


def vae(name: str) -> tuple[Place, ...]:
    """The VAE. Some converters have stored its attention's 1x1 convolutions as matrices."""
    return (Place(name, "kernel" if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) else "whole"),)


def _with_or_without(prefix: str) -> Places:
    """A tower of transformers, some old and very new versions of which leave the prefix out."""
    return lambda name: tuple(Place(key) for key in dict.fromkeys((name, name.removeprefix(prefix))))


hugging_face = _with_or_without("text_model.")
hugging_face_vision = _with_or_without("vision_model.")  # in the published safety checker it stands twice

_BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc",
          "mlp.fc2": "mlp.c_proj"}  # fmt: skip
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
