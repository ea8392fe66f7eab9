"""Where every tensor of a source goes in a conversion: into which file of the target under which key, or nowhere and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from ldm.config import ModelConfig
from ldm.errors import AmbiguousCheckpoint
from ldm.model import LatentDiffusion
from weights.files.folders import Folder
from weights.files.opened import Weights
from weights.folder.write import STEMS, as_in_folders, folder_files, towers
from weights.models import recognise
from weights.names import layout as layouts
from weights.names import original as names
from weights.names.blank import shapes
from weights.names.layout import LEFTOVERS, Layout
from weights.names.places import Place, Shape
from weights.names.prediction import V_MARK, ZERO_SNR_MARK, Prediction, marks
from weights.plan import AVERAGED, RAW, plan
from weights.tools.moves import Move, copied, renamed, synthesised

KEPT = "kept beside the networks, in which it has no place"
ONLY = {
    "unet": "unet.",
    "vae": "vae.",
    "text": "text.",
}  # the parts that may be converted alone, and their prefix in `LatentDiffusion`
Only = Literal["unet", "vae", "text"]


@dataclass(frozen=True)
class Route:
    """A conversion, planned: every key of the source is in one of the moves, or in `dropped`."""

    files: Mapping[
        str, Mapping[str, Move]
    ]  # file of weights, its path in a folder or "" for a target that is one file -> key there -> how it is made
    dropped: Mapping[str, str] = field(default_factory=dict)  # key in the source -> why it is nowhere in the target
    texts: Mapping[str, str] = field(default_factory=dict)  # other files of a folder


@dataclass(frozen=True)
class Known:
    """A model that was recognised, and what is wanted of it."""

    file: Weights | Folder
    config: ModelConfig
    doubt: float | None  # see `weights.prediction.Finding`
    sources: Mapping[str, Place]  # our parameter -> where it lies
    ignored: Mapping[str, str]  # key -> why nothing is computed from it
    raw: Mapping[str, str]  # key of a moving average -> that of the raw weights; empty where the file holds one set
    dtype: torch.dtype | None
    ema: bool | None
    prune: bool

    def type_of(self, key: str) -> torch.dtype | None:
        """What a tensor of the original is converted to. Bookkeeping keeps its type: a noise schedule in float16 is wrong."""
        return None if is_bookkeeping(key) else self.dtype

    def drops(self, key: str) -> bool:
        """Is this key, from which nothing is computed, left out on purpose: with the set of weights that was not chosen, or as a prune?"""
        why = self.ignored.get(key)
        if why is None:
            return False
        chosen = self.ema is not None and (why in (RAW, AVERAGED) or key.startswith("model_ema."))
        return chosen or (self.prune and not _tells(key))


def _tells(key: str) -> bool:
    """Do other programs read this, though no picture is computed from it: position ids, and marks of how the model was trained?"""
    return key.endswith("position_ids") or key.rpartition("/")[2] in (V_MARK, ZERO_SNR_MARK)


def known(
    file: Weights | Folder,
    config: ModelConfig | str | None,
    prediction: Prediction | None,
    dtype: torch.dtype | None,
    ema: bool | None,
    prune: bool,
) -> Known:
    """Recognise the model in an open file. Raises what `load` raises for it."""
    finding, layout = recognise(file, config, prediction)
    wanted, found = shapes(LatentDiffusion, finding.config), {key: file.shape(key) for key in file}
    made = plan(layout, wanted, found, file.error, ema=ema is True)
    return Known(
        file,
        finding.config,
        finding.doubt,
        made.sources,
        made.ignored,
        _averages(layout, wanted, found),
        dtype,
        ema,
        prune,
    )


def _averages(layout: Layout, wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> dict[str, str]:
    if layout.averaged is None:
        return {}
    keys = [
        place.key
        for ours in wanted
        for place in layout.places(ours)
        if place.key in found and place.key.startswith(layout.averaged)
    ]
    return {names.ema(key): key for key in keys if names.ema(key) in found}


def is_bookkeeping(key: str) -> bool:
    """Is this a key of an original file from which no picture is computed?"""
    return layouts.reason(layouts.ORIGINAL, key) is not None


# --- single files ---------------------------------------------------------------------------------------------------


def same_names(file: Weights, dtype: torch.dtype | None, prefix: str = "") -> Route:
    """Another container for the same names, without a prefix: for files of any kind, known or not. Single numbers, alphas and marks, keep their type."""
    return Route(
        {
            "": {
                key.removeprefix(prefix): copied(
                    file, key, None if is_bookkeeping(key) or not file.shape(key) else dtype
                )
                for key in file
            }
        }
    )


def file_to_file(model: Known) -> Route:
    """The names of the file, with the average in the place of the raw weights if that is asked for."""
    moves: dict[str, Move] = {}
    dropped: dict[str, str] = {}
    for key in model.file:
        if model.ema and key in model.raw:
            moves[model.raw[key]] = copied(
                model.file, key, model.dtype, "moving average put in the place of the raw weights"
            )
        elif model.drops(key):
            dropped[key] = model.ignored[key]
        else:
            moves[key] = copied(model.file, key, model.type_of(key))
    return Route({"": moves}, dropped)


def folder_to_file(model: Known) -> Route:
    """The names of the published file, with what the folder keeps of it put back."""
    moves = renamed(
        model.file, model.sources, shapes(LatentDiffusion, model.config), layouts.published(model.config), model.dtype
    )
    dropped: dict[str, str] = {}
    for key, why in model.ignored.items():
        folder, _, name = key.partition("/")
        if folder != LEFTOVERS or (model.prune and not _tells(name)):
            dropped[key] = why
        elif name in moves:
            raise model.file.error(
                f"has {name} in {LEFTOVERS} and among its networks; which is right cannot be known: remove that file",
                name,
            )
        else:
            moves[name] = copied(model.file, key, model.type_of(name), f"put back from {LEFTOVERS}")
    for part in layouts.published(
        model.config
    ).parts:  # towers of transformers have position ids in the published files
        if (
            part.ours.startswith("text.")
            and part.theirs.endswith("transformer.")
            and not any(_is_position_ids(key, part.theirs) for key in moves)
        ):
            length = model.config.text[int(part.ours.split(".")[1])].length
            moves[f"{part.theirs}text_model.embeddings.position_ids"] = synthesised(
                lambda length=length: torch.arange(length)[None]
            )
    moves |= {mark: synthesised(lambda: torch.zeros(0)) for mark in marks(model.config) if mark not in moves}
    return Route({"": moves}, dropped)


def _is_position_ids(key: str, tower: str) -> bool:
    return key.startswith(tower) and key.endswith("embeddings.position_ids")


# --- folders --------------------------------------------------------------------------------------------------------


def to_folder(model: Known) -> Route:
    """The components of a diffusers folder. What has no place in them is kept beside them, or dropped as asked. Raises AmbiguousCheckpoint."""
    if model.doubt is not None:  # whether it predicts eps or v, a folder has to say
        what = f"may predict eps or v (norm1.bias std {model.doubt:.3f}), which a folder has to say: pass prediction='eps' or 'v'"
        raise AmbiguousCheckpoint(what, path=model.file.path, key="prediction")
    config, is_folder = as_in_folders(model.config), isinstance(model.file, Folder)
    wanted = shapes(LatentDiffusion, config)
    moves = renamed(model.file, model.sources, wanted, layouts.diffusers(config, components(config)), model.dtype)
    unread = {
        name: shape for name, shape in shapes(LatentDiffusion, model.config).items() if name not in wanted
    }  # of SD 2's text tower
    left = renamed(model.file, model.sources, unread, layouts.published(model.config), model.dtype)
    dropped = (
        {key: "read by nothing in a folder" for move in left.values() for key in move.sources} if model.prune else {}
    )
    left = {} if model.prune else {key: replace(move, done=KEPT) for key, move in left.items()}
    for key in model.ignored:
        folder, _, name = key.partition("/")
        if is_folder and folder == "safety_checker":
            moves[key] = copied(model.file, key, model.dtype)
        elif model.drops(key):
            dropped[key] = model.ignored[key]
        elif is_folder and folder != LEFTOVERS:
            moves[key] = copied(model.file, key)
        else:
            name = name if is_folder else key
            left[name] = copied(model.file, key, model.type_of(name), KEPT)
    files: dict[str, dict[str, Move]] = {}
    for key, move in moves.items():
        folder, _, name = key.partition("/")
        files.setdefault(f"{folder}/{stem(folder)}.safetensors", {})[name] = move
    return Route(files | ({LEFTOVERS: left} if left else {}), dropped, folder_files(config))


def components(config: ModelConfig) -> set[str]:
    """The folders of a model's networks."""
    return {
        "unet",
        "vae",
        *towers(config),
        *(["image_encoder"] if config.vision else []),
        *(["depth_estimator"] if config.depth else []),
    }


