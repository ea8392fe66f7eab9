"""What shapes show of a network's sizes, as configs that compare by shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count as counting

from ldm.config import TextConfig, UNetConfig, VAEConfig, VisionConfig
from weights.names.places import Shape

Shapes = Mapping[str, Shape]
Config = UNetConfig | VAEConfig | TextConfig | VisionConfig
# Our name inside a network -> the shape it would have here; None: it is not in the file.
Lookup = Callable[[str], Shape | None]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
NO_NETWORK = (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError)  # what tensors of something else lead to


def visible(config: Config) -> Config:
    """The config with everything that shapes cannot show set to one fixed value, so that configs compare by shape."""
    if isinstance(config, UNetConfig):
        return visible_unet(config)
    if isinstance(config, VAEConfig):
        return replace(config, scale=1.0)
    if isinstance(config, VisionConfig):
        return replace(config, heads=1, activation="gelu")
    return replace(config, heads=1, activation="gelu", pad=0, skip=0, norm=True)


def visible_unet(config: UNetConfig) -> UNetConfig:
    """The same of a UNet: its heads do not show, nor whether attn1 attends to a context as wide as the level."""
    levels = zip(config.channel_mult, config.down_depth, config.cross_only, strict=True)
    cross_only = tuple(
        cross and any(depths) and config.model_channels * m != config.context_dim for m, depths, cross in levels
    )
    return replace(config, heads=1, head_dim=None, cross_only=cross_only)


def read_unet(shapes: Shapes, prefix: str = UNET) -> UNetConfig | None:
    """The visible sizes of the UNet under `prefix`; None when its tensors do not make one."""

    def depth(block: str) -> int:
        return count(shapes, f"{prefix}{block}.1.transformer_blocks.{{}}.norm1.weight")

    down: list[list[int]] = [[]]
    widths: list[int] = []
    try:
        for i in range(1, 1 + len(shapes)):
            block = f"input_blocks.{i}"
            if f"{prefix}{block}.0.op.weight" in shapes:
                down.append([])
            elif (width := shapes.get(f"{prefix}{block}.0.in_layers.2.weight")) is not None:
                widths += [] if down[-1] else [width[0]]
                down[-1].append(depth(block))
            else:
                break
        blocks = len(down[0])
        ups = [depth(f"output_blocks.{i}") for i in range(len(down) * (blocks + 1))]
        keys = [
            rf"{re.escape(prefix)}input_blocks\.{1 + i * (blocks + 1)}\.1\..+\.attn1\.to_k\.weight"
            for i in range(len(down))
        ]
        return unet_of(
            shapes, prefix, ends=("input_blocks.0.0.weight", "out.2.weight"),
            given=("label_emb.0.0.weight", "label_emb.weight"), widths=widths,
            keys=[_first(shapes, key) for key in keys], down=down,
            up=[ups[i : i + blocks + 1] for i in range(0, len(ups), blocks + 1)], mid=depth("middle_block"),
        )  # fmt: skip
    except NO_NETWORK:
        return None


def unet_of(
    shapes: Shapes, prefix: str, *, ends: tuple[str, str], given: tuple[str, str], widths: Sequence[int],
    keys: Sequence[Shape | None], down: Sequence[Sequence[int]], up: Sequence[Sequence[int]], mid: int,
) -> UNetConfig:  # fmt: skip
    """The config of a UNet.

    ends    names of its first and last convolution
    given   names of the first matrix for a conditioning vector, and of the embedding of a noise level
    widths  of the levels, finest first; keys: the shape of a key projection of each level's self-attention
    down, up, mid  how many transformer blocks there are after each ResBlock
    """
    channels, in_channels = shapes[prefix + ends[0]][:2]
    vector, label = (shapes.get(prefix + name) for name in given)
    context = _first(shapes, rf"{re.escape(prefix)}.+\.attn2\.to_k\.weight")
    proj = _first(shapes, rf"{re.escape(prefix)}.+\.proj_in\.weight")
    cross = (key is not None and len(key) == 2 and key[1] != width for key, width in zip(keys, widths, strict=True))
    return UNetConfig(
        in_channels=in_channels, out_channels=shapes[prefix + ends[1]][0], model_channels=channels,
        channel_mult=tuple(width // channels for width in widths), num_res_blocks=len(down[0]),
        context_dim=context[1] if context else 0, heads=1, linear_proj=proj is not None and len(proj) == 2,
        down_depth=tuple(map(tuple, down)), up_depth=tuple(map(tuple, up)), mid_depth=mid or None,
        cross_only=tuple(cross), vector_dim=vector[1] if vector else None, noise_levels=label[0] if label else None,
    )  # fmt: skip


def read_vae(shapes: Shapes, prefix: str = VAE) -> VAEConfig | None:
    """The visible sizes of the VAE under `prefix`; None when its tensors do not make one."""
    return vae_of(shapes, prefix, "encoder.down.{}.block.{}.conv1.weight")


def vae_of(shapes: Shapes, prefix: str, block: str) -> VAEConfig | None:
    """`block` names the first convolution of a ResBlock of a level: the level, then the block in it."""
    try:
        channels = shapes[f"{prefix}encoder.conv_in.weight"][0]
        levels = range(count(shapes, prefix + block.format("{}", 0)))
        return VAEConfig(
            channels=channels, channel_mult=tuple(shapes[prefix + block.format(i, 0)][0] // channels for i in levels),
            num_res_blocks=count(shapes, prefix + block.format(0, "{}")),
            z_channels=shapes[f"{prefix}decoder.conv_in.weight"][1], scale=1.0,
        )  # fmt: skip
    except NO_NETWORK:
        return None


def read_text(shape: Lookup) -> TextConfig | None:
    """The visible sizes of a text tower; None when its tensors do not make one."""
    there = _required(shape)
    try:
        vocab, width = there("text_model.embeddings.token_embedding.weight")
        projection = shape("text_projection.weight")
        return TextConfig(
            vocab=vocab, length=there("text_model.embeddings.position_embedding.weight")[0], width=width,
            layers=_layers(shape, "text_model"), heads=1, mlp=there("text_model.encoder.layers.0.mlp.fc1.weight")[0],
            activation="gelu", projection=projection[0] if projection else None, pad=0,
        )  # fmt: skip
    except NO_NETWORK:
        return None


def read_vision(shape: Lookup) -> VisionConfig | None:
    """The visible sizes of a vision tower; None when its tensors do not make one."""
    there = _required(shape)
    try:
        width, _, patch, _ = there("vision_model.embeddings.patch_embedding.weight")
        patches = there("vision_model.embeddings.position_embedding.weight")[0] - 1
        return VisionConfig(
            image=round(patches**0.5) * patch, patch=patch, width=width, layers=_layers(shape, "vision_model"), heads=1,
            mlp=there("vision_model.encoder.layers.0.mlp.fc1.weight")[0], activation="gelu",
            projection=there("visual_projection.weight")[0],
        )  # fmt: skip
    except NO_NETWORK:
        return None


def _required(shape: Lookup) -> Callable[[str], Shape]:
    """The same for parameters that there must be: raises KeyError for others."""

    def there(name: str) -> Shape:
        found = shape(name)
        if found is None:
            raise KeyError(name)
        return found

    return there


def _layers(shape: Lookup, model: str) -> int:
    return next(n for n in counting() if shape(f"{model}.encoder.layers.{n}.layer_norm1.weight") is None)


def count(shapes: Shapes, pattern: str) -> int:
    """How many of `pattern` with 0, 1, 2, ... in it there are in a row."""
    return next(n for n in counting() if pattern.format(n) not in shapes)


def _first(shapes: Shapes, pattern: str) -> Shape | None:
    return next((shape for key, shape in shapes.items() if re.fullmatch(pattern, key)), None)
