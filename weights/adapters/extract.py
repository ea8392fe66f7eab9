"""Two checkpoints of one family -> the LoRA that makes one into the other, as far as low rank goes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ldm.changes.lora import LowRank, Shape
from ldm.config import ModelConfig
from ldm.errors import AmbiguousCheckpoint
from ldm.targets import require_writable
from weights.adapters import names as lora_names
from weights.adapters.kohya import difference_key, kohya_names, network_facts
from weights.adapters.rank import Kept, Rule, energy, factored, require_rank, rule
from weights.adapters.write import write_lora
from weights.checkpoint import Checkpoint, described, open_any, recognise, require_dtype
from weights.files.hashes import sha256_of
from weights.files.opened import Tensors
from weights.files.write import OnWrite, Pending
from weights.names.prediction import Prediction, predicting

# What kohya's networks have by default, and what they have with conv_dim.
ATTENTION = re.compile(
    r"unet\..+\.(proj_in|proj_out|transformer_blocks\..+)\.weight|text\.\d+\..+\.encoder\.layers\..+\.weight"
)
CONVOLUTION = re.compile(r"unet\..+\.(in_layers\.2|out_layers\.3|emb_layers\.1|skip_connection|op|conv)\.weight")


@dataclass(frozen=True)
class Rest:
    """A parameter that differs and that no product of low rank carries."""

    parameter: str  # our name
    size: int  # bytes in the tuned checkpoint
    kept: bool  # in the file, as a full difference


@dataclass(frozen=True)
class Extracted:
    """What `extract_lora` wrote."""

    path: Path
    family: str
    modules: tuple[Kept, ...]
    rest: tuple[Rest, ...]
    unchanged: int  # parameters that do not differ
    unpaired: tuple[str, ...]  # parameters of text towers that only one of the two has

    @property
    def energy(self) -> float:
        """The share of the energy of all modules that was kept."""
        return energy(self.modules)


def extract_lora(
    base: str | PathLike[str], tuned: str | PathLike[str], dst: str | PathLike[str], *, rank: int | None = None,
    variance: float | None = None, max_rank: int | None = None, conv_rank: int | None = None, text: bool = True,
    full_rest: bool = False, dtype: torch.dtype = torch.float16, overwrite: bool = False,
    on_module: Callable[[Kept], None] | None = None, on_write: OnWrite | None = None,
) -> Extracted:  # fmt: skip
    """Write, in kohya's names, the LoRA that takes one checkpoint to another: the nearest product to each difference.

    base, tuned  files or diffusers folders of one family, in any two layouts
    rank         of every module of the transformers and text towers; variance: instead, for each module the least rank
                 that keeps this share of its squared singular values, at most `max_rank`
    conv_rank    ResBlocks and resamplers too, at this rank, or with variance at most at this; None: leave them out
    text         the text towers too
    full_rest    keep what low rank cannot carry (norms, biases, embeddings, other layers) as full differences, which
                 LyCORIS reads
    dtype        of the factors
    Where the two store a parameter in different types, what is equal in the coarser one is no difference. One module is
    in memory at a time; the decompositions are exact (see `factored`), and take nearly all of the time. The VAE is
    compared, and never kept.
    Raises FileError for two families or predictions and for equal checkpoints; ArgumentError, OutputError.
    """
    how = rule(rank, variance, max_rank)
    require_rank("conv_rank", conv_rank)
    require_dtype(dtype)
    require_writable(dst, overwrite)
    with open_any(base) as one, open_any(tuned) as other:
        before, after, config = _same_family(one, other)
        models = (before, after)
        pairs, unpaired = _pairs(models, config, text)
        names, shapes = kohya_names(config), lora_names.shapes(config)
        changes: dict[str, LowRank] = {}
        more: dict[str, Pending] = {}  # the full differences, which are made again when their turn comes
        modules, rest, unchanged = [], [], 0
        for parameter, shape in pairs.items():
            types = [model.file.specs[model.places[parameter].key].dtype for model in models]
            coarse = max(types, key=lambda stored: torch.finfo(stored).eps)
            old, new = (model.read(parameter, torch.float32) for model in models)
            if torch.equal(old.to(coarse), new.to(coarse)):
                unchanged += 1
            elif (of := _rule(parameter, how, conv_rank)) is not None:
                changes[parameter], kept = factored(new - old, of, parameter, dtype)
                modules.append(kept)
                if on_module is not None:
                    on_module(kept)
            else:
                full = full_rest and not parameter.startswith("vae.")
                rest.append(Rest(parameter, types[1].itemsize * math.prod(shape), full))
                if full:
                    key = difference_key(parameter, names, shapes)
                    more[key] = Pending(dtype, shape, partial(_difference, before, after, parameter))
        if not changes and not more:
            what = f"in {len(rest)} parameters that a LoRA does not carry; --full-rest keeps them"
            what = what if rest else "in nothing that a LoRA changes"
            raise other.error(f"differs from {Path(base).name[:40]} {what}")
        metadata = _metadata(config, Path(base), Path(tuned)) | network_facts(changes)
        written = write_lora(
            changes, dst, "kohya", config, metadata, source=Path(tuned), more=more, overwrite=overwrite,
            on_write=on_write,
        )  # fmt: skip
        one.require_unchanged()
        other.require_unchanged()
    return Extracted(written, config.name, tuple(modules), tuple(rest), unchanged, unpaired)


def _difference(before: Checkpoint, after: Checkpoint, parameter: str) -> Tensor:
    return after.read(parameter, torch.float32) - before.read(parameter, torch.float32)


def _same_family(one: Tensors, other: Tensors) -> tuple[Checkpoint, Checkpoint, ModelConfig]:
    """Both models, and the config of their family."""
    (base, old), (tuned, new) = _model(one), _model(other)
    if base.config.kin != tuned.config.kin:
        what = f"is {tuned.config.name}, {one.path.name[:40]} is {base.config.name}"
        raise other.error(f"{what}; a LoRA takes a model to another of its family")
    if old and new and old != new:
        what = f"predicts {new}, {one.path.name[:40]} predicts {old}: that is no change of weights"
        raise other.error(f"{what}; take a base that predicts {new}")
    return base, tuned, predicting(base.config, old or new or base.config.prediction)


def _model(file: Tensors) -> tuple[Checkpoint, Prediction | None]:
    """The model in a file, and what it predicts; None: file and weights disagree on that, or do not tell."""
    model = described(file)
    try:
        model = recognise(file)
    except AmbiguousCheckpoint:
        return model, None
    return model, None if model.finding.doubt is not None else model.config.prediction


def _pairs(
    models: tuple[Checkpoint, Checkpoint], config: ModelConfig, text: bool
) -> tuple[dict[str, Shape], tuple[str, ...]]:
    """{parameter of UNet, text towers or VAE: its shape}, and the parameters that only one of the two models has."""
    base = models[0]
    shapes = {name: shape for name, shape in lora_names.shapes(config).items() if text or not name.startswith("text.")}
    shapes |= {name: shape for name, shape in base.wanted.items() if name.startswith("vae.")}
    for model in models:
        present = [name for name in shapes if name in model.places]
        model.require_single(present)
        model.require_numbers(present)
    pairs: dict[str, Shape] = {}
    unpaired = []
    for name, shape in shapes.items():
        lacking = [model for model in models if name not in model.places]
        if not lacking:
            pairs[name] = base.shape(name) if name.startswith("text.") else shape  # towers may have gained tokens
            for model in models:
                _require_shape(model, name, pairs[name], base)
        elif name.startswith("unet."):
            raise lacking[0].file.error(f"has no {name[-60:]}; use a complete checkpoint", name)
        elif len(lacking) == 1:
            unpaired.append(name)
    return pairs, tuple(unpaired)


def _require_shape(model: Checkpoint, name: str, shape: Shape, base: Checkpoint) -> None:
    place = model.places[name]
    found = model.file.shape(place.key)
    if not place.fits(found, shape):
        what = f"{place.key[-40:]} is {list(found)}, in the other {list(base.places[name].stored(shape))}"
        raise model.file.error(what, place.key, "{text=False} leaves towers out")


def _rule(parameter: str, how: Rule, conv_rank: int | None) -> Rule | None:
    """How much of this parameter's difference to keep; None: it is no matrix that LoRAs have factors for."""
    if attention(parameter):
        return how
    if CONVOLUTION.fullmatch(parameter) and conv_rank is not None:
        return Rule(conv_rank) if how.variance is None else replace(how, max_rank=conv_rank)
    return None


def attention(parameter: str) -> bool:
    """Is this a weight for which every trainer's LoRA has factors: a matrix of a transformer or of a tower's block?"""
    return bool(ATTENTION.fullmatch(parameter)) and not re.search(r"\.(norm\d?|layer_norm\d)\.weight$", parameter)


def _metadata(config: ModelConfig, base: Path, tuned: Path) -> dict[str, str]:
    unet = config.unet
    two = unet.linear_proj and unet.vector_dim is None
    facts = {"ss_base_model_version": _version(config), "ss_v2": str(two), "ss_sd_model_name": base.name}
    facts |= {"ldm.family": config.name, "ldm.tuned": tuned.name}
    return facts | ({"ss_new_sd_model_hash": sha256_of(base)} if base.is_file() else {})


def _version(config: ModelConfig) -> str:
    """What kohya's scripts call the kind of model."""
    if config.unet.vector_dim is not None:
        return "sdxl_base_v1-0"
    if not config.unet.linear_proj:
        return "sd_v1"
    return "sd_v2_v" if config.kin == "sd2-base" and config.prediction == "v" else "sd_v2"
