"""For which family a LoRA was made: the one whose modules, in their shapes, it changes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from ldm.changes.lora import Change, Changes, Shape, require_fit
from ldm.config import FAMILIES, ModelConfig, TextConfig, UNetConfig
from ldm.errors import ArgumentError
from weights.adapters import names as lora_names
from weights.adapters.names import short
from weights.adapters.spelled import Spelled
from weights.files.opened import Tensors


def kinds() -> list[str]:
    """The first family of each kind, the shallowest first: what fits two is taken for the smaller's.

    Families are of one kind if LoRAs find the same modules of the same shapes in them: sd1 and sd1-inpainting.
    """
    found: dict[tuple[UNetConfig, tuple[TextConfig, ...]], str] = {}
    for name, family in FAMILIES.items():
        unet = replace(family.unet, in_channels=4, heads=1, head_dim=None, linear_proj=False)
        text = tuple(replace(t, heads=1, activation="gelu", pad=0, skip=0, norm=True) for t in family.text)
        if text or all(unet != other for other, _ in found):
            found.setdefault((unet, text), name)
    return sorted(found.values(), key=lambda name: _depth(FAMILIES[name].unet))


def _depth(unet: UNetConfig) -> int:
    return sum(map(sum, (*unet.down_depth, *unet.up_depth))) + (unet.mid_depth or 0)


def resolved(
    file: Tensors, spelled: Spelled, strays: Iterable[str], config: ModelConfig, allow_unmatched: bool = False
) -> tuple[dict[str, Change], tuple[str, ...]]:
    """The changes of a file by our names, and the modules for which a model of this config has no place.

    Raises FileError for a LoRA of another family, for shapes that do not fit and, unless `allow_unmatched`, for such
    modules.
    """
    table, shapes = lora_names.spellings(config), lora_names.shapes(config)
    found: dict[str, Change] = {}
    unmatched, misfits = [*strays], []
    for (spelling, leaf), change in spelled.items():
        parameter = f"{table.get(spelling)}.{leaf}"
        if parameter not in shapes:
            unmatched.append(spelling if leaf == "weight" or spelling not in table else f"{spelling}.{leaf}")
            continue
        if parameter in found:
            raise file.error(f"changes {parameter} twice, under two names; which is right cannot be known", spelling)
        found[parameter] = change
        if fault := misfit(change, shapes[parameter]):
            misfits.append((spelling, fault))
    unmatched = list(dict.fromkeys(unmatched))
    if misfits or not found or not allow_unmatched:
        _require_family(file, spelled, len(found) - len(misfits), config)
        if misfits:
            (spelling, fault), others = misfits[0], len(misfits) - 1
            raise file.error(f"{short(spelling)}: {fault}{f' (and {others} more)' if others else ''}", spelling)
        if unmatched:
            of = len(unmatched) + Changes(found).modules
            remedy = "allow_unmatched leaves them out" if found else "use a LoRA for it"
            names = ", ".join(map(short, unmatched[:2]))
            what = f"{len(unmatched)} of {of} modules are not in a model of family {config.name} ({names})"
            raise file.error(f"{what}; {remedy}", unmatched[0])
        _require_whole(file, spelled, found, config)
    return found, tuple(unmatched)


def count_fitting(spelled: Spelled, config: ModelConfig) -> int:
    """How many of the changes have a place of the right shape in a model of this config."""
    table, shapes = lora_names.spellings(config), lora_names.shapes(config)
    places = [(shapes.get(f"{table.get(spelling)}.{leaf}"), change) for (spelling, leaf), change in spelled.items()]
    return sum(shape is not None and misfit(change, shape) is None for shape, change in places)


def is_whole(modules: Iterable[str], config: ModelConfig) -> bool:
    """Are these, of our names, all modules of the UNet of their kinds (attn1.to_q, proj_in, ...)?"""

    def kind(module: str) -> str:
        return re.sub(r"^.*\.\d+\.(?=\D)", "", module)

    changed = {module for module in modules if module.startswith("unet.")}
    kinds_changed = {kind(module) for module in changed}
    all_of_unet = (module for module, (network, _) in lora_names.components(config).items() if network == "unet")
    return {module for module in all_of_unet if kind(module) in kinds_changed} == changed


def _require_family(file: Tensors, spelled: Spelled, fits: int, config: ModelConfig) -> None:
    """Refuse what fits a model of another family better."""
    if fits == len(spelled):
        return
    elsewhere = {name: count_fitting(spelled, FAMILIES[name]) for name in kinds()}
    best = max(elsewhere, key=lambda name: elsewhere[name])
    if elsewhere[best] > fits:
        of = f"of {len(spelled)} weights fit"
        what = f"is a LoRA for {best} ({elsewhere[best]} {of}), the model is {config.name} ({fits} {of})"
        raise file.error(f"{what}; use one made for {config.name}")


def _require_whole(file: Tensors, spelled: Spelled, found: Iterable[str], config: ModelConfig) -> None:
    """Refuse what fits, but is whole only in a family of fewer blocks: SSD-1B's modules are a part of SDXL's."""
    modules = {name.rpartition(".")[0] for name in found}
    if is_whole(modules, config):
        return
    for name in kinds():
        if is_whole(modules, FAMILIES[name]) and count_fitting(spelled, FAMILIES[name]) == len(spelled):
            what = f"is a LoRA for {name}: it changes exactly the blocks of that; the model is {config.name}"
            raise file.error(f"{what}; use one made for {config.name}")


def misfit(change: Change, shape: Shape) -> str | None:
    """Why a change does not fit a weight of this shape; None: it does."""
    try:
        require_fit(change, shape)
    except ArgumentError as fault:
        return str(fault)
    return None
