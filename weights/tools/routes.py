"""Where every tensor of a source goes in a conversion: the file and key of the target, or nowhere and why."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ldm.config import FAMILIES, ModelConfig, VAEConfig
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.networks.vae import VAE
from weights.alone import vae_alone
from weights.checkpoint import AVERAGED, RAW, Checkpoint, Parameters
from weights.files.folders import Folder
from weights.files.opened import Tensors
from weights.files.write import Pending, cast
from weights.folder.read import component, read_vae_config
from weights.folder.write import STEMS, as_in_folders, folder_files, towers, vae_alone_json
from weights.names import folders
from weights.names import layout as layouts
from weights.names.blank import shapes
from weights.names.diffusers import in_diffusers_vae
from weights.names.layout import ALONE, LEFTOVERS, Layout, Part
from weights.names.places import Place, Shape, joined
from weights.names.prediction import V_MARK, ZERO_SNR_MARK, marks
from weights.tools.save import published

AVERAGE_PUT = "moving average put in the place of the raw weights"
KEPT, BACK, MADE = "kept beside the networks, in which it has no place", f"put back from {LEFTOVERS}", "synthesised"
ONLY = {
    "unet": "unet.",
    "vae": "vae.",
    "text": "text.",
}  # the parts that may be converted alone, and their prefix in `LatentDiffusion`
Only = Literal["unet", "vae", "text"]


@dataclass(frozen=True)
class Move:
    """One tensor of the target."""

    sources: tuple[str, ...]  # keys in the source; none: it is made from nothing
    done: str  # what is done to them, in words
    pending: Pending


@dataclass(frozen=True)
class Route:
    """A conversion, planned: every key of the source is in one of the moves, or in `dropped`."""

    files: Mapping[str, Mapping[str, Move]]  # path in the folder, or "" if the target is one file -> key there -> move
    dropped: Mapping[str, str] = field(default_factory=dict)  # key in the source -> why it is nowhere in the target
    texts: Mapping[str, str] = field(default_factory=dict)  # other files of a folder


@dataclass(frozen=True)
class Wish:
    """What is wanted of a model, beside another container."""

    dtype: torch.dtype | None = None  # of its numbers; None: as they are
    ema: bool | None = None  # which of two sets of weights: the moving average, or the raw ones; None: both
    prune: bool = False  # leave out what no picture is computed from

    def type_of(self, key: str) -> torch.dtype | None:
        """What an original tensor is converted to. Bookkeeping keeps its type: a noise schedule in float16 is wrong."""
        return None if is_bookkeeping(key) else self.dtype

    def drops(self, key: str, why: str) -> bool:
        """Is this key, ignored for a reason, left out: with the weights that were not chosen, or by pruning?"""
        chosen = self.ema is not None and (why in (RAW, AVERAGED) or key.startswith("model_ema."))
        return chosen or (self.prune and not _marks_training(key))


def _marks_training(key: str) -> bool:
    """Do other programs read this, though no picture is computed from it: position ids, and marks of the training?"""
    return key.endswith("position_ids") or key.rpartition("/")[2] in (V_MARK, ZERO_SNR_MARK)


def is_bookkeeping(key: str) -> bool:
    """Is this a key of an original file from which no picture is computed?"""
    return layouts.reason(layouts.ORIGINAL, key) is not None


def copied(file: Tensors, key: str, dtype: torch.dtype | None = None, done: str = "copied") -> Move:
    """A tensor as it is, converted to `dtype` if its numbers are floating-point ones."""
    spec = file.specs[key]
    return Move((key,), done, Pending(cast(spec.dtype, dtype), spec.shape, lambda: file.read(key, mapped=False)))


def synthesised(made: Tensor) -> Move:
    """A tensor that the source need not have."""
    return Move((), MADE, Pending(made.dtype, tuple(made.shape), lambda: made))


def renamed(
    parameters: Parameters, wanted: Iterable[str], layout: Layout, dtype: torch.dtype | None = None
) -> dict[str, Move]:
    """Some parameters under the keys of another layout."""
    parts: dict[str, list[_Part]] = {}
    for name in wanted:
        target = layout.places(name)[0]
        for key in target.keys:
            parts.setdefault(key, []).append(_Part(name, parameters.places[name], target))
    return {key: _move(parameters, key, pieces, dtype) for key, pieces in parts.items()}


@dataclass(frozen=True)
class _Part:
    """One of our parameters on its way into a tensor of the target."""

    name: str
    source: Place
    target: Place

    def keys(self, key: str) -> tuple[str, ...]:
        """What is read for the tensor under `key`; of rows that are apart on both sides only those of that tensor."""
        apart = self.source.more and self.target.more
        return (self.source.keys[self.target.keys.index(key)],) if apart else self.source.keys

    def shape(self, ours: Shape) -> Shape:
        """Of the tensor of the target. A 1x1 convolution that may be a matrix is one there."""
        return ours[:2] if self.target.how == "kernel" else self.target.stored(ours)


def _move(parameters: Parameters, key: str, parts: list[_Part], dtype: torch.dtype | None) -> Move:
    file = parameters.file
    in_order = sorted(parts, key=lambda part: "qkv".find(part.target.how))
    keys = tuple(dict.fromkeys(source for part in in_order for source in part.keys(key)))
    types = {file.specs[source].dtype for source in keys}
    if len(types) > 1 and any(one.itemsize == 1 for one in types):
        raise file.error(f"{keys[0]} and {keys[1]} are to be joined, and one has 8-bit numbers; pass dtype=", keys[0])
    stored = functools.reduce(torch.promote_types, types)
    shape = parts[0].shape(parameters.shape(parts[0].name))

    def make() -> Tensor:
        if parts[0].source.more and parts[0].target.more:
            return file.read(keys[0], mapped=False)
        return joined(key, [(part.target, parameters.read(part.name)) for part in parts]).reshape(shape)

    return Move(keys, _done(parameters, key, parts, len(shape)), Pending(cast(stored, dtype), shape, make))


def _done(parameters: Parameters, key: str, parts: Iterable[_Part], after: int) -> str:
    """In words, what happens to a tensor on its way; `after` is how many axes it has then."""
    words: dict[str, None] = {}
    for part in parts:
        split, put_together = part.source.how in ("q", "k", "v"), part.target.how in ("q", "k", "v")
        before = len(parameters.file.shape(part.source.key))
        if split != put_together:
            words[f"{part.source.how} split from q, k, v" if split else "q, k, v joined"] = None
        if bool(part.source.more) != bool(part.target.more):
            one = "" if part.source.more else "qkv"[part.target.keys.index(key)]
            words["q, k, v joined" if part.source.more else f"{one} split from q, k, v"] = None
        if (part.source.how == "transposed") != (part.target.how == "transposed"):
            words["transposed"] = None
        if before != after:
            words["1x1 convolution to matrix" if before > after else "matrix to 1x1 convolution"] = None
    return ", ".join(words) or "copied"


def same_names(file: Tensors, dtype: torch.dtype | None, prefix: str = "") -> Route:
    """Another container for any file's names, without a prefix. Single numbers, alphas and marks, keep their type."""
    kept = {key for key in file if is_bookkeeping(key) or not file.shape(key)}
    return Route({"": {key.removeprefix(prefix): copied(file, key, None if key in kept else dtype) for key in file}})


