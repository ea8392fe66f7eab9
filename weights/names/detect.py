"""Tensor shapes and header evidence -> `ModelConfig`, or an error that says what is undecided."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike

from ldm.config import (
    FAMILIES,
    REFINER,
    SD1,
    SD2,
    SDXL,
    SSD1B,
    ModelConfig,
    TextConfig,
    UNetConfig,
    VAEConfig,
    VisionConfig,
)
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError
from weights.names.layout import Layout, original
from weights.names.metadata import CONFIG_KEY, from_json
from weights.names.places import Shape
from weights.names.sizes import UNET, VAE, Config, Lookup, Shapes, read_text, read_unet, read_vae, read_vision, visible

TITLES = {
    "sd1": "an SD 1 model", "sd1-inpainting": "an SD 1 inpainting model", "sd-image-variations": "an SD Image Variations model",
    "sd2-base": "an SD 2 model", "sd2-v": "an SD 2 model", "sd2-inpainting": "an SD 2 inpainting model", "sd2-depth": "an SD 2 depth model",
    "x4-upscaler": "an SD x4 upscaler", "sdxl-base": "an SDXL base model", "sdxl-inpainting": "an SDXL inpainting model",
    "sdxl-refiner": "an SDXL refiner", "ssd-1b": "an SSD-1B model",
}  # fmt: skip
REFUSED = {  # recognised, and not supported
    "ip2p": "an InstructPix2Pix-like model (8 input channels)", "zero123": "a Zero123 model (views of an object)", "unclip": "an unCLIP model",
    "vega": "a Segmind Vega model", "koala": "a KOALA or otherwise distilled SDXL model", "unknown": "a latent diffusion model of an unknown family",
}  # fmt: skip


def detect(
    shapes: Shapes, metadata: Mapping[str, str], config: ModelConfig | str | None, path: str | PathLike[str]
) -> ModelConfig:
    """The config of the model in a single file whose tensors have these shapes. Whether SD 2 predicts eps or v is `weights.prediction`'s to say.

    `config` (a ModelConfig, or the name of a family) overrules what the file says; then comes `ldm.config` in its metadata,
    then the shapes of the published families. `path` is for errors. Raises FileError for what is no model, or of a family that cannot be
    loaded, and AmbiguousCheckpoint where only a config can settle it.
    """
    if isinstance(config, str):
        require_family(config)
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        raise FileError(not_a_model(shapes), path=path)
    layout = original(shapes)
    towers = [
        read_text(lookup(layout, shapes, f"text.{i}."))
        for i in range(sum(part.ours.startswith("text.") for part in layout.parts))
    ]
    if isinstance(config, ModelConfig):
        return without_unread(config, towers)
    unet, vae, vision = read_unet(shapes), read_vae(shapes), read_vision(lookup(layout, shapes, "vision."))
    if config is None and CONFIG_KEY in metadata:
        return _described(metadata[CONFIG_KEY], unet, vae, towers, vision, path)
    name = family(unet, vision is not None, shapes)
    known = named(name, config, path)
    known = like_file(known, towers)
    if config is None:
        require_published(known, unet, vae, towers, vision, TITLES[name], path)
    return known


def require_family(config: str) -> None:
    """Refuse what is no family's name."""
    if config not in FAMILIES:
        near = difflib.get_close_matches(config, FAMILIES, n=1)
        raise ArgumentError(
            f"config '{config[:40]}' is no family{f' (meant {near[0]}?)' if near else ''}; there are {', '.join(FAMILIES)}"
        )


def named(name: str, config: str | None, path: str | PathLike[str]) -> ModelConfig:
    """The config of the family that was recognised, or of the one asked for if the file can be of it."""
    if name == "unknown" and config is not None:  # incomplete, perhaps: of what, the plan will say
        return FAMILIES[config]
    if name in REFUSED:
        raise FileError(
            f"is {REFUSED[name]}, unknown here; pass config= if it is a damaged file of a known one", path=path
        )
    if config is not None and {"sd2-v": "sd2-base"}.get(config, config) != name:
        raise FileError(
            f"is {TITLES[name]} and config is '{config}'; leave config out, or name the right one", path=path
        )
    return FAMILIES[config or name]


