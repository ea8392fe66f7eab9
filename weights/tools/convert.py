"""A file or folder of weights -> another container, layout or type of numbers: exactly, streamed, all or nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from ldm.config import ModelConfig
from ldm.disk import write_all
from ldm.errors import ArgumentError, FileError, OutputError
from ldm.targets import replacing, replacing_directory, require_space, require_writable
from weights.checkpoint import Checkpoint, open_any, recognise, require_dtype
from weights.files.folders import COMPONENTS, MAX_JSON, Folder, add_component, read_json
from weights.files.hashes import sha256_of
from weights.files.opened import Tensors, Weights, is_folder, open_file
from weights.files.write import TORCH_FILES, OnWrite, Written, guarded, write
from weights.folder.read import component
from weights.names.detect import lookup
from weights.names.family import require_family
from weights.names.instead import vae_key
from weights.names.layout import LEFTOVERS, original
from weights.names.metadata import CONFIG_KEY, to_json
from weights.names.prediction import METADATA, Prediction, require_prediction
from weights.names.sizes import UNET, read_text
from weights.tools import record, routes
from weights.tools.record import Conversion
from weights.tools.routes import ONLY, Move, Only, Route, Wish

FILES = (".safetensors", *TORCH_FILES)  # what a target that is one file ends in; all others are folders
# Whoever writes a name that ends so does not mean a folder.
FOREIGN = (
    ".gguf", ".onnx", ".h5", ".hdf5", ".npz", ".npy", ".pkl", ".pb", ".msgpack", ".zip", ".tar", ".json", ".txt",
)  # fmt: skip
MIN_SHARD = 2**20  # bytes
# Metadata that a conversion writes.
LICENCE, SOURCE, SOURCE_HASH, WHICH = "modelspec.license", "ldm.source", "ldm.source_sha256", "ldm.weights"
# Metadata that speak of other bytes than the target's.
_STALE = re.compile(r"format|modelspec\.hash_sha256|sshs_\w+|ldm\.(?!weights$)\w+")
_PARTS = (
    "unet|vae|scheduler|low_res_scheduler|feature_extractor|image_encoder|depth_estimator|safety_checker"
    "|text_encoder(_2)?|tokenizer(_2)?"
)
_TEXT = re.compile(rf"model_index\.json|({_PARTS})/(?!.*\.index\.)[\w.-]+\.(json|txt|model)")


def convert(
    src: str | PathLike[str], dst: str | PathLike[str], *, dtype: torch.dtype | None = None, ema: bool | None = None,
    prune: bool = False, only: Only | None = None,
    shard_size: int | None = None, drop: Sequence[str] = (), licence: str | None = None,
    config: ModelConfig | str | None = None, prediction: Prediction | None = None,
    variant: str | None = None, manifest: str | PathLike[str] | None = None, overwrite: bool = False,
    on_write: OnWrite | None = None,
) -> Conversion:  # fmt: skip
    """Convert weights between `.safetensors`, `.ckpt` and diffusers folders, every number bit by bit without `dtype`.

    src         a file or folder of any kind that `open_file`, `load` or `load_vae` read
    dst         a name that ends in .safetensors, .ckpt, .pt, .pth or .bin, or else of a folder
    dtype       of the model's numbers. Bookkeeping keeps its own: a noise schedule in float16 would be wrong
    ema         which of two sets of UNet weights: the moving average, or (False) the raw ones; None: both, where the
                target can hold them
    prune       leave out what no picture is computed from
    only        "unet", "vae" or "text": that network under its own names
    shard_size  bytes of a network's file in a folder at most; None: one file for each network
    drop        patterns of whole keys of the source, to be left out as if they were not there
    licence     for the metadata; None: what the source's say
    config      as in `load`; for a VAE alone the family whose scale its latents have
    prediction  as in `load`
    variant     as in `load`
    manifest    the file that says, as JSON, where each key of the source went, what was done to it, and the sha256 of
                what was written

    What a folder's networks have no place for lies beside them as `original_only.safetensors`, so that the way back
    gives every tensor of the original. One tensor is in memory at a time. `dst` appears when it is complete; what was
    there before stays until then. Raises FileError, AmbiguousCheckpoint, ArgumentError and OutputError; what can be
    known before anything is written is checked then.
    """
    dst = Path(dst)
    to_file = _require_target(dst, dtype, only, shard_size, drop, config, prediction, overwrite)
    _require_apart(Path(src), dst, manifest, overwrite)
    file, on_purpose = _open(src, drop, variant)
    with file:
        route, model = _planned(file, to_file, Wish(dtype, ema, prune), only, config, prediction)
        if isinstance(file, Folder) and not to_file and only is None:
            route = replace(route, texts={**route.texts, **_texts(file, config, prediction)})
        route = route if shard_size is None else routes.sharded(route, shard_size)
        made = Conversion(dst, None if model is None else model.config, route, {**route.dropped, **on_purpose})
        if not made.tensors:
            raise file.error("has nothing left to write: everything is dropped; drop less")
        require_space(dst, made.bytes)
        facts = _carried(file, licence, only) | _facts(model, ema, only)
        facts |= {SOURCE: file.path.resolve().name, SOURCE_HASH: sha256_of(file)}
        if (
            to_file and model is not None and model.finding.doubt is None and only is None
        ):  # what is in doubt must stay so
            facts[CONFIG_KEY] = to_json(_as_written(model.config, route.files[""]))
        digests: dict[tuple[str, str], str] = {}
        report = _reporter(made.bytes, guarded([file], on_write), digests if manifest is not None else None)
        metadata = {"format": "pt", **facts}
        if to_file:
            tensors = {key: move.pending for key, move in route.files[""].items()}
            write(tensors, dst, metadata, overwrite=overwrite, on_write=report(""))
        else:
            _write_folder(route, dst, metadata, overwrite, report)
        if manifest is not None:
            text = record.manifest(file, made, facts, digests)
            with replacing(manifest, overwrite) as descriptor:
                write_all(descriptor, text.encode())
    return made


def _require_target(
    dst: Path, dtype: torch.dtype | None, only: str | None, shard_size: int | None, drop: Sequence[str],
    config: ModelConfig | str | None,
    prediction: str | None, overwrite: bool,
) -> bool:  # fmt: skip
    """Check what can be checked without the source; is the target a single file?"""
    to_file = dst.suffix.lower() in FILES and not dst.is_dir()
    ends = f"a file ends in {', '.join(FILES)}, a folder in none of them"
    if dst.suffix.lower() in FOREIGN and not dst.is_dir():
        raise ArgumentError(f"dst: {dst.suffix} files are not written; {ends}", key="dst")
    near = (
        difflib.get_close_matches(dst.suffix, FILES, n=1, cutoff=0.7)
        if dst.suffix and not to_file and not dst.is_dir()
        else []
    )
    if near:
        raise ArgumentError(f"dst: it ends in {dst.suffix[:20]} (meant {near[0]}?); {ends}", key="dst")
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
    for pattern in drop:
        _require_pattern(pattern)
    require_writable(dst, overwrite, directory=not to_file)
    return to_file


def _require_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as fault:
        raise ArgumentError(f"drop: {pattern[:60]!r} is no regular expression ({fault})", key="drop") from None


def _require_apart(src: Path, dst: Path, manifest: str | PathLike[str] | None, overwrite: bool) -> None:
    """Refuse a target that would take more than a model's folder away, and a record in the place of something else."""
    source, target = src.resolve(), dst.resolve()
    if target in source.parents or (source in target.parents and source.is_dir()):
        raise ArgumentError("dst: SRC lies in it, or it in SRC; name a new folder", key="dst")
    if (
        dst.is_dir()
        and any(dst.iterdir())
        and not any((dst / name).exists() for name in ("model_index.json", "config.json", *COMPONENTS))
    ):
        raise OutputError("is a directory with other things in it, no model's folder; name a new one", path=dst)
    if manifest is None:
        return
    require_writable(manifest, overwrite)
    place = Path(manifest).resolve()
    if any(other in (place, *place.parents) for other in (source, target)):
        raise ArgumentError("manifest: is SRC or DST, or lies in one of them; choose another name", key="manifest")


