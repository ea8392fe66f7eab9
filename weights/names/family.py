"""Which family a UNet is of, by comparison with those in FAMILIES; and kinds that are recognised and not supported."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os import PathLike

from ldm.config import FAMILIES, SD2, ModelConfig, UNetConfig
from ldm.errors import ArgumentError, FileError
from weights.names.sizes import visible_unet


@dataclass(frozen=True)
class Relative:
    """A kind of latent diffusion model that is recognised, and not supported."""

    name: str
    title: str
    fits: Callable[[UNetConfig, Iterable[str]], object]  # true or false by the visible sizes and the keys of the file


def depths(unet: UNetConfig) -> tuple[object, ...]:
    """Where a UNet has transformers, and of how many blocks."""
    return unet.down_depth, unet.up_depth, unet.mid_depth


def _any_key(keys: Iterable[str], *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in keys)


VEGA = ((0, 0), (1, 1), (2, 2))
RELATIVES = (  # of a UNet that is of no family: the first that fits
    Relative("zero123", "a Zero123 model (views of an object)", lambda unet, keys: _any_key(keys, "cc_projection.")),
    Relative("vega", "a Segmind Vega model", lambda unet, keys: unet.vector_dim and unet.down_depth == VEGA),
    Relative("unclip", "an unCLIP model", lambda unet, keys: unet.vector_dim and _is_unclip(unet, keys)),
    Relative(
        "koala", "a KOALA or otherwise distilled SDXL model",
        lambda unet, _: unet.vector_dim and len(unet.channel_mult) == 3 and not _has_depths_of_a_family(unet),
    ),
    Relative("ip2p", "an InstructPix2Pix-like model (8 input channels)", lambda unet, keys: unet.in_channels == 8),
)  # fmt: skip
UNKNOWN = "unknown"
REFUSED = {one.name: one.title for one in RELATIVES} | {UNKNOWN: "a latent diffusion model of an unknown family"}


def _has_depths_of_a_family(unet: UNetConfig) -> bool:
    return any(depths(one.unet) == depths(unet) for one in FAMILIES.values())


def _is_unclip(unet: UNetConfig, keys: Iterable[str]) -> bool:
    return unet.down_depth == SD2.down_depth or _any_key(keys, "embedder.model.", "noise_augmentor.")


def family(unet: UNetConfig | None, sees: bool, keys: Iterable[str]) -> str:
    """The family whose UNet has these visible sizes and inputs: a name in FAMILIES, or in REFUSED.

    sees  there is a vision tower
    Of families with the same inputs it is the one of the same sizes; else of the same structure at another width; else,
    where they all have one structure, the first: a UNet of that make with blocks of its own.
    """
    if unet is None:
        return UNKNOWN
    alike = [
        one for one in FAMILIES.values() if _inputs(one.unet) == _inputs(unet) and (one.vision is not None) == sees
    ]
    same = [one for one in alike if visible_unet(one.unet) == unet] or [
        one for one in alike if depths(one.unet) == depths(unet)
    ]
    if same:
        return same[0].name
    relative = next((one.name for one in RELATIVES if one.fits(unet, keys)), None)
    if relative is not None:
        return relative
    return alike[0].name if len({depths(one.unet) for one in alike}) == 1 else UNKNOWN


def _inputs(unet: UNetConfig) -> tuple[object, ...]:
    """What a UNet is given, and how its transformers store their projections: what tells makes apart."""
    return unet.in_channels, unet.linear_proj, unet.vector_dim is not None, unet.noise_levels is not None


def structure(config: ModelConfig) -> tuple[object, ...]:
    """What `family` tells families apart by, sizes aside."""
    return _inputs(config.unet), config.vision is not None, depths(config.unet)


def family_title(config: ModelConfig) -> str:
    """What a model is, in words."""
    return config.family.title or f"a model of family {config.name}"


def title_of(name: str) -> str:
    """What a model of this family, or of a kind in REFUSED, is in words."""
    return REFUSED[name] if name in REFUSED else FAMILIES[name].title


def require_family(config: str) -> None:
    """Refuse what is no family's name."""
    if config not in FAMILIES:
        near = difflib.get_close_matches(config, FAMILIES, n=1)
        meant = f" (meant {near[0]}?)" if near else ""
        raise ArgumentError(f"config '{config[:40]}' is no family{meant}; there are {', '.join(FAMILIES)}")


def named(name: str, config: str | None, path: str | PathLike[str]) -> ModelConfig:
    """The config of the family that was recognised, or of the one asked for if the file can be of it."""
    if name == UNKNOWN and config is not None:  # the file may be incomplete: loading says what is missing
        return FAMILIES[config]
    if name in REFUSED:
        raise FileError(
            f"is {REFUSED[name]}, unknown here; pass config= if it is a damaged file of a known one", path=path
        )
    found, wanted = FAMILIES[name], FAMILIES[config or name]
    if structure(wanted) != structure(found):
        raise FileError(
            f"is {found.title} and config is '{config}'; leave config out, or name the right one", path=path
        )
    return wanted