def require_published(
    known: ModelConfig, unet: UNetConfig | None, vae: VAEConfig | None, towers: list[TextConfig | None], vision: VisionConfig | None,
    title: str, path: str | PathLike[str],
) -> None:  # fmt: skip
    """Refuse other sizes than the family's: they would need heads, which shapes do not show."""
    pairs = _pairs(known, unet, vae, towers, vision)
    odd = [what for what, usual, there in pairs if there is not None and usual is not None and there != usual]
    if odd:
        raise AmbiguousCheckpoint(
            f"is {title} of its own sizes ({', '.join(dict.fromkeys(odd))}); shapes do not show heads: pass config=ModelConfig(...)",
            path=path,
        )


def _pairs(
    config: ModelConfig, unet: UNetConfig | None, vae: VAEConfig | None, towers: list[TextConfig | None], vision: VisionConfig | None
) -> list[tuple[str, Config | None, Config | None]]:  # fmt: skip
    """(network, as the config has it, as the file has it), both as far as shapes show; None where there is none.

    Text towers as far as both have them: whether there are as many is for who asks.
    """
    pairs = [("UNet", config.unet, unet), ("VAE", config.vae, vae), ("image encoder", config.vision, vision)]
    pairs += [
        ("text tower", _comparable(usual, there), there) for usual, there in zip(config.text, towers, strict=False)
    ]
    return [(what, None if usual is None else visible(usual), there) for what, usual, there in pairs]


def _comparable(usual: TextConfig, there: TextConfig | None) -> TextConfig:
    """The usual tower, with the projection that CLIP-L's file may have and no family reads."""
    return replace(usual, projection=there.projection) if there is not None and usual.projection is None else usual


def _described(
    described: str,
    unet: UNetConfig | None,
    vae: VAEConfig | None,
    towers: list[TextConfig | None],
    vision: VisionConfig | None,
    path: str | PathLike[str],
) -> ModelConfig:
    """The config in the metadata, if it agrees with the shapes: nothing is built from its numbers alone."""
    try:
        config = from_json(described)
    except ArgumentError as fault:
        raise FileError(str(fault), path=path, key=CONFIG_KEY) from None
    pairs = _pairs(config, unet, vae, towers, vision)
    if len(config.text) != len(towers):
        pairs.append(("text tower", None, towers[-1] if towers else TextConfig()))
    for what, claimed, there in pairs:
        if claimed != there:
            raise FileError(
                f"its {CONFIG_KEY} and the shapes of its {what} disagree; pass config= to overrule it",
                path=path,
                key=CONFIG_KEY,
            )
    return config


def lookup(layout: Layout, shapes: Shapes, network: str) -> Lookup:
    """The shape that a parameter of one network would have here, by its name in that network."""

    def shape(name: str) -> Shape | None:
        return next(
            (place.ours(shapes[place.key]) for place in layout.places(network + name) if place.key in shapes), None
        )

    return shape


def _pooled(config: ModelConfig, i: int) -> bool:
    """Does anything read the pooled text of tower i, which comes after all its blocks?"""
    return config.unet.vector_dim is not None and i == len(config.text) - 1


def without_unread(config: ModelConfig, towers: list[TextConfig | None]) -> ModelConfig:
    """The config without the last blocks and the projection of a text tower where the file leaves them out and nothing reads them.

    SD 2's conditioning comes after block 23 of 24, so files of some trainers end there, as diffusers' folders do.
    """

    def fitted(i: int, known: TextConfig, there: TextConfig | None) -> TextConfig:
        if there is None or _pooled(config, i):
            return known
        used = known.layers - known.skip
        if used <= there.layers < known.layers:
            known = replace(known, layers=there.layers, skip=there.layers - used)
        return replace(known, projection=None) if there.projection is None else known

    return replace(
        config,
        text=tuple(fitted(i, known, towers[i] if i < len(towers) else None) for i, known in enumerate(config.text)),
    )


def like_file(config: ModelConfig, towers: list[TextConfig | None]) -> ModelConfig:
    """The config with what a file may change of its text towers without being asked: added tokens, removed layers."""
    config = without_unread(config, towers)

    def fitted(i: int, known: TextConfig) -> TextConfig:
        there = towers[i] if i < len(towers) else None
        if there is None:
            return known
        known = replace(known, vocab=there.vocab, length=there.length)
        return (
            known
            if _pooled(config, i)
            else replace(known, layers=there.layers, skip=min(known.skip, max(there.layers - 1, 0)))
        )

    return replace(config, text=tuple(fitted(i, known) for i, known in enumerate(config.text)))