def _open(src: str | PathLike[str], drop: Sequence[str], variant: str | None) -> tuple[Tensors, dict[str, str]]:
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
                raise file.error(
                    f"has no key that matches {pattern[:60]!r}, which is to be dropped; leave it out", pattern
                )
        file.specs = {key: spec for key, spec in file.specs.items() if key not in dropped}
        return file, dropped
    except BaseException:
        file.close()
        raise


def _complete(folder: Folder, variant: str | None) -> None:
    """Open what `open_folder` leaves closed: the VAE of its own folder, the safety checker, what a conversion kept."""
    if not len(folder):
        component(folder.path, "", "AutoencoderKL")
        found = add_component(folder, folder.path, ("diffusion_pytorch_model", "diffusion_pytorch_model"), "", variant)
        if variant not in (None, found):
            raise folder.error(f"has no {variant[:40]} weights; use another variant, or none")
    if (folder.path / "safety_checker").is_dir():
        add_component(folder, folder.path / "safety_checker", ("model", "pytorch_model"), "safety_checker/", variant)
    if (folder.path / LEFTOVERS).exists():
        folder.add(open_file(folder.path / LEFTOVERS), f"{LEFTOVERS}/")


def _texts(folder: Folder, config: ModelConfig | str | None, prediction: Prediction | None) -> dict[str, str]:
    """The configs and tokenizer files of a folder as they are, except those that `config` or `prediction` overrules."""
    found = {}
    overruled = (
        r"scheduler/.+|\w+/config\.json"
        if isinstance(config, ModelConfig)
        else r"scheduler/.+"
        if prediction is not None
        else r"(?!)"
    )
    for path in sorted(folder.path.glob("*.json")) + sorted(folder.path.glob("*/*")):
        name = path.relative_to(folder.path).as_posix()
        if _TEXT.fullmatch(name) and not re.fullmatch(overruled, name) and path.is_file():
            if path.stat().st_size > MAX_JSON:
                raise FileError(f"is {path.stat().st_size} bytes long; the limit is {MAX_JSON}", path=path)
            try:
                found[name] = path.read_bytes().decode()
            except UnicodeDecodeError:
                raise FileError("is not UTF-8 text; download it again", path=path) from None
    listed = read_json(folder.path / "model_index.json") if "model_index.json" in found else {}
    for name, part in listed.items():
        if isinstance(part, list) and any(word is not None for word in part) and not re.fullmatch(_PARTS, name):
            what = f"its model_index.json lists {name[:60]}, a part that this version does not copy"
            raise folder.error(f"{what}; convert to a single file", name)
    return found


