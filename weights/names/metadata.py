"""A `ModelConfig` as the JSON text that our own files carry under `ldm.config`."""

from __future__ import annotations

import json
import math
import types
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ldm.config import FAMILIES, DepthConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from ldm.errors import ArgumentError

CONFIG_KEY = "ldm.config"
MAX_SIZE = 2**20  # of any number of channels, layers, pixels, ...
MAX_ITEMS = 64  # of any list
MAX_TEXT = 100_000  # characters of the whole
NAMED = ("title", "base")  # fields that are written only of models of no known family, whose name tells them


def to_json(config: ModelConfig) -> str:
    """The config as one line of JSON; `from_json` gives it back."""
    described = asdict(config)
    for field in NAMED:
        if config.name in FAMILIES or not described[field]:
            del described[field]
    return json.dumps(described, separators=(",", ":"))


def from_json(text: str) -> ModelConfig:
    """The config that `to_json` wrote. Raises ArgumentError that names the field for anything else."""
    if len(text) > MAX_TEXT:
        raise ArgumentError(f"its {CONFIG_KEY} has {len(text)} characters; the limit is {MAX_TEXT}", key=CONFIG_KEY)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ArgumentError(f"its {CONFIG_KEY} is not JSON", key=CONFIG_KEY) from None
    config = _read(ModelConfig, value, CONFIG_KEY)
    _require_buildable(config)
    return replace(config, title=config.family.title, base=config.family.base)


def _read(kind: Any, value: Any, where: str) -> Any:
    """`value` as the type `kind` of a config field."""
    if is_dataclass(kind):
        return _read_dataclass(kind, value, where)
    origin, options = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # X | None
        (inner,) = (option for option in options if option is not type(None))
        return None if value is None else _read(inner, value, where)
    if origin is Literal:
        return _require(isinstance(value, str) and value in options, value, where, f"one of {', '.join(options)}")
    if origin is tuple:
        _require(isinstance(value, list) and len(value) <= MAX_ITEMS, value, where, f"a list of at most {MAX_ITEMS}")
        return tuple(_read(options[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is float:
        _require(
            type(value) in (int, float) and 0 <= value <= MAX_SIZE and math.isfinite(value),
            value,
            where,
            "a finite number",
        )
        return float(value)
    if kind is int:
        return _require(type(value) is int and 0 <= value <= MAX_SIZE, value, where, f"a whole number up to {MAX_SIZE}")
    return _require(type(value) is kind and (kind is not str or len(value) <= 100), value, where, kind.__name__)


def _read_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    _require(isinstance(value, dict), value, where, "an object")
    if kind is ModelConfig and "name" not in value:
        raise ArgumentError(f"{where} lacks a name", key=CONFIG_KEY)
    unknown = sorted(set(value) - known)
    if unknown:
        raise ArgumentError(f"{where} has a field that this version does not know: {unknown[0][:60]}", key=CONFIG_KEY)
    values = {name: _read(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**values)
    except ArgumentError:
        raise
    except ValueError as fault:
        raise ArgumentError(f"its {CONFIG_KEY} is impossible: {fault}", key=CONFIG_KEY) from None


def _require(holds: bool, value: Any, where: str, what: str) -> Any:
    if not holds:
        raise ArgumentError(f"{where} is {json.dumps(value)[:40]}, not {what}", key=CONFIG_KEY)
    return value


def _require_buildable(config: ModelConfig) -> None:
    """Numbers that fit together: what the networks would otherwise only notice when built, or when first used."""
    faults = [_unet(config.unet), _vae(config.vae), *map(_text, config.text)]
    faults += [] if config.vision is None else [_vision(config.vision)]
    faults += [] if config.depth is None else [_depth(config.depth)]
    faults += [f"a picture size of {config.size} pixels"] if config.size < 1 else []
    if fault := next((fault for fault in faults if fault is not None), None):
        raise ArgumentError(f"its {CONFIG_KEY} is impossible: {fault}", key=CONFIG_KEY)


def _unet(unet: UNetConfig) -> str | None:
    widths = [unet.model_channels * m for m in unet.channel_mult]
    if not widths or any(width < 1 or width % 32 for width in (unet.model_channels, *widths)):
        return f"UNet widths {widths} are not multiples of 32"
    if (
        min(
            unet.in_channels, unet.out_channels, unet.num_res_blocks, unet.context_dim, unet.heads or unet.head_dim or 0
        )
        < 1
    ):
        return "a UNet size is 0"
    share = (lambda width: width % unet.heads) if unet.heads else (lambda width: width % (unet.head_dim or 1))
    if any(share(width) for width, depths in zip(widths, unet.down_depth, strict=True) if any(depths)):
        return f"{unet.heads or unet.head_dim} does not divide the UNet widths {widths} into heads"
    return None


def _vae(vae: VAEConfig) -> str | None:
    if (
        not vae.channel_mult
        or vae.channels < 1
        or any((vae.channels * m) % 32 or m < 1 for m in (1, *vae.channel_mult))
    ):
        return "VAE widths are not multiples of 32"
    return "a VAE size is 0" if min(vae.num_res_blocks, vae.z_channels) < 1 or vae.scale <= 0 else None


def _text(text: TextConfig) -> str | None:
    if min(text.vocab, text.length, text.width, text.heads, text.mlp) < 1 or text.width % text.heads:
        return f"a text tower of width {text.width} with {text.heads} heads"
    return "a text tower that skips all its layers" if text.skip >= max(text.layers, 1) else None


def _vision(vision: VisionConfig) -> str | None:
    sizes = (vision.width, vision.heads, vision.mlp, vision.projection, vision.patch)
    if min(sizes) < 1 or vision.width % vision.heads or vision.image < vision.patch:
        patches = f"patches of {vision.patch} of {vision.image} pixels"
        return f"an image encoder of width {vision.width} with {vision.heads} heads and {patches}"
    return None


def _depth(depth: DepthConfig) -> str | None:
    if depth.stem < 1 or depth.stem % 32 or depth.image < 32 or depth.image % 32 or min(depth.blocks) < 1:
        sizes = f"stem of {depth.stem} channels and pictures of {depth.image} pixels"
        return f"a depth network whose {sizes} are not multiples of 32"
    if min(depth.width, depth.heads, depth.mlp) < 1 or depth.features < 2 or depth.width % depth.heads:
        return f"a depth network of width {depth.width} with {depth.heads} heads"
    return None