def family(unet: UNetConfig | None, sees: bool, keys: Mapping[str, object]) -> str:
    """The family that a UNet's structure and inputs belong to, a key of TITLES or REFUSED; `sees`: there is a vision tower.

    Decided by structure, not by width, so that small models of the same make are recognised too.
    """
    if unet is None:
        return "unknown"
    if unet.noise_levels is not None:
        return "x4-upscaler"
    if any(key.startswith("cc_projection.") for key in keys):
        return "zero123"
    depths = (unet.down_depth, unet.up_depth, unet.mid_depth)
    if unet.vector_dim is not None:
        if depths == (REFINER.down_depth, REFINER.up_depth, REFINER.mid_depth):
            return "sdxl-refiner"
        if depths == (SSD1B.down_depth, SSD1B.up_depth, SSD1B.mid_depth):
            return "ssd-1b"
        if depths == (SDXL.down_depth, SDXL.up_depth, SDXL.mid_depth):
            return {4: "sdxl-base", 9: "sdxl-inpainting", 8: "ip2p"}.get(unet.in_channels, "unknown")
        if unet.down_depth == ((0, 0), (1, 1), (2, 2)):
            return "vega"
        if unet.down_depth == SD2.down_depth or any(
            key.startswith(("embedder.model.", "noise_augmentor.")) for key in keys
        ):
            return "unclip"
        return "koala" if len(unet.down_depth) == len(SDXL.down_depth) else "unknown"
    if unet.in_channels == 8:
        return "ip2p"
    if sees:
        return "sd-image-variations" if unet.in_channels == SD1.in_channels and not unet.linear_proj else "unknown"
    if unet.linear_proj:
        return {4: "sd2-base", 9: "sd2-inpainting", 5: "sd2-depth"}.get(unet.in_channels, "unknown")
    return {4: "sd1", 9: "sd1-inpainting"}.get(unet.in_channels, "unknown")


def not_a_model(shapes: Shapes) -> str:
    """What a file without a UNet in it is instead."""
    first = next(iter(shapes))
    lora = next((key for key in shapes if re.search(r"^lora_|\.lora_|_lora\.|hada_w|lokr_w", key)), None)
    vae = any(
        f"{prefix}encoder.conv_in.weight" in shapes and f"{prefix}decoder.conv_in.weight" in shapes
        for prefix in ("", VAE)
    )
    if lora:
        return f"is a LoRA ({lora[:60]}), not a model; use it with --lora, beside the model that it was made for"
    if any("double_blocks." in key or "joint_blocks." in key for key in shapes):
        return "is a Flux or SD 3 transformer; this project reads models with a UNet"
    if any(key.startswith(("control_model.", "controlnet_")) for key in shapes):
        return "is a ControlNet, not a model; load the model that it steers"
    if vae:
        return "is a VAE alone, not a model: it has no UNet; use it with --vae (weights.load_vae), beside a complete checkpoint"
    if "conv_in.weight" in shapes and any(key.startswith("down_blocks.") for key in shapes):
        return "is a diffusers UNet alone, not a model; name the folder that unet/, vae/ and text_encoder/ are in"
    if any(key.removeprefix("diffusion_model.") == "input_blocks.0.0.weight" for key in shapes):
        return f"is a bare UNet (no {UNET} in its names); use a complete checkpoint"
    if any(key.startswith("special_care_embeds") for key in shapes):
        return "is a safety checker, not a model; use it with --safety"
    if any("text_model.encoder.layers.0." in key for key in shapes):
        return "is a text tower alone, not a model; use a complete checkpoint"
    embedding = len(shapes) <= 3 and all(len(shape) <= 2 and math.prod(shape) <= 1_000_000 for shape in shapes.values())
    if embedding or any(key.startswith("string_to_param.") for key in shapes):
        return f"is a textual-inversion embedding ({first[:40]}), not a model; use it with --embedding, beside the model that it was made for"
    return f"has no UNet ({UNET}input_blocks.0.0.weight is missing; it begins with {first[:40]}); use a Stable Diffusion checkpoint"