def _planned(
    file: Tensors,
    to_file: bool,
    wish: Wish,
    only: Only | None,
    config: ModelConfig | str | None,
    prediction: Prediction | None,
) -> tuple[Route, Checkpoint | None]:
    """The route of a conversion, and the model in the source; None: it is no model, or of an unknown kind."""
    plain = wish == Wish(dtype=wish.dtype) and only is None
    is_model = f"{UNET}input_blocks.0.0.weight" in file or any(key.startswith("unet/") for key in file)
    if not is_model:
        vae = isinstance(file, Folder) or vae_key(file) is not None
        if not (plain or (only == "vae" and vae and wish == Wish(dtype=wish.dtype))):
            what = "is no model but a part of one, or something else: ema, prune and only have nothing to choose from"
            raise file.error(f"{what}; leave them out")
        return _no_model(file, to_file, wish.dtype, config, "first_stage_model." if only else ""), None
    try:
        model = recognise(file, config, prediction, ema=wish.ema is True)
        model.require_whole()
    except FileError:
        if (
            to_file and isinstance(file, Weights) and plain and config is None and prediction is None
        ):  # of a kind that is not known
            return routes.same_names(file, wish.dtype), None
        raise
    if model.averages and wish.ema is None and (not to_file or wish.prune or only == "unet"):
        what = "holds raw weights and their moving average, of which the target takes one"
        raise file.error(f"{what}:", remedy="say {ema=True} or {ema=False}")
    if only is not None:
        return routes.network_alone(model, wish, only, to_file), model
    if not to_file:
        return routes.to_folder(model, wish), model
    return (routes.file_to_file if isinstance(file, Weights) else routes.folder_to_file)(model, wish), model


