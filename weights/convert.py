"""A file or folder of weights -> another container, layout or type of numbers: exactly, streamed, all or nothing."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from ldm.config import ModelConfig
from ldm.errors import ArgumentError, FileError
from weights import conversion_record as record
from weights.conversion_record import Conversion
from weights.detect import lookup, require_family
from weights.files import Weights, open_file
from weights.folders import MAX_JSON, Folder, add_component, is_folder, read_json
from weights.layout import original
from weights.load import open_any, require_dtype
from weights.metadata import CONFIG_KEY, to_json
from weights.moves import Move
from weights.output import replacing, replacing_directory, require_writable, write_all
from weights.prediction import METADATA, Prediction, require_prediction
from weights.published import sha256_of
from weights.routes import LEFTOVERS, ONLY, Known, Only, Route, file_to_file, folder_to_file, known, network_alone, same_names, to_folder
from weights.sizes import UNET, read_text
from weights.vae_alone import is_vae, vae_to_file, vae_to_folder
from weights.write import TORCH_FILES, OnWrite, Written, guarded, write

FILES = (".safetensors", *TORCH_FILES)  # what a target that is one file ends in; all others are folders
MIN_SHARD = 2**20  # bytes
LICENCE, SOURCE, SOURCE_HASH, WHICH = "modelspec.license", "ldm.source", "ldm.source_sha256", "ldm.weights"  # metadata that a conversion writes
_STALE = re.compile(r"format|modelspec\.(hash_sha256|prediction_type)|sshs_\w+|ldm\.\w+")  # metadata that speak of other numbers than the target's
_PARTS = "unet|vae|scheduler|low_res_scheduler|feature_extractor|image_encoder|depth_estimator|safety_checker|text_encoder(_2)?|tokenizer(_2)?"
_TEXT = re.compile(rf"model_index\.json|({_PARTS})/(?!.*\.index\.)[\w.-]+\.(json|txt|model)")


def convert(
    src: str | PathLike[str], dst: str | PathLike[str], *, dtype: torch.dtype | None = None, ema: bool | None = None, prune: bool = False, only: Only | None = None,
    shard_size: int | None = None, drop: Sequence[str] = (), licence: str | None = None, config: ModelConfig | str | None = None, prediction: Prediction | None = None,
    variant: str | None = None, manifest: str | PathLike[str] | None = None, overwrite: bool = False, on_write: OnWrite | None = None,
) -> Conversion:  # fmt: skip
    """Convert weights between `.safetensors`, `.ckpt` and diffusers folders; without `dtype` every number stays bit by bit what it was.

    src         a file or folder of any kind that `open_file`, `load` or `load_vae` read
    dst         a name that ends in .safetensors, .ckpt, .pt, .pth or .bin, or else of a folder
    dtype       of the model's numbers. Bookkeeping keeps its own: a noise schedule in float16 would be wrong
    ema         which of two sets of UNet weights: the moving average, or (False) the raw ones; None: all that is there, if the target can hold it
    prune       leave out what no picture is computed from
    only        "unet", "vae" or "text": that network under its own names
    shard_size  bytes of a file in a folder at most; None: one file for each network
    drop        patterns of whole keys of the source, to be left out as if they were not there
    licence     for the metadata; None: what the source's say
    config      as in `load`; for a VAE alone the family whose scale its latents have
    prediction  as in `load`
    variant     as in `load`
    manifest    where to write, as JSON, where each key of the source went, what was done to it, and the sha256 of what was written

    What a folder has no place for lies in it as `original_only.safetensors`, so that the way back gives every tensor of the original.
    One tensor is in memory at a time. `dst` appears when it is complete; what was there before stays until then.
    Raises FileError, AmbiguousCheckpoint, ArgumentError and OutputError; what can be known before anything is written is checked then.
    """
    dst = Path(dst)
    to_file = _require_target(dst, dtype, only, shard_size, drop, config, prediction, manifest, overwrite)
    file, on_purpose = _open(src, drop, variant)
    with file:
        route, model = _planned(file, to_file, dtype, ema, prune, only, config, prediction)
        if isinstance(file, Folder) and not to_file and only is None:
            route = replace(route, texts={**route.texts, **_texts(file)})
        made = Conversion(dst, model and model.config, route, {**route.dropped, **on_purpose})
        facts = {**_told(file, licence), **_facts(model, ema), SOURCE: file.path.name, SOURCE_HASH: sha256_of(file)}
        if to_file and model is not None and only is None:
            facts[CONFIG_KEY] = to_json(_as_written(model.config, route.files[""]))
        digests: dict[tuple[str, str], str] = {}
        report = _reporter(made.bytes, guarded([file], on_write), digests if manifest is not None else None)
        if to_file:
            write({key: move.pending for key, move in route.files[""].items()}, dst, {"format": "pt", **facts}, overwrite=overwrite, on_write=report(""))
        else:
            _write_folder(route, dst, {"format": "pt", **facts}, shard_size, overwrite, report)
        if manifest is not None:
            text = record.manifest(file, made, facts, digests)
            with replacing(manifest, overwrite) as descriptor:
                write_all(descriptor, text.encode())
    return made


# --- arguments and source -------------------------------------------------------------------------------------------


def _require_target(
    dst: Path, dtype: torch.dtype | None, only: str | None, shard_size: int | None, drop: Sequence[str], config: ModelConfig | str | None,
    prediction: str | None, manifest: str | PathLike[str] | None, overwrite: bool,
) -> bool:  # fmt: skip
    """Check what can be checked without the source; is the target a single file?"""
    to_file = dst.suffix in FILES and not dst.is_dir()
    near = difflib.get_close_matches(dst.suffix, FILES, n=1, cutoff=0.7) if dst.suffix and not to_file and not dst.is_dir() else []
    if near:
        raise ArgumentError(f"the target ends in {dst.suffix[:20]} (meant {near[0]}?); a file ends in {', '.join(FILES)}, a folder in none of them", key="dst")
    if dtype is not None:
        require_dtype(dtype)
    require_prediction(prediction)
    if isinstance(config, str):
        require_family(config)
    if only is not None and only not in ONLY:
        raise ArgumentError(f"only: {str(only)[:40]!r} is unknown; there are {', '.join(ONLY)}", key="only")
    if shard_size is not None and to_file:
        raise ArgumentError("shard_size: a single file has no shards; name a folder as the target", key="shard_size")
    if shard_size is not None and shard_size < MIN_SHARD:
        raise ArgumentError(f"shard_size: {shard_size} bytes; give at least {MIN_SHARD}", key="shard_size")
    try:
        re.compile("|".join(drop))
    except re.error as fault:
        raise ArgumentError(f"drop: {', '.join(drop)[:80]!r} is no regular expression ({fault})", key="drop") from None
    require_writable(dst, overwrite, directory=not to_file)
    if manifest is not None:
        require_writable(manifest, overwrite)
    return to_file


def _open(src: str | PathLike[str], drop: Sequence[str], variant: str | None) -> tuple[Weights | Folder, dict[str, str]]:
    """The source without the keys to be dropped, and those. Of a folder also what comes beside the networks."""
    path = Path(src)
    alone = not is_folder(path) and (path / "config.json").is_file()
    file = Folder(path) if alone else open_any(path, variant)
    try:
        if isinstance(file, Folder):
            _complete(file, variant)
        dropped = {key: "dropped as asked" for key in file if any(re.fullmatch(pattern, key) for pattern in drop)}
        for pattern in drop:
            if not any(re.fullmatch(pattern, key) for key in dropped):
                raise file.error(f"has no key that matches {pattern[:60]!r}, which is to be dropped; leave it out", pattern)
        file.specs = {key: spec for key, spec in file.specs.items() if key not in dropped}
        return file, dropped
    except BaseException:
        file.close()
        raise


def _complete(folder: Folder, variant: str | None) -> None:
    """Open what `open_folder` leaves closed: the VAE of a folder of one, the safety checker, what a conversion has kept."""
    if not len(folder):
        add_component(folder, folder.path, ("diffusion_pytorch_model", "diffusion_pytorch_model"), "", variant)
        return
    if (folder.path / "safety_checker").is_dir():
        add_component(folder, folder.path / "safety_checker", ("model", "pytorch_model"), "safety_checker/")
    if (folder.path / LEFTOVERS).exists():
        folder.add(open_file(folder.path / LEFTOVERS), f"{LEFTOVERS}/")


def _texts(folder: Folder) -> dict[str, str]:
    """The configs and tokenizer files of a folder, as they are."""
    found = {}
    for path in sorted(folder.path.glob("*.json")) + sorted(folder.path.glob("*/*")):
        name = path.relative_to(folder.path).as_posix()
        if _TEXT.fullmatch(name) and path.is_file():
            if path.stat().st_size > MAX_JSON:
                raise FileError(f"is {path.stat().st_size} bytes long; the limit is {MAX_JSON}", path=path)
            try:
                found[name] = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise FileError("is not UTF-8 text; download it again", path=path) from None
    listed = read_json(folder.path / "model_index.json") if "model_index.json" in found else {}
    for name, part in listed.items():
        if isinstance(part, list) and any(word is not None for word in part) and not re.fullmatch(_PARTS, name):
            raise folder.error(f"its model_index.json lists {name[:60]}, a part that this version does not copy; convert to a single file", name)
    return found


# --- the plan -------------------------------------------------------------------------------------------------------


def _planned(
    file: Weights | Folder, to_file: bool, dtype: torch.dtype | None, ema: bool | None, prune: bool, only: Only | None, config: ModelConfig | str | None,
    prediction: Prediction | None,
) -> tuple[Route, Known | None]:  # fmt: skip
    container_alone = to_file and isinstance(file, Weights) and ema is None and not prune and only is None
    is_model = f"{UNET}input_blocks.0.0.weight" in file or any(key.startswith("unet/") for key in file)
    if not is_model:
        return _no_model(file, to_file, dtype, config, asked=ema is not None or prune or only not in (None, "vae")), None
    try:
        model = known(file, config, prediction, dtype, ema, prune)
    except FileError:
        if container_alone and config is None and prediction is None:  # of any kind, this version's or not
            return same_names(file, dtype), None
        raise
    if model.raw and ema is None and (not to_file or prune or only == "unet"):
        raise file.error("holds raw weights and their moving average, of which the target takes one: say ema=True or ema=False")
    if only is not None:
        return network_alone(model, only, to_file), model
    if to_file:
        return (file_to_file(model) if isinstance(file, Weights) else folder_to_file(model)), model
    return to_folder(model), model


def _no_model(file: Weights | Folder, to_file: bool, dtype: torch.dtype | None, config: ModelConfig | str | None, asked: bool) -> Route:
    """A VAE alone in either layout; anything else in another container."""
    if asked:
        raise file.error("is no model but a part of one, or something else: ema, prune and only have nothing to choose from; leave them out")
    if isinstance(file, Folder):
        return vae_to_file(file, dtype) if to_file else _refuse_copy(file)
    if to_file:
        return same_names(file, dtype)
    if not is_vae(file):
        raise file.error("is neither a model nor a VAE: only those have a folder layout; name a target that ends in .safetensors or .ckpt")
    return vae_to_folder(file, config, dtype)


def _refuse_copy(folder: Folder) -> Route:
    raise folder.error("is the folder of one network, and the target a folder too; name a target that ends in .safetensors or .ckpt")


# --- metadata -------------------------------------------------------------------------------------------------------


def _told(file: Weights | Folder, licence: str | None) -> dict[str, str]:
    """What the source says of itself that stays true."""
    told = {} if isinstance(file, Folder) else {key: value for key, value in file.metadata.items() if not _STALE.fullmatch(key)}
    said = licence or told.get(LICENCE) or told.get("license")
    return told | ({LICENCE: said} if said else {})


def _facts(model: Known | None, ema: bool | None) -> dict[str, str]:
    if model is None:
        return {}
    predicts = {} if model.doubt is not None else {METADATA: {"eps": "epsilon", "v": "v"}[model.config.prediction]}
    which = "moving average" if ema else "raw weights" if ema is False else "raw weights and their moving average" if model.raw else None
    return predicts | ({WHICH: which} if which else {})


def _as_written(config: ModelConfig, moves: Mapping[str, Move]) -> ModelConfig:
    """The config with the last blocks of text towers that the target has and a folder does not."""
    found = {key: move.pending.shape for key, move in moves.items()}
    layout = original(found)
    text = []
    for i, tower in enumerate(config.text):
        there = read_text(lookup(layout, found, f"text.{i}."))
        more = there.layers - tower.layers if there is not None else 0
        text.append(replace(tower, layers=tower.layers + more, skip=tower.skip + more, projection=there.projection if there and tower.projection is None and more else tower.projection))
    return replace(config, text=tuple(text))


# --- writing --------------------------------------------------------------------------------------------------------


def _reporter(total: int, on_write: OnWrite, digests: dict[tuple[str, str], str] | None) -> Callable[[str], OnWrite]:
    """For each file of the target what reports its tensors as parts of the whole, and takes their sha256 if `digests` are wanted."""
    done = 0

    def report(file: str) -> OnWrite:
        def one(written: Written) -> None:
            nonlocal done
            done += written.tensor.numel() * written.tensor.element_size()
            if digests is not None:
                digests[file, written.name] = record.sha256(written.tensor)
            on_write(replace(written, done=done, total=total))

        return one

    return report


def _write_folder(
    route: Route, dst: Path, metadata: Mapping[str, str], shard_size: int | None, overwrite: bool, report: Callable[[str], OnWrite]
) -> None:
    with replacing_directory(dst, overwrite) as folder:
        for name, text in route.texts.items():
            _write_text(folder / name, text)
        for name, moves in route.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            shards = _shards(moves, shard_size) if shard_size is not None and name != LEFTOVERS else [moves]
            path = folder / name
            names = [path.name] if len(shards) == 1 else [f"{path.stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
            for shard, shown in zip(shards, names, strict=True):
                write({key: move.pending for key, move in shard.items()}, path.with_name(shown), metadata, on_write=report(name))
            if len(shards) > 1:
                place = {key: shown for shard, shown in zip(shards, names, strict=True) for key in shard}
                index = {"metadata": {"total_size": sum(move.pending.size for move in moves.values())}, "weight_map": dict(sorted(place.items()))}
                _write_text(folder / f"{name}.index.json", json.dumps(index, indent=2) + "\n")


def _shards(moves: Mapping[str, Move], limit: int) -> list[dict[str, Move]]:
    """The tensors in their order, in runs of at most `limit` bytes; one that is larger is a run of its own."""
    runs: list[dict[str, Move]] = [{}]
    size = 0
    for key, move in moves.items():
        if runs[-1] and size + move.pending.size > limit:
            runs.append({})
            size = 0
        runs[-1][key] = move
        size += move.pending.size
    return runs


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path, overwrite=False) as descriptor:
        write_all(descriptor, text.encode())
