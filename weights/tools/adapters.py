"""What LoRAs and embeddings are, by their names and shapes; of their numbers only alphas are read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.changes.lora import Change, Decomposed, Full, Generalised, Hadamard, Kronecker, LowRank, plain, rank
from ldm.config import FAMILIES, ModelConfig, TextConfig
from weights.adapters import names as lora_names
from weights.adapters.embedding import MAX_VECTORS, PARAMETERS, vector_keys
from weights.adapters.family import count_fitting, is_whole, kinds, misfit
from weights.adapters.spelled import Spelled, by_spelling
from weights.files.opened import Tensors, Weights
from weights.tools.evidence import TOWERS
from weights.tools.facts import EmbeddingFacts, LoraFacts

LETTERS = {"clip_l": "CLIP-L", "clip_g": "OpenCLIP-bigG"}
NOTED = ("ss_base_model_version", "modelspec.architecture", "ss_network_module")  # metadata that speak of the family


class _Outline(Tensors):
    """A file whose tensors have shapes and no numbers, except single ones: enough to see what its LoRA is."""

    def __init__(self, file: Tensors):
        super().__init__(file.path, file.specs, file.metadata, file.sources)
        self._file = file

    def stored(self, key: str, mapped: bool, rows: slice | None = None) -> Tensor:
        """As `Tensors.stored`."""
        spec = self.specs[key]
        if spec.numel == 1:
            return self._file.stored(key, mapped=False)
        return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def lora_facts(file: Tensors, config: ModelConfig | None = None) -> tuple[LoraFacts, tuple[str, ...], tuple[str, ...]]:
    """What a LoRA is, the names in it that belong to nothing, and what its family was decided by.

    config  the model that it is for; None: one of `kinds()`
    Raises FileError for a LoRA that lacks a part.
    """
    spelled, strays = by_spelling(_Outline(file))
    configs = {name: FAMILIES[name] for name in _candidates(spelled)} if config is None else {config.name: config}
    families, fitting = _families(spelled, configs)
    table = lora_names.spellings(configs[families[0]]) if families else {}
    unmatched = [*dict.fromkeys(spelling for spelling, _ in spelled if spelling not in table)] if families else []
    modules = {table.get(spelling, _component(spelling)) for spelling, _ in spelled}
    changes = [*spelled.values()]
    facts = LoraFacts(
        kinds=_counted(kind_of(change) for change in changes),
        spellings=_counted(spelling_of(spelling, file) for spelling in {spelling for spelling, _ in spelled}),
        ranks=_counted(r for change in changes if (r := rank(change)) is not None),
        alphas=_counted(alpha for change in changes if (alpha := _alpha(change)) is not None),
        families=families,
        fitting=fitting,
        weights=len(spelled),
        modules=_counted(re.sub(r"^(text\.\d+|[^.]+).*", r"\1", module) for module in modules),
    )
    fit = f"{fitting} of {len(spelled)} weights fit {' and '.join(families)} by name and shape"
    noted = [f"{key}: {file.metadata[key][:60]}" for key in NOTED if key in file.metadata]
    return facts, (*strays, *unmatched), (fit if families else "no weight fits any known family", *noted)


def kind_of(change: Change) -> str:
    """The name that a kind of change goes by."""
    if isinstance(change, Decomposed):
        inner = kind_of(change.inner)
        return "DoRA" if inner == "LoRA" else f"DoRA of {inner}"
    if isinstance(change, LowRank):
        return "LoCon" if change.mid is not None or max(change.down.shape[2:], default=1) > 1 else "LoRA"
    return {Hadamard: "LoHa", Kronecker: "LoKr", Generalised: "GLoRA", Full: "full difference"}[type(change)]


def spelling_of(spelling: str, keys: Mapping[str, object]) -> str:
    """Whose spelling of a module this is: kohya's has underscores; peft's and diffusers' differ in what follows."""
    if spelling.startswith("lora_"):
        return "kohya"
    return (
        "peft"
        if any(f"{spelling}.{end}" in keys for end in ("lora_A.weight", "lora_A.default.weight"))
        else "diffusers"
    )