def _no_model(
    file: Tensors, to_file: bool, dtype: torch.dtype | None, config: ModelConfig | str | None, prefix: str
) -> Route:
    """A VAE alone in either layout; anything else in another container, without a prefix of its names."""
    if isinstance(file, Folder) and not to_file:
        what = "is the folder of one network, and the target a folder too"
        raise file.error(f"{what}; name a target that ends in .safetensors or .ckpt")
    if isinstance(file, Folder):
        return routes.vae_to_file(file, dtype)
    if to_file:
        return routes.same_names(file, dtype, prefix)
    if vae_key(file) is None:
        what = "is neither a model nor a VAE: only those have a folder layout"
        raise file.error(f"{what}; name a target that ends in .safetensors or .ckpt")
    return routes.vae_to_folder(file, config, dtype)


def _carried(file: Tensors, licence: str | None, only: Only | None) -> dict[str, str]:
    """What the source says of itself that stays true; a folder says it in the file of its UNet."""
    metadata = file.files[0].metadata if isinstance(file, Folder) else file.metadata
    carried = {
        key: value
        for key, value in metadata.items()
        if not _STALE.fullmatch(key) and (only in (None, "unet") or key not in (WHICH, METADATA))
    }
    terms = licence or carried.get(LICENCE) or carried.get("license")
    return carried | ({LICENCE: terms} if terms else {})


def _facts(model: Checkpoint | None, ema: bool | None, only: Only | None) -> dict[str, str]:
    """What the conversion knows: what the UNet predicts, and which of two sets of weights it has."""
    if model is None or only not in (None, "unet"):
        return {}
    predicts = (
        {} if model.finding.doubt is not None else {METADATA: {"eps": "epsilon", "v": "v"}[model.config.prediction]}
    )
    which = {None: "raw weights and their moving average", True: "moving average", False: "raw weights"}[ema]
    return predicts | ({WHICH: which} if model.averages else {})


def _as_written(config: ModelConfig, moves: Mapping[str, Move]) -> ModelConfig:
    """The config with the last blocks of text towers that the target has and a folder does not."""
    found = {key: move.pending.shape for key, move in moves.items()}
    layout = original(found)
    text = []
    for i, tower in enumerate(config.text):
        there = read_text(lookup(layout, found, f"text.{i}."))
        if there is None or there.layers == tower.layers:
            text.append(tower)
        else:
            skip = tower.skip + there.layers - tower.layers
            text.append(replace(tower, layers=there.layers, skip=skip, projection=tower.projection or there.projection))
    return replace(config, text=tuple(text))


def _reporter(total: int, on_write: OnWrite, digests: dict[tuple[str, str], str] | None) -> Callable[[str], OnWrite]:
    """For each file of the target, what reports its tensors as parts of the whole, and takes their sha256 if wanted."""
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
    route: Route, dst: Path, metadata: Mapping[str, str], overwrite: bool, report: Callable[[str], OnWrite]
) -> None:
    with replacing_directory(dst, overwrite) as folder:
        for name, text in route.texts.items():
            (folder / name).parent.mkdir(exist_ok=True)
            with replacing(folder / name, overwrite=False) as descriptor:
                write_all(descriptor, text.encode())
        for name, moves in route.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write({key: move.pending for key, move in moves.items()}, folder / name, metadata, on_write=report(name))
