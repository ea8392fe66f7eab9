"""A LoRA in peft's form, which diffusers shares: low rank alone, and settings that say alpha."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.changes.lora import Change, Decomposed, Full, Generalised, Hadamard, Kronecker, LowRank, Shape, plain, rank
from ldm.config import ModelConfig
from ldm.errors import FileError
from weights.adapters import names as lora_names
from weights.adapters.kohya import alpha_of, as_layers
from weights.files.opened import Tensors
from weights.files.write import Pending, pending
from weights.names.places import short

ADAPTER = "lora_adapter_metadata"  # metadata: where diffusers keeps peft's settings, each after the name of its network
MAX_SETTINGS = 1_000_000  # bytes of an adapter_config.json
TITLES = {
    LowRank: "a LoCon with a core", Hadamard: "a LoHa", Kronecker: "a LoKr", Generalised: "a GLoRA",
    Full: "a full difference", Decomposed: "a DoRA",
}  # fmt: skip


@dataclass(frozen=True)
class Scaling:
    """What peft's settings say of alpha."""

    alpha: float  # of modules not in by_module
    by_module: Mapping[str, float] = field(default_factory=dict)  # end of a module's dotted name -> its alpha
    root: bool = False  # rank-stabilised: divided by the root of the rank

    def alpha_of(self, module: str, rank: int) -> float:
        """alpha of a module, in the sense that alpha / rank is its scale."""
        ends = (alpha for end, alpha in self.by_module.items() if module == end or module.endswith(f".{end}"))
        alpha = next(ends, self.alpha)
        return alpha * math.sqrt(rank) if self.root else alpha


def scalings(file: Tensors) -> dict[str, Scaling]:
    """{"unet.": ..., "text_encoder.": ...} from diffusers' metadata, or {"": ...} from peft's adapter_config.json."""
    if text := file.metadata.get(ADAPTER):
        what = f"its {ADAPTER}"
        settings = _settings(file.error, text, what)
        parts = {
            part: {key.removeprefix(part): settings[key] for key in settings if key.startswith(part)}
            for part in ("unet.", *(f"{tower}." for tower in lora_names.TOWERS), "")
        }
        return {part: _scaling(file.error, values, what) for part, values in parts.items() if "lora_alpha" in values}
    beside = file.path.with_name("adapter_config.json")
    if file.path.stem != "adapter_model" or not beside.is_file():
        return {}

    def error(what: str, key: str | None = None) -> FileError:
        return FileError(what, path=beside, key=key)

    try:
        if beside.stat().st_size > MAX_SETTINGS:
            raise error(f"has more than {MAX_SETTINGS} bytes, which no settings of a LoRA need")
        settings = _settings(error, beside.read_text(encoding="utf-8", errors="replace"), "it")
    except OSError as fault:
        raise error(f"cannot be read ({fault.strerror}), and alpha is in it") from None
    return {"": _scaling(error, settings, "it")}