def file_to_file(model: Checkpoint, wish: Wish) -> Route:
    """The names of the file, with the average in the place of the raw weights if that is asked for."""
    raw_of = {average: model.raw[name].key for name, average in model.averages.items()}
    moves: dict[str, Move] = {}
    dropped: dict[str, str] = {}
    for key in model.file:
        why = model.ignored.get(key)
        if wish.ema and key in raw_of:
            moves[raw_of[key]] = copied(model.file, key, wish.dtype, AVERAGE_PUT)
        elif why is not None and wish.drops(key, why):
            dropped[key] = why
        else:
            moves[key] = copied(model.file, key, wish.type_of(key))
    return Route({"": moves}, dropped)


def folder_to_file(model: Checkpoint, wish: Wish) -> Route:
    """The names of the published file, with what the folder keeps of it put back."""
    target = published(model.config)
    moves = renamed(model, model.wanted, target, wish.dtype)
    dropped: dict[str, str] = {}
    for key, why in model.ignored.items():
        folder, _, name = key.partition("/")
        if folder != LEFTOVERS or (wish.prune and not _marks_training(name)):
            dropped[key] = why
        elif name in moves:
            what = f"has {name} in {LEFTOVERS} and among its networks; which is right cannot be known: remove that file"
            raise model.file.error(what, name)
        else:
            moves[name] = copied(model.file, key, wish.type_of(name), BACK)
    for part in target.parts:  # towers of transformers have position ids in the published files
        if not (part.ours.startswith("text.") and part.theirs.endswith("transformer.")):
            continue
        if not any(key.startswith(part.theirs) and key.endswith("embeddings.position_ids") for key in moves):
            length = model.config.text[int(part.ours.split(".")[1])].length
            moves[f"{part.theirs}text_model.embeddings.position_ids"] = synthesised(torch.arange(length)[None])
    moves |= {mark: synthesised(torch.zeros(0)) for mark in marks(model.config) if mark not in moves}
    return Route({"": moves}, dropped)