def stem(component: str) -> str:
    """Of the name of a component's file of weights."""
    return STEMS.get(component, "model")


# --- one network ----------------------------------------------------------------------------------------------------


def network_alone(model: Known, only: Only, to_file: bool) -> Route:
    """One kind of network. It has its own bare names; two text towers keep what tells them apart."""
    prefix = ONLY[only]
    config = model.config if to_file else as_in_folders(model.config)
    target = layouts.published(config) if to_file else layouts.diffusers(config, components(config))
    wanted = {name: shape for name, shape in shapes(LatentDiffusion, config).items() if name.startswith(prefix)}
    if not wanted:
        raise model.file.error(f"has no {layouts.WHAT[prefix]}: a model of family {config.name} has none")
    moves = renamed(model.file, model.sources, wanted, target, model.dtype)
    used = {key for move in moves.values() for key in move.sources}
    dropped = {
        key: model.ignored.get(key, f"not of the {layouts.WHAT[prefix]}, which alone was asked for")
        for key in model.file
        if key not in used
    }
    networks = [part.theirs for part in target.parts if part.ours.startswith(prefix)]
    bare = networks[0] if len(networks) == 1 else ""
    if to_file:
        return Route({"": {key.removeprefix(bare): move for key, move in moves.items()}}, dropped)
    files: dict[str, dict[str, Move]] = {}
    for key, move in moves.items():
        folder, _, name = key.partition("/")
        files.setdefault(f"{folder}/{stem(folder)}.safetensors".removeprefix(bare), {})[name] = move
    texts = folder_files(config, {name.strip("/") for name in networks})
    return Route(files, dropped, {path.removeprefix(bare): text for path, text in texts.items()})


