"""Tensor shapes and header evidence -> `ModelConfig`, or an error that says what is undecided."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike

from ldm.config import FAMILIES, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError
from weights.layout import LAYOUTS, Shape
from weights.metadata import CONFIG_KEY, from_json

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer.text_model."

TITLES = {
    "sd1": "an SD 1 model", "sd1-inpainting": "an SD 1 inpainting model", "sd-image-variations": "an SD Image Variations model",
    "sd2-base": "an SD 2 model", "sd2-inpainting": "an SD 2 inpainting model", "sd2-depth": "an SD 2 depth model",
    "x4-upscaler": "an SD x4 upscaler", "sdxl-base": "an SDXL base model", "sdxl-inpainting": "an SDXL inpainting model",
    "sdxl-refiner": "an SDXL refiner", "ssd-1b": "an SSD-1B model", "ip2p": "an InstructPix2Pix-like model (8 input channels)",
    "unclip": "an unCLIP model", "unknown": "a latent diffusion model of an unknown family",
}  # fmt: skip

Shapes = Mapping[str, Shape]


def detect(shapes: Shapes, metadata: Mapping[str, str], config: ModelConfig | str | None, path: str | PathLike[str]) -> ModelConfig:
    """The config of the model whose tensors, under their original names, have these shapes.

    `config` (a ModelConfig, or the name of a family) overrules what the file says; then comes `ldm.config` in its metadata,
    then the shapes of the published families. `path` is for errors. Raises FileError for what is no model, or of a family that cannot be loaded
    yet, and AmbiguousCheckpoint where only a config can settle it.
    """
    if isinstance(config, str) and config not in FAMILIES:
        near = difflib.get_close_matches(config, FAMILIES, n=1)
        raise ArgumentError(f"config '{config[:40]}' is no family{f' (meant {near[0]}?)' if near else ''}; there are {', '.join(FAMILIES)}")
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        raise FileError(_not_a_model(shapes), path=path)
    name = family(shapes)
    if name not in LAYOUTS:
        raise FileError(f"is {TITLES[name]}; this version loads SD 1 text-to-image models only", path=path)
    if isinstance(config, ModelConfig):
        return config
    if isinstance(config, str):
        if config not in LAYOUTS:
            raise FileError(f"is {TITLES[name]} and config is '{config}'; this version loads SD 1 text-to-image models only", path=path)
        return FAMILIES[config]
    unet, vae, text = read_unet(shapes), read_vae(shapes), read_text(shapes)
    if CONFIG_KEY in metadata:
        return _described(metadata[CONFIG_KEY], unet, vae, text, path)
    known = FAMILIES[name]
    if text is not None:  # added tokens and removed layers are visible, and change nothing else
        known = replace(known, text=(replace(known.text[0], vocab=text.vocab, length=text.length, layers=text.layers),))
    parts = (("UNet", unet, known.unet), ("VAE", vae, known.vae), ("text tower", text, known.text[0]))
    odd = [what for what, there, usual in parts if there is not None and there != visible(usual)]
    if odd:
        what = f"is {TITLES[name]} of its own sizes ({', '.join(odd)})"
        raise AmbiguousCheckpoint(f"{what}; shapes do not show heads: pass config=ModelConfig(...)", path=path)
    return known


def _described(described: str, unet: UNetConfig | None, vae: VAEConfig | None, text: TextConfig | None, path: str | PathLike[str]) -> ModelConfig:
    """The config in the metadata, if it agrees with the shapes: nothing is built from its numbers alone."""
    try:
        config = from_json(described)
    except ArgumentError as fault:
        raise FileError(str(fault), path=path, key=CONFIG_KEY) from None
    pairs = (("UNet", config.unet, unet), ("VAE", config.vae, vae), ("text tower", config.text[0] if len(config.text) == 1 else None, text))
    for what, claimed, there in pairs:
        if claimed is None or there is None or visible(claimed) != there:
            raise FileError(f"its {CONFIG_KEY} and the shapes of its {what} disagree; pass config= to overrule it", path=path, key=CONFIG_KEY)
    return config


def visible(config: UNetConfig | VAEConfig | TextConfig) -> UNetConfig | VAEConfig | TextConfig:
    """The config with everything that shapes cannot show set to one fixed value, so that configs compare by shape."""
    if isinstance(config, UNetConfig):
        attends = [any(depths) for depths in config.down_depth]
        cross_only = tuple(cross and has for cross, has in zip(config.cross_only, attends, strict=True))
        return replace(config, heads=1, head_dim=None, cross_only=cross_only)
    if isinstance(config, VAEConfig):
        return replace(config, scale=1.0)
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
        keys = {level: _first(shapes, rf"{re.escape(prefix)}input_blocks\.{1 + level * (blocks + 1)}\.1\..+\.attn1\.to_k\.weight") for level in range(len(down))}
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


def read_text(shapes: Shapes, prefix: str = TEXT) -> TextConfig | None:
    """The visible sizes of the CLIP tower under `prefix`; None when its tensors do not make one."""
    try:
        vocab, width = shapes[f"{prefix}embeddings.token_embedding.weight"]
        return TextConfig(
            vocab=vocab,
            length=shapes[f"{prefix}embeddings.position_embedding.weight"][0],
            width=width,
            layers=_count(shapes, f"{prefix}encoder.layers.{{}}.layer_norm1.weight"),
            heads=1,
            mlp=shapes[f"{prefix}encoder.layers.0.mlp.fc1.weight"][0],
            activation="gelu",
            pad=0,
        )
    except (KeyError, IndexError, ValueError):
        return None


def family(shapes: Shapes) -> str:
    """The family that the UNet's inputs and the place of the text tower belong to; a key of TITLES.

    Decided by structure, not by width, so that small models of the same make are recognised too.
    """
    width, channels = (*shapes[f"{UNET}input_blocks.0.0.weight"], 0, 0)[:2]
    if f"{UNET}label_emb.weight" in shapes:
        return "x4-upscaler"
    vector = shapes.get(f"{UNET}label_emb.0.0.weight")
    if vector:
        if "embedder.model.visual.proj" in shapes or "embedder.model.ln_final.weight" in shapes or vector[1:] in ((2048,), (1536,)):
            return "unclip"
        if width == 384:
            return "sdxl-refiner"
        if f"{UNET}middle_block.1.norm.weight" not in shapes:
            return "ssd-1b"
        return {4: "sdxl-base", 9: "sdxl-inpainting", 8: "ip2p"}.get(channels, "unknown")
    if "cond_stage_model.model.visual.proj" in shapes:
        return "sd-image-variations"
    proj = _first(shapes, rf"{re.escape(UNET)}.+\.proj_in\.weight")
    if proj is not None and len(proj) == 2:
        return {4: "sd2-base", 9: "sd2-inpainting", 5: "sd2-depth", 8: "ip2p"}.get(channels, "unknown")
    return {4: "sd1", 9: "sd1-inpainting", 8: "ip2p"}.get(channels, "unknown")


def _not_a_model(shapes: Shapes) -> str:
    """What a file without a UNet in it is instead."""
    first = next(iter(shapes))
    lora = next((key for key in shapes if re.search(r"^lora_|\.lora_|_lora\.|hada_w|lokr_w", key)), None)
    vae = any(f"{prefix}encoder.conv_in.weight" in shapes and f"{prefix}decoder.conv_in.weight" in shapes for prefix in ("", VAE))
    if lora:
        return f"is a LoRA ({lora[:60]}), not a model; load the model that it was made for"
    if any("double_blocks." in key or "joint_blocks." in key for key in shapes):
        return "is a Flux or SD 3 transformer; this project reads models with a UNet"
    if any(key.startswith(("control_model.", "controlnet_")) for key in shapes):
        return "is a ControlNet, not a model; load the model that it steers"
    if vae:
        return "is a VAE alone, not a model: it has no UNet; use a complete checkpoint"
    if "conv_in.weight" in shapes and any(key.startswith("down_blocks.") for key in shapes):
        return "is a diffusers UNet alone; this version reads single files with UNet, VAE and text tower"
    if any(key.removeprefix("diffusion_model.") == "input_blocks.0.0.weight" for key in shapes):
        return f"is a bare UNet (no {UNET} in its names); use a complete checkpoint"
    if any(key.startswith("special_care_embeds") for key in shapes):
        return "is a safety checker, not a model"
    if any("text_model.encoder.layers.0." in key for key in shapes):
        return "is a text tower alone, not a model; use a complete checkpoint"
    embedding = len(shapes) <= 3 and all(len(shape) <= 2 and math.prod(shape) <= 1_000_000 for shape in shapes.values())
    if embedding or any(key.startswith("string_to_param.") for key in shapes):
        return f"is a textual-inversion embedding ({first[:40]}), not a model; load the model that it was made for"
    return f"has no UNet ({UNET}input_blocks.0.0.weight is missing; it begins with {first[:40]}); use an SD 1.x checkpoint"


def _count(shapes: Shapes, pattern: str) -> int:
    """How many of `pattern` with 0, 1, 2, ... in it are there in a row."""
    n = 0
    while pattern.format(n) in shapes:
        n += 1
    return n


def _first(shapes: Shapes, pattern: str) -> Shape | None:
    return next((shape for key, shape in shapes.items() if re.fullmatch(pattern, key)), None)