def to_folder(model: Checkpoint, wish: Wish) -> Route:
    """The components of a diffusers folder. What has no place in them is kept beside them, or dropped as asked.

    Raises AmbiguousCheckpoint for a model whose prediction, which a folder has to say, is not known.
    """
    model.require_settled("a folder has to say which")
    config, is_folder = as_in_folders(model.config), isinstance(model.file, Folder)
    wanted = shapes(LatentDiffusion, config)
    moves = renamed(model, wanted, folders.diffusers(config, components(config)), wish.dtype)
    unread = [name for name in model.wanted if name not in wanted]  # of SD 2's text tower
    rest = renamed(model, unread, published(model.config), wish.dtype)
    unused = {key: "read by nothing in a folder" for move in rest.values() for key in move.sources}
    dropped = unused if wish.prune else {}
    left = {} if wish.prune else {key: replace(move, done=KEPT) for key, move in rest.items()}
    for key, why in model.ignored.items():
        folder, _, name = key.partition("/")
        if is_folder and folder == "safety_checker":
            moves[key] = copied(model.file, key, wish.dtype)
        elif wish.drops(key, why):
            dropped[key] = why
        elif is_folder and folder != LEFTOVERS:
            moves[key] = copied(model.file, key)
        else:
            name = name if is_folder else key
            left[name] = copied(model.file, key, wish.type_of(name), KEPT)
    return Route(in_files(moves) | ({LEFTOVERS: left} if left else {}), dropped, folder_files(config))


def in_files(moves: Mapping[str, Move]) -> dict[str, dict[str, Move]]:
    """The tensors of a folder, by the file of weights that each is in."""
    files: dict[str, dict[str, Move]] = {}
    for key, move in moves.items():
        folder, _, name = key.partition("/")
        files.setdefault(f"{folder}/{STEMS.get(folder, 'model')}.safetensors", {})[name] = move
    return files


def components(config: ModelConfig) -> set[str]:
    """The folders of a model's networks."""
    beside = {"image_encoder": config.vision, "depth_estimator": config.depth}
    return {"unet", "vae", *towers(config), *(name for name, there in beside.items() if there)}


def network_alone(model: Checkpoint, wish: Wish, only: Only, to_file: bool) -> Route:
    """One kind of network. It has its own bare names; two text towers keep what tells them apart."""
    prefix = ONLY[only]
    config = model.config if to_file else as_in_folders(model.config)
    target = published(config) if to_file else folders.diffusers(config, components(config))
    wanted = [name for name in shapes(LatentDiffusion, config) if name.startswith(prefix)]
    if not wanted:
        raise model.file.error(f"has no {layouts.WHAT[prefix]}: a model of family {config.name} has none")
    moves = renamed(model, wanted, target, wish.dtype)
    used = {key for move in moves.values() for key in move.sources}
    other = f"not of the {layouts.WHAT[prefix]}, which alone was asked for"
    dropped = {key: model.ignored.get(key, other) for key in model.file if key not in used}
    networks = [part.theirs for part in target.parts if part.ours.startswith(prefix)]
    bare = networks[0] if len(networks) == 1 else ""
    if to_file:
        return Route({"": {key.removeprefix(bare): move for key, move in moves.items()}}, dropped)
    files = {path.removeprefix(bare): tensors for path, tensors in in_files(moves).items()}
    texts = folder_files(config, {name.strip("/") for name in networks})
    return Route(files, dropped, {path.removeprefix(bare): text for path, text in texts.items()})


def vae_to_folder(file: Tensors, config: ModelConfig | str | None, dtype: torch.dtype | None) -> Route:
    """The folder of one VAE. `config`: the family whose scale its latents have. Raises ArgumentError without it."""
    if config is None:
        what = "config: a VAE's file does not tell the scale of its latents"
        raise ArgumentError(f"{what}; name the family it is for: config='sd1', 'sdxl-base', ...", key="config")
    family = FAMILIES[config] if isinstance(config, str) else config
    vae = vae_alone(file, family.vae)
    vae.require_whole()
    target = Layout((Part("", "", in_diffusers_vae(family.vae)),), ())
    files = {f"{STEMS['vae']}.safetensors": renamed(vae, vae.wanted, target, dtype)}
    if vae.ignored:
        files[LEFTOVERS] = {key: copied(file, key, done=KEPT) for key in vae.ignored}
    text = json.dumps(vae_alone_json(family.vae, family.size), indent=2) + "\n"
    return Route(files, {}, {"config.json": text})


def vae_to_file(folder: Folder, dtype: torch.dtype | None) -> Route:
    """The original names, bare as VAEs are published alone, with what the folder keeps of the file put back."""
    config = read_vae_config(component(folder.path, "", "AutoencoderKL"), VAEConfig())
    layout = Layout((Part("", "", in_diffusers_vae(config)),), ALONE)
    vae = Parameters(file=folder, layout=layout, network=lambda: shapes(VAE, config))
    vae.require_whole()
    moves = renamed(vae, vae.wanted, Layout((Part("", ""),), ()), dtype)
    back = [key for key in vae.ignored if key.startswith(f"{LEFTOVERS}/")]
    moves |= {key.partition("/")[2]: copied(folder, key, done=BACK) for key in back}
    return Route({"": moves}, {key: why for key, why in vae.ignored.items() if key not in back})


def sharded(route: Route, limit: int) -> Route:
    """The same, files of networks split into parts of at most `limit` bytes; a larger tensor is a part of its own."""
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
            runs, size = [*runs, {}], 0
        runs[-1][key] = move
        size += move.pending.size
    return runs