# --- shards ---------------------------------------------------------------------------------------------------------


def sharded(route: Route, limit: int) -> Route:
    """The same with the files of networks split into parts of at most `limit` bytes, as diffusers splits them; a larger tensor is a part of its own."""
    files: dict[str, Mapping[str, Move]] = {}
    texts = dict(route.texts)
    for name, moves in route.files.items():
        parts = [moves] if name == LEFTOVERS else _parts(moves, limit)
        if len(parts) == 1:
            files[name] = moves
            continue
        base = name.removesuffix(".safetensors")
        names = [f"{base}-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
        files |= zip(names, parts, strict=True)
        place = {key: shown.rpartition("/")[2] for part, shown in zip(parts, names, strict=True) for key in part}
        index = {
            "metadata": {"total_size": sum(move.pending.size for move in moves.values())},
            "weight_map": dict(sorted(place.items())),
        }
        texts[f"{name}.index.json"] = json.dumps(index, indent=2) + "\n"
    return Route(files, route.dropped, texts)


def _parts(moves: Mapping[str, Move], limit: int) -> list[dict[str, Move]]:
    runs: list[dict[str, Move]] = [{}]
    size = 0
    for key, move in moves.items():
        if runs[-1] and size + move.pending.size > limit:
            runs.append({})
            size = 0
        runs[-1][key] = move
        size += move.pending.size
    return runs
