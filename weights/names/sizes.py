"""What shapes show of a network's sizes, as configs that compare by shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from ldm.config import TextConfig, UNetConfig, VAEConfig, VisionConfig
from weights.names.places import Shape

Shapes = Mapping[str, Shape]
Config = UNetConfig | VAEConfig | TextConfig | VisionConfig
Lookup = Callable[
    [str], Shape | None
]  # our name inside a network -> the shape it would have here; None: it is not in the file

UNET, VAE = "model.diffusion_model.", "first_stage_model."


def visible(config: Config) -> Config:
    """The config with everything that shapes cannot show set to one fixed value, so that configs compare by shape."""
    if isinstance(config, UNetConfig):
        shows = [
            any(depths) and config.model_channels * m != config.context_dim
            for m, depths in zip(config.channel_mult, config.down_depth, strict=True)
        ]
        cross_only = tuple(cross and seen for cross, seen in zip(config.cross_only, shows, strict=True))
        return replace(config, heads=1, head_dim=None, cross_only=cross_only)
    if isinstance(config, VAEConfig):
        return replace(config, scale=1.0)
    if isinstance(config, VisionConfig):
        return replace(config, heads=1, activation="gelu")
    return replace(config, heads=1, activation="gelu", pad=0, skip=0, norm=True)


def read_unet(shapes: Shapes, prefix: str = UNET) -> UNetConfig | None:
    """The visible sizes of the UNet under `prefix`; None when its tensors do not make one."""

    def depth(block: str) -> int:
        return _count(shapes, f"{prefix}{block}.1.transformer_blocks.{{}}.norm1.weight")

    def width(block: str) -> int | None:
        return shapes.get(f"{prefix}{block}.0.in_layers.2.weight", (None,))[0]

    try:
        channels, in_channels = shapes[f"{prefix}input_blocks.0.0.weight"][:2]
        down: list[list[int]] = [[]]
        widths: list[int] = []
        for i in range(1, 1 + len(shapes)):
            block = f"input_blocks.{i}"
            if f"{prefix}{block}.0.op.weight" in shapes:
                down.append([])
            elif (out := width(block)) is not None:
                if not down[-1]:
                    widths.append(out)
                down[-1].append(depth(block))
            else:
                break
        blocks = len(down[0])
        ups = [depth(f"output_blocks.{i}") for i in range(len(down) * (blocks + 1))]
        up = tuple(tuple(ups[i : i + blocks + 1]) for i in range(0, len(ups), blocks + 1))
        keys = {
            level: _first(
                shapes, rf"{re.escape(prefix)}input_blocks\.{1 + level * (blocks + 1)}\.1\..+\.attn1\.to_k\.weight"
            )
            for level in range(len(down))
        }
        context = _first(shapes, rf"{re.escape(prefix)}.+\.attn2\.to_k\.weight")
        proj = _first(shapes, rf"{re.escape(prefix)}.+\.proj_in\.weight")
        label, vector = shapes.get(f"{prefix}label_emb.weight"), shapes.get(f"{prefix}label_emb.0.0.weight")
        return UNetConfig(
            in_channels=in_channels,
            out_channels=shapes[f"{prefix}out.2.weight"][0],
            model_channels=channels,
            channel_mult=tuple(w // channels for w in widths),
            num_res_blocks=blocks,
            context_dim=context[1] if context else 0,
            heads=1,
            linear_proj=proj is not None and len(proj) == 2,
            down_depth=tuple(map(tuple, down)),
            up_depth=up,
            mid_depth=depth("middle_block") or None,
            cross_only=tuple(bool(key) and len(key) == 2 and key[1] != widths[level] for level, key in keys.items()),
            vector_dim=vector[1] if vector else None,
            noise_levels=label[0] if label else None,
        )
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError):  # not the tensors of a UNet
        return None


def read_diffusers_unet(shapes: Shapes, prefix: str) -> UNetConfig | None:
    """The visible sizes of the UNet under `prefix` with diffusers' names; None when its tensors do not make one."""

    def depth(block: str, i: int) -> int:
        return _count(shapes, f"{prefix}{block}.attentions.{i}.transformer_blocks.{{}}.norm1.weight")

    try:
        channels, in_channels = shapes[f"{prefix}conv_in.weight"][:2]
        levels = range(_count(shapes, f"{prefix}down_blocks.{{}}.resnets.0.conv1.weight"))
        blocks = range(_count(shapes, f"{prefix}down_blocks.0.resnets.{{}}.conv1.weight"))
        widths = [shapes[f"{prefix}down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels]
        keys = [
            shapes.get(f"{prefix}down_blocks.{level}.attentions.0.transformer_blocks.0.attn1.to_k.weight")
            for level in levels
        ]
        context = _first(shapes, rf"{re.escape(prefix)}.+\.attn2\.to_k\.weight")
        proj = _first(shapes, rf"{re.escape(prefix)}.+\.proj_in\.weight")
        label, vector = (
            shapes.get(f"{prefix}class_embedding.weight"),
            shapes.get(f"{prefix}add_embedding.linear_1.weight"),
        )
        return UNetConfig(
            in_channels=in_channels,
            out_channels=shapes[f"{prefix}conv_out.weight"][0],
            model_channels=channels,
            channel_mult=tuple(w // channels for w in widths),
            num_res_blocks=len(blocks),
            context_dim=context[1] if context else 0,
            heads=1,
            linear_proj=proj is not None and len(proj) == 2,
            down_depth=tuple(tuple(depth(f"down_blocks.{level}", i) for i in blocks) for level in levels),
            up_depth=tuple(tuple(depth(f"up_blocks.{level}", i) for i in range(len(blocks) + 1)) for level in levels),
            mid_depth=depth("mid_block", 0) or None,
            cross_only=tuple(
                bool(key) and len(key) == 2 and key[1] != width for key, width in zip(keys, widths, strict=True)
            ),
            vector_dim=vector[1] if vector else None,
            noise_levels=label[0] if label else None,
        )
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError):  # not the tensors of a UNet
        return None


def read_diffusers_vae(shapes: Shapes, prefix: str) -> VAEConfig | None:
    """The visible sizes of the VAE under `prefix` with diffusers' names; None when its tensors do not make one."""
    try:
        channels = shapes[f"{prefix}encoder.conv_in.weight"][0]
        levels = range(_count(shapes, f"{prefix}encoder.down_blocks.{{}}.resnets.0.conv1.weight"))
        return VAEConfig(
            channels=channels,
            channel_mult=tuple(
                shapes[f"{prefix}encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] // channels for i in levels
            ),
            num_res_blocks=_count(shapes, f"{prefix}encoder.down_blocks.0.resnets.{{}}.conv1.weight"),
            z_channels=shapes[f"{prefix}decoder.conv_in.weight"][1],
            scale=1.0,
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        return None


def read_vae(shapes: Shapes, prefix: str = VAE) -> VAEConfig | None:
    """The visible sizes of the VAE under `prefix`; None when its tensors do not make one."""
    try:
        channels = shapes[f"{prefix}encoder.conv_in.weight"][0]
        levels = _count(shapes, f"{prefix}encoder.down.{{}}.block.0.conv1.weight")
        widths = [shapes[f"{prefix}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        return VAEConfig(
            channels=channels,
            channel_mult=tuple(w // channels for w in widths),
            num_res_blocks=_count(shapes, f"{prefix}encoder.down.0.block.{{}}.conv1.weight"),
            z_channels=shapes[f"{prefix}decoder.conv_in.weight"][1],
            scale=1.0,
        )
    except (KeyError, IndexError, ZeroDivisionError):
        return None


def read_text(shape: Lookup) -> TextConfig | None:
    """The visible sizes of a text tower; None when its tensors do not make one."""
    try:
        vocab, width = shape("text_model.embeddings.token_embedding.weight")
        projection = shape("text_projection.weight")
        return TextConfig(
            vocab=vocab,
            length=shape("text_model.embeddings.position_embedding.weight")[0],
            width=width,
            layers=_layers(shape, "text_model"),
            heads=1,
            mlp=shape("text_model.encoder.layers.0.mlp.fc1.weight")[0],
            activation="gelu",
            projection=projection[0] if projection else None,
            pad=0,
        )
    except (TypeError, IndexError, ValueError):
        return None


def read_vision(shape: Lookup) -> VisionConfig | None:
    """The visible sizes of a vision tower; None when its tensors do not make one."""
    try:
        width, _, patch, _ = shape("vision_model.embeddings.patch_embedding.weight")
        patches = shape("vision_model.embeddings.position_embedding.weight")[0] - 1
        return VisionConfig(
            image=round(patches**0.5) * patch,
            patch=patch,
            width=width,
            layers=_layers(shape, "vision_model"),
            heads=1,
            mlp=shape("vision_model.encoder.layers.0.mlp.fc1.weight")[0],
            activation="gelu",
            projection=shape("visual_projection.weight")[0],
        )
    except (TypeError, IndexError, ValueError):
        return None


def _layers(shape: Lookup, model: str) -> int:
    n = 0
    while shape(f"{model}.encoder.layers.{n}.layer_norm1.weight") is not None:
        n += 1
    return n


def _count(shapes: Shapes, pattern: str) -> int:
    """How many of `pattern` with 0, 1, 2, ... in it are there in a row."""
    n = 0
    while pattern.format(n) in shapes:
        n += 1
    return n


def _first(shapes: Shapes, pattern: str) -> Shape | None:
    return next((shape for key, shape in shapes.items() if re.fullmatch(pattern, key)), None)
