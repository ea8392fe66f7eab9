"""The blocks of a model by the names that people who merge models give them, each with its weight."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from ldm.config import ModelConfig
from ldm.errors import ArgumentError

Blocks = Mapping[str, float] | Sequence[float]  # by name, or one number for each block of the UNet

_OTHERS = {"text.": "TEXT", "vae.": "VAE", "vision.": "VISION", "depth.": "DEPTH"}


def unet_blocks(config: ModelConfig) -> list[str]:
    """IN00 ... MID ... OUT11, in the order of the forward: 25 for SD 1 and 2, 19 for SDXL."""
    inputs = len(config.unet.down_depth) * (config.unet.num_res_blocks + 1)
    outputs = sum(len(depths) for depths in config.unet.up_depth)
    return [*(f"IN{i:02}" for i in range(inputs)), "MID", *(f"OUT{i:02}" for i in range(outputs))]


def block_of(parameter: str, config: ModelConfig) -> str:
    """The block that one of our parameters belongs to.

    What comes before all blocks (time_embed, label_emb) goes with IN00, what comes after them (out) with the last one: the custom of the
    A1111 extension "merge block weighted", whose 25 numbers are shared among people.
    """
    other = next((block for prefix, block in _OTHERS.items() if parameter.startswith(prefix)), None)
    if other:
        return other
    match = re.match(r"unet\.(input|output)_blocks\.(\d+)\.", parameter)
    if match:
        return f"{match[1][:-3].upper()}{int(match[2]):02}"
    if parameter.startswith("unet.middle_block."):
        return "MID"
    return unet_blocks(config)[-1 if parameter.startswith("unet.out.") else 0]


def weights_of(blocks: Blocks | None, config: ModelConfig) -> dict[str, float]:
    """{block: weight} for the blocks that are given one. Raises ArgumentError for names that this family has not, and for another number of numbers."""
    if blocks is None:
        return {}
    there = unet_blocks(config)
    if not isinstance(blocks, Mapping):
        if len(blocks) != len(there):
            raise _error(f"{len(blocks)} numbers; the UNet of {config.name} has {len(there)} blocks ({there[0]} to {there[-1]}): give as many, or name blocks")
        return dict(zip(there, blocks, strict=True))
    has = {"text.": config.text, "vae.": config.vae, "vision.": config.vision, "depth.": config.depth}
    there += [block for prefix, block in _OTHERS.items() if has[prefix]]
    found: dict[str, float] = {}
    for given, weight in blocks.items():
        name = {"M00": "MID"}.get(given.upper(), given.upper())
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.0)[0]
            raise _error(f"{given[:40]} is no block of {config.name} (meant {near}?); there are {', '.join(_ranges(config, there))}")
        if name in found:
            raise _error(f"{name} is given twice")
        found[name] = weight
    return found


def _ranges(config: ModelConfig, there: Sequence[str]) -> list[str]:
    blocks = unet_blocks(config)
    return [f"{blocks[0]} to {blocks[blocks.index('MID') - 1]}", "MID", f"OUT00 to {blocks[-1]}", *there[len(blocks) :]]


def _error(what: str) -> ArgumentError:
    return ArgumentError(f"blocks: {what}", key="blocks")