def _settings(error: Callable[..., FileError], text: str, what: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise error(f"{what} is not a JSON object; download it again")
    return settings


def _scaling(error: Callable[..., FileError], settings: Mapping[str, Any], what: str) -> Scaling:
    def number(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise error(f"{what} has an alpha that is no finite number; download it again", "lora_alpha")
        return float(value)

    pattern = settings.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or any(not re.fullmatch(r"\w+(\.\w+)*", end) for end in pattern):
        fault = f"{what} has an alpha_pattern that is not made of module names"
        raise error(f"{fault}; this version reads no expressions there", "alpha_pattern")
    by_module = {end: number(alpha) for end, alpha in pattern.items()}
    return Scaling(number(settings.get("lora_alpha")), by_module, settings.get("use_rslora") is True)


class Held(NamedTuple):
    """A change of a module as peft holds it."""

    factors: LowRank
    magnitude: Tensor | None  # of a DoRA, [out, 1]
    shape: Shape  # of the module's weight


def by_network(changes: Mapping[str, Change], to: str, config: ModelConfig, source: Path) -> dict[str, dict[str, Held]]:
    """{unet or text_encoder(_2): {module as diffusers names it: its change}}.

    Raises FileError about `source`, with the first module, for a change that `to` (peft or diffusers) cannot hold.
    """
    networks: dict[str, dict[str, Held]] = {}
    first: dict[str, tuple[bool, str]] = {}  # network -> whether its first change is a DoRA, and of which module
    for parameter, change in changes.items():
        module, _, leaf = parameter.rpartition(".")
        inner, what = plain(change), unheld(change)
        if what is not None or not isinstance(inner, LowRank):
            remedy = "use --as-lora RANK" if expressible(change) else "merge it instead"
            where = f"{short(module, 36)}{'.bias' if leaf == 'bias' else ''}"
            raise FileError(f"{where} is {what}, which {to} cannot hold; {remedy}", path=source, key=parameter)
        if module.startswith("text.") and len(config.text) == 1 and config.unet.vector_dim is not None:
            what = (
                f"{short(module, 30)} is of the refiner's text tower, for which {to} has no settled name; keep kohya's"
            )
            raise FileError(what, path=source, key=parameter)
        network, name = lora_names.components(config)[module]
        magnitude = change.magnitude if isinstance(change, Decomposed) else None
        dora, other = first.setdefault(network, (magnitude is not None, module))
        if dora != (magnitude is not None):
            what = f"{short(other if dora else module, 36)} is a DoRA, others beside it are not: {to} holds no mixture"
            raise FileError(f"{what}; merge it instead", path=source, key=parameter)
        networks.setdefault(network, {})[name] = Held(inner, magnitude, lora_names.shapes(config)[parameter])
    return networks


def unheld(change: Change) -> str | None:
    """What this is, if diffusers and peft do not hold it; None if they do."""
    if isinstance(change, Decomposed):
        if change.magnitude.shape[1] != 1:
            return "a DoRA with a magnitude per input"
        inner = unheld(change.inner)
        return None if inner is None else f"a DoRA of {inner}"
    return None if isinstance(change, LowRank) and change.mid is None else TITLES[type(change)]


def expressible(change: Change) -> bool:
    """Can this be computed as a matrix without the weight that it changes?"""
    return isinstance(change, (LowRank, Hadamard, Kronecker)) or (isinstance(change, Full) and change.diff.ndim > 1)


def peft_tensors(network: Mapping[str, Held], dtype: torch.dtype | None) -> dict[str, Pending]:
    """{key: tensor} of one network, without what stands before the module's name."""
    tensors: dict[str, Pending] = {}
    for name, held in network.items():
        down, up = as_layers(held.factors, held.shape)
        tensors[f"{name}.lora_A.weight"] = pending(down.contiguous(), dtype)
        tensors[f"{name}.lora_B.weight"] = pending(up.contiguous(), dtype)
        if held.magnitude is not None:  # [out] of a matrix, [1, out, 1, 1] of a kernel
            kernel = held.shape[2:]
            flat = held.magnitude.flatten()
            magnitude = flat.reshape(1, -1, *(1 for _ in kernel)) if kernel else flat
            tensors[f"{name}.lora_magnitude_vector"] = pending(magnitude, dtype)
    return tensors


def settings(network: Mapping[str, Held]) -> dict[str, Any]:
    """peft's LoraConfig of one network: rank and alpha of most modules, and patterns for the others.

    peft takes a pattern for the end of a module's name, and no whole name here is the end of another. The names of text
    towers are written without `text_model.`, which transformers 5 leaves out of some: so they end the old and the new.
    """
    bare = {name.removeprefix("text_model."): held for name, held in network.items()}
    ranks = {name: rank(held.factors) or 1 for name, held in bare.items()}
    alphas = {name: _number(alpha_of(held.factors) or 0.0) for name, held in bare.items()}
    r, alpha = _most(ranks.values()), _most(alphas.values())
    return {
        "r": r, "rank_pattern": {name: one for name, one in ranks.items() if one != r},
        "lora_alpha": alpha, "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha},
        "target_modules": sorted(ranks), "use_rslora": False,
        "use_dora": any(held.magnitude is not None for held in network.values()),
    }  # fmt: skip


def _most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
