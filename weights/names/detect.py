"""Tensor shapes and header evidence -> `ModelConfig`, or an error that says what is undecided."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from os import PathLike

from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError
from weights.names.family import family, family_title, named, require_family
from weights.names.layout import Layout, original
from weights.names.metadata import CONFIG_KEY, from_json
from weights.names.sizes import (
    UNET,
    Config,
    Lookup,
    Shapes,
    read_text,
    read_unet,
    read_vae,
    read_vision,
    visible,
)


@dataclass(frozen=True)
class Shown:
    """The networks of a model, as far as shapes show them. None: there is no such network, or it is damaged."""

    unet: UNetConfig | None
    vae: VAEConfig | None
    text: tuple[TextConfig | None, ...]
    vision: VisionConfig | None


def shown(shapes: Shapes, layout: Layout, unet: UNetConfig | None, vae: VAEConfig | None) -> Shown:
    """The networks that tensors of these shapes show: text and vision towers are where `layout` says."""
    text = tuple(read_text(lookup(layout, shapes, part.ours)) for part in layout.parts if part.ours.startswith("text."))
    return Shown(unet, vae, text, read_vision(lookup(layout, shapes, "vision.")))


def shown_in_file(shapes: Shapes, layout: Layout) -> Shown:
    """The same of a single file."""
    return shown(shapes, layout, read_unet(shapes), read_vae(shapes))


def lookup(layout: Layout, shapes: Shapes, network: str) -> Lookup:
    """The shape that a parameter of one network would have here, by its name in that network."""
    return lambda name: next(
        (place.ours(shapes[place.key]) for place in layout.places(network + name) if place.key in shapes), None
    )


def detect(
    shapes: Shapes, metadata: Mapping[str, str], config: ModelConfig | str | None, path: str | PathLike[str]
) -> ModelConfig:
    """The config of the model in a single file whose tensors have these shapes.

    Whether SD 2 predicts eps or v, `weights.names.prediction` finds out. `config` (a ModelConfig, or the name of a
    family) overrules what the file says; then comes `ldm.config` in its metadata, then the shapes of the published
    families. `path` is for errors. Raises FileError for what is no model, or of a family that cannot be loaded, and
    AmbiguousCheckpoint where only a config can settle it.
    """
    if isinstance(config, str):
        require_family(config)
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        from weights.names.instead import instead  # of which a model needs nothing

        raise FileError(instead(shapes), path=path)
    there = shown_in_file(shapes, original(shapes))
    if isinstance(config, ModelConfig):
        return without_unread(config, there.text)
    if config is None and CONFIG_KEY in metadata:
        return _described(metadata[CONFIG_KEY], there, path)
    known = like_file(named(family(there.unet, there.vision is not None, shapes), config, path), there.text)
    if config is None:
        _require_published(known, there, path)
    return known


def _require_published(known: ModelConfig, there: Shown, path: str | PathLike[str]) -> None:
    """Refuse other sizes than the family's: they would need heads, which shapes do not show."""
    pairs = _pairs(known, there)
    odd = [what for what, usual, found in pairs if found is not None and usual is not None and found != usual]
    if odd:
        what = f"is {family_title(known)} of its own sizes ({', '.join(dict.fromkeys(odd))})"
        raise AmbiguousCheckpoint(f"{what}; shapes do not show heads: pass config=ModelConfig(...)", path=path)


def _pairs(config: ModelConfig, there: Shown) -> list[tuple[str, Config | None, Config | None]]:
    """(network, as the config has it, as the file has it), both as far as shapes show; None where there is none.

    Text towers as far as both have them: the caller compares their number where it matters.
    """
    pairs: list[tuple[str, Config | None, Config | None]] = [
        ("UNet", config.unet, there.unet),
        ("VAE", config.vae, there.vae),
        ("image encoder", config.vision, there.vision),
    ]
    pairs += [
        ("text tower", _comparable(usual, found), found) for usual, found in zip(config.text, there.text, strict=False)
    ]
    return [(what, None if usual is None else visible(usual), found) for what, usual, found in pairs]


def _comparable(usual: TextConfig, there: TextConfig | None) -> TextConfig:
    """The usual tower, with the projection that CLIP-L's file may have and no family reads."""
    return replace(usual, projection=there.projection) if there is not None and usual.projection is None else usual


def _described(described: str, there: Shown, path: str | PathLike[str]) -> ModelConfig:
    """The config in the metadata, if it agrees with the shapes: nothing is built from its numbers alone."""
    try:
        config = from_json(described)
    except ArgumentError as fault:
        raise FileError(str(fault), path=path, key=CONFIG_KEY) from None
    odd = next((what for what, claimed, found in _pairs(config, there) if claimed != found), None)
    if odd is None and len(config.text) != len(there.text):
        odd = "text tower"
    if odd is not None:
        raise FileError(
            f"its {CONFIG_KEY} and the shapes of its {odd} disagree; pass config= to overrule it",
            path=path,
            key=CONFIG_KEY,
        )
    return config


def without_unread(config: ModelConfig, towers: Sequence[TextConfig | None]) -> ModelConfig:
    """The config without the last blocks and the projection of a text tower that the file lacks and nothing reads.

    SD 2's conditioning comes after block 23 of 24, so files of some trainers end there, as diffusers' folders do.
    """

    def fitted(i: int, known: TextConfig, there: TextConfig | None) -> TextConfig:
        if there is None or i == config.pooled_tower:
            return known
        used = known.layers - known.skip
        if used <= there.layers < known.layers:
            known = replace(known, layers=there.layers, skip=there.layers - used)
        return replace(known, projection=None) if there.projection is None else known

    return _with_towers(config, towers, fitted)


def unread(name: str, config: ModelConfig) -> bool:
    """Is this of the last blocks or projection of a text tower, which nothing reads, so that files may lack it?"""
    match = re.match(r"text\.(\d+)\.(?:text_model\.encoder\.layers\.(\d+)\.|(text_projection)\.)", name)
    if match is None or int(match[1]) == config.pooled_tower or int(match[1]) >= len(config.text):
        return False
    tower = config.text[int(match[1])]
    return match[3] is not None or int(match[2]) >= tower.layers - tower.skip


def like_file(config: ModelConfig, towers: Sequence[TextConfig | None]) -> ModelConfig:
    """The config with what a file may change of its text towers without being asked: added tokens, removed layers."""

    def fitted(i: int, known: TextConfig, there: TextConfig | None) -> TextConfig:
        if there is None:
            return known
        known = replace(known, vocab=there.vocab, length=there.length)
        shorter = replace(known, layers=there.layers, skip=min(known.skip, max(there.layers - 1, 0)))
        return known if i == config.pooled_tower else shorter

    return _with_towers(without_unread(config, towers), towers, fitted)


def _with_towers(
    config: ModelConfig,
    towers: Sequence[TextConfig | None],
    fitted: Callable[[int, TextConfig, TextConfig | None], TextConfig],
) -> ModelConfig:
    """The config with each text tower fitted to that of the file, None where the file has none."""
    pairs = zip_longest(config.text, towers[: len(config.text)])
    return replace(config, text=tuple(fitted(i, known, there) for i, (known, there) in enumerate(pairs)))