def _alpha(change: Change) -> float | None:
    return getattr(plain(change), "alpha", None)


def _counted(values: Iterable[Any]) -> dict[Any, int]:
    """{value: how often}, the most frequent first."""
    return dict(Counter(values).most_common())


def _component(spelling: str) -> str:
    """The network of a module that no family has, by how its name begins."""
    return "unet" if re.match(r"lora_unet_|(base_model\.model\.)?unet\.", spelling) else "unknown"


def _families(spelled: Spelled, configs: Mapping[str, ModelConfig]) -> tuple[tuple[str, ...], int]:
    """Those of `configs` that most of the changes fit, and how many do.

    Where one is a part of another, as SSD-1B is of SDXL, it is the one whose UNet is changed whole.
    """
    counts = {name: count_fitting(spelled, config) for name, config in configs.items()}
    best = max(counts.values())
    families = [name for name in counts if counts[name] == best] if best else []
    for name in families:
        table = lora_names.spellings(configs[name])
        changed = {module for spelling, _ in spelled if (module := table.get(spelling, "")).startswith("unet.")}
        if changed and is_whole(changed, configs[name]):
            return (name,), best
    return tuple(families), best


def _candidates(spelled: Spelled) -> list[str]:
    """The families to compare with, by the first cross-attention's shape: to compare with all would take seconds."""
    attention = r"attn2[_.](processor\.)?to_[kv](_lora)?$"
    cross = next((change for (name, _), change in spelled.items() if re.search(attention, name)), None)
    everyone = kinds()
    names = [name for name in everyone if cross is None or _crosses(cross, FAMILIES[name])]
    middle = any(re.search(r"mid_block[_.]attentions|middle_block[_.]1[_.]", name) for name, _ in spelled)
    if not any("unet" in name or "attn1" in name or "block" in name for name, _ in spelled):
        towers: dict[tuple[TextConfig, ...], str] = {}  # text alone: the first family with each kind of tower
        for name in FAMILIES:
            if name in everyone:
                towers.setdefault(FAMILIES[name].text, name)
        names = [*towers.values()]
    return [name for name in names if not (middle and FAMILIES[name].unet.mid_depth is None)] or everyone


def _crosses(change: Change, config: ModelConfig) -> bool:
    """Can this change the key or value projection of a cross-attention of this family?"""
    shapes = [(config.unet.model_channels * m, config.unet.context_dim) for m in config.unet.channel_mult]
    return any(misfit(change, shape) is None for shape in shapes)


def embedding_facts(file: Tensors) -> EmbeddingFacts:
    """What a textual inversion is. Raises FileError for vectors that no embedding has."""
    keys = vector_keys(file)
    towers: dict[str, int] = {}
    counts = set()
    for key in sorted(keys, key=lambda key: file.shape(key)[-1:]):
        shape = file.shape(key)
        n, width = (1, *shape)[-2:] if shape else (0, 0)
        if len(shape) not in (1, 2) or not 1 <= n <= MAX_VECTORS or not width:
            raise file.error(
                f"has the shape {list(shape)[:6]}; an embedding is [width] or [n, width] with n up to {MAX_VECTORS}",
                key,
            )
        counts.add(n)
        towers[LETTERS.get(key) or TOWERS.get(width, "a text tower")] = width
    if len(counts) > 1:
        raise file.error("has another number of vectors for each text tower; an embedding has the same")
    form, word = _form(file, keys[0])
    return EmbeddingFacts(form, word, counts.pop(), towers)


def _form(file: Tensors, key: str) -> tuple[str, str | None]:
    """Who writes such files, and the word in it."""
    if key.startswith(PARAMETERS):
        return "A1111's web UI or the original trainer", key.removeprefix(PARAMETERS)
    if key in LETTERS:
        return "SDXL, of kohya or ComfyUI", None
    if key == "emb_params":
        return "kohya", None
    if key == "tensor" and isinstance(file, Weights) and file.kind != "safetensors":
        return "a bare tensor", None
    return "diffusers", key
