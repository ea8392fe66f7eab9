"""Two or three models of one family -> one, parameter by parameter, in the layout of the first."""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.config import ModelConfig
from ldm.errors import ArgumentError, FileError
from ldm.targets import require_writable
from weights.checkpoint import Checkpoint, open_any, recognise, require_dtype
from weights.files.hashes import sha256_of
from weights.files.opened import Tensors, is_folder
from weights.files.write import OnWrite, Pending, cast, guarded, write
from weights.names.detect import unread
from weights.names.metadata import CONFIG_KEY, to_json
from weights.names.places import short
from weights.names.prediction import Prediction, require_prediction

Method = Literal["weighted", "add-difference", "slerp"]
METHODS: tuple[Method, ...] = ("weighted", "add-difference", "slerp")
PARALLEL = 1e-3  # radians between two tensors, or from opposite ones, below which `slerp` is `weighted`; see there
CHUNK = 2**20  # numbers multiplied in float64 at once


def weighted(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) a + alpha b in float32, as a + alpha (b - a): what both share stays bit by bit. Uses up `a`."""
    return a.lerp_(b, alpha)


def added(a: Tensor, b: Tensor, c: Tensor, alpha: float) -> Tensor:
    """a + alpha (b - c), float32; where b and c are equal, a bit by bit. Uses up `b`."""
    same = b == c
    return torch.where(same, a, a + b.sub_(c).mul_(alpha))


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985, section 3.3) between two tensors taken as vectors. Uses up both.

    sin((1 - alpha) w) / sin(w) a + sin(alpha w) / sin(w) b, w being the angle between them; each keeps its own length.
    `weighted` where a length is 0; where w is below PARALLEL, since the factors then differ by less than half a unit in
    the last place of float32 (they deviate by at most 0.065 w^2); and where w is as near to pi, since the formula then
    names no plane to turn in.
    """
    angle = _angle(a, b)
    if angle is None or not PARALLEL <= angle <= math.pi - PARALLEL:
        return weighted(a, b, alpha)
    return a.mul_(math.sin((1 - alpha) * angle) / math.sin(angle)).add_(
        b.mul_(math.sin(alpha * angle) / math.sin(angle))
    )


def _angle(a: Tensor, b: Tensor) -> float | None:
    """In radians; None where a length is 0 or not finite."""
    lengths = math.sqrt(_dot(a, a)) * math.sqrt(_dot(b, b))
    if lengths == 0 or not math.isfinite(lengths):
        return None
    return math.acos(max(-1.0, min(1.0, _dot(a, b) / lengths)))


def _dot(x: Tensor, y: Tensor) -> float:
    """The scalar product, summed in float64 a piece at a time: no second copy of a large tensor."""
    return math.fsum(
        (p.double() @ q.double()).item()
        for p, q in zip(x.flatten().split(CHUNK), y.flatten().split(CHUNK), strict=True)
    )


RECIPE = "ldm.merge"  # metadata: method, weights and sources, as JSON
CARRIED = (
    "modelspec.architecture",
    "modelspec.license",
    "modelspec.prediction_type",
    "license",
)  # of A's metadata: what stays true of the result
LIMITS = {"weighted": (0.0, 1.0), "slerp": (0.0, 1.0), "add-difference": (-2.0, 2.0)}  # of a weight
INPUT = "unet.input_blocks.0.0.weight"
NOTHING_READS = "nothing reads it, and not every model has it"
PARTIAL = "not every model has it (partial)"
FOREIGN = "no parameter of this family"


@dataclass(frozen=True)
class Merged:
    """What `merge` did. Keys are those of A's file."""

    path: Path
    merged: tuple[str, ...]
    kept: Mapping[str, str]  # taken from A as it is -> why
    dropped: tuple[str, ...]  # A's moving average, which would be of other weights
    unused: Mapping[str, tuple[str, ...]]  # B, C -> its keys for which A has no place
    notes: tuple[str, ...]  # what else is worth knowing, a line each

    def lines(self) -> list[str]:
        """The same for people."""
        lines = [f"{len(self.merged)} tensors merged"]
        lines += [f"{n} kept as in A: {why}" for why, n in Counter(self.kept.values()).items()]
        if self.dropped:
            lines.append(f"{len(self.dropped)} of A's moving average dropped: they average other weights than these")
        lines += [
            f"{len(keys)} of {model} unused: A has no place for them ({', '.join(map(short, keys[:3]))})"
            for model, keys in self.unused.items()
            if keys
        ]
        return [*lines, *self.notes]


def merge(
    a: str | PathLike[str], b: str | PathLike[str], out: str | PathLike[str], *, c: str | PathLike[str] | None = None,
    method: Method = "weighted", alpha: float = 0.5, blocks: Blocks | None = None, dtype: torch.dtype | None = None,
    config: ModelConfig | str | None = None, prediction: Prediction | None = None, partial: bool = False,
    overwrite: bool = False, on_write: OnWrite | None = None,
) -> Merged:  # fmt: skip
    """Merge models of one family into a file with A's keys: .safetensors, or a torch file where `out` ends so.

    a           a single file in any container; b and c may also be diffusers folders
    method      weighted        (1 - alpha) A + alpha B
                add-difference  A + alpha (B - C)
                slerp           from A (0) to B (1) along the arc between them, tensor by tensor: see `slerp`
    alpha       0 to 1; for add-difference -2 to 2. 0 gives A's numbers bit by bit, 1 gives B's where A has the same
                type
    blocks      other weights for some blocks: {"IN00": 0.2, "MID": 0.5, "TEXT": 0, "VAE": 0}, or one number for each
                block of the UNet
    dtype       of what is merged; None: as in A. The arithmetic is in float32
    config, prediction   as in `load`, for all models, where the files do not tell
    partial     keep A's where B or C lacks a parameter, which is an error otherwise
    on_write    called after every tensor

    For add-difference, A may be of an inpainting family, and B and C of the one that it was made from: the difference
    then goes to the four latent channels of the UNet's input, and A's other five stay. What is no parameter
    (position_ids, schedules, bookkeeping) is A's. A's moving average is left out. The recipe goes into the metadata.
    One tensor at a time is in memory, of each model. Raises ArgumentError, FileError, AmbiguousCheckpoint, OutputError.
    """
    _check(method, alpha, c, blocks, dtype, prediction)
    require_writable(out, overwrite)
    if is_folder(a):
        what = "is a diffusers folder; A must be a single file, whose layout the result has"
        raise FileError(f"{what}: convert it first (ldm convert)", path=a)
    paths = {"A": a, "B": b} if c is None else {"A": a, "B": b, "C": c}
    with contextlib.ExitStack() as opened:
        files = {letter: opened.enter_context(open_any(path)) for letter, path in paths.items()}
        models = {letter: _model(file, config, prediction) for letter, file in files.items()}
        first, others = models["A"], {letter: model for letter, model in models.items() if letter != "A"}
        inpaints = agreeing(models, method)
        by_block = weights_of(blocks, first.config)
        common, kept = _common(first, others, inpaints, partial)
        alphas = {name: by_block.get(block_of(name, first.config), alpha) for name in common}

        def merged(name: str) -> Tensor:
            return _merged([*models.values()], name, alphas[name], method, inpaints)

        tensors, dropped = _pending(first, common, kept, merged, dtype)
        recipe: dict[str, Any] = {"method": method, "alpha": alpha, **({"blocks": by_block} if by_block else {})}
        recipe |= {"arithmetic": "float32", "sources": [_source(letter, model) for letter, model in models.items()]}
        if dropped:
            recipe["moving_average"] = "dropped: it averaged A's weights"
        report = guarded(files.values(), on_write)
        path = write(tensors, out, _metadata(first, recipe), overwrite=overwrite, on_write=report)
        notes = [f"{letter} has a moving average, which was not used" for letter, one in others.items() if one.averages]
        if inpaints:
            what = "the 4 latent channels of the UNet's input got the difference, its other channels are A's"
            notes = [what, *notes]
        changed = {first.places[name].key for name in common}
        unused = {letter: _unused(model, first) for letter, model in others.items()}
        return Merged(path, tuple(key for key in tensors if key in changed), kept, dropped, unused, tuple(notes))


def _check(
    method: str, alpha: float, c: Any, blocks: Blocks | None, dtype: torch.dtype | None, prediction: str | None
) -> None:
    """Refuse what no models could be merged with."""
    if method not in METHODS:
        raise ArgumentError(f"method: {str(method)[:40]!r}; there are {', '.join(METHODS)}", key="method")
    if (c is None) == (method == "add-difference"):
        two = f"takes two models; the third is for add-difference, not {method}"
        fault = "needs a third model, C, to take from B" if c is None else two
        raise ArgumentError(f"method: {method} {fault}", key="method")
    _check_weight("alpha", alpha, method)
    for name, weight in blocks.items() if isinstance(blocks, Mapping) else enumerate(blocks or ()):
        _check_weight("blocks", weight, method, f"{name}: ")
    if dtype is not None:
        require_dtype(dtype)
    require_prediction(prediction)


def _check_weight(option: str, weight: Any, method: str, where: str = "") -> None:
    low, high = LIMITS[method]
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not (number and math.isfinite(weight) and low <= weight <= high):
        raise ArgumentError(f"{option}: {where}{str(weight)[:40]}; give {low:g} to {high:g} for {method}", key=option)


def _model(file: Tensors, config: ModelConfig | str | None, prediction: Prediction | None) -> Checkpoint:
    """A model by what its file says. Raises FileError; AmbiguousCheckpoint where its prediction cannot be known."""
    model = recognise(file, config, prediction)
    model.require_settled("models of a merge must predict alike")
    model.require_single()
    model.require_numbers()
    return model


def agreeing(models: Mapping[str, Checkpoint], method: str) -> bool:
    """Refuse models that do not go together. True: A is for inpainting and gets the difference of two of its base."""
    a = models["A"]
    others = {letter: model for letter, model in models.items() if letter != "A"}
    kin = a.config.kin
    made_from = a.config.family.base if kin == a.config.name else ""  # with more inputs
    inpaints = (
        method == "add-difference"
        and made_from != ""
        and all(model.config.kin == made_from for model in others.values())
    )
    for letter, model in others.items():
        if model.config.kin != kin and not inpaints and _networks(model.config) != _networks(a.config):
            what = f"{letter} is {model.title} and A ({a.file.path.name[-40:]}) is {a.title}"
            raise model.file.error(f"{what}; merge models of one family")
        if model.config.prediction != a.config.prediction:
            what = f"{letter} predicts {model.config.prediction} and A predicts {a.config.prediction}"
            raise model.file.error(f"{what}; no average of the two works: merge models that predict alike")
        if model.config.schedule != a.config.schedule:
            what = f"{letter} was trained with another noise schedule than A"
            raise model.file.error(f"{what}; merge models with the same one")
    return inpaints


def _networks(config: ModelConfig) -> tuple[object, ...]:
    """What a model is made of, whatever its name: a folder does not keep that of a model of its own sizes."""
    return config.unet, config.vae, config.text, config.vision, config.depth


def _common(
    a: Checkpoint, others: Mapping[str, Checkpoint], inpaints: bool, partial: bool
) -> tuple[list[str], dict[str, str]]:
    """The parameters to merge, and why A's other keys stay. Raises FileError for missing and misshapen ones."""
    common: list[str] = []
    kept: dict[str, str] = {}
    for name, place in a.places.items():
        if all(name in model.places for model in others.values()):
            common.append(name)
        else:
            kept[place.key] = NOTHING_READS if unread(name, a.config) else PARTIAL
    for letter, model in others.items():
        lacking = [name for name in a.places if name not in model.places and not unread(name, a.config)]
        if lacking and not partial:
            shown = ", ".join(short(name) for name in lacking[:3])
            what = f"{letter} lacks {len(lacking)} parameters that A has ({shown})"
            raise model.file.error(what, lacking[0], "{partial=True} keeps A's")
        for name in common:
            ours = a.shape(name)
            if inpaints and name == INPUT:
                ours = (ours[0], model.config.unet.in_channels, *ours[2:])
            place = model.places[name]
            odd = next((key for key in place.keys if not place.fits(model.file.shape(key), ours)), None)
            if odd:
                found, wanted = list(model.file.shape(odd)), list(place.stored(ours))
                what = f"{short(odd)} is {found} in {letter}, {wanted} would go with A"
                raise model.file.error(f"{what}; merge models of one size", odd)
    common = [name for name in common if a.places[name].key not in kept]  # of q, k and v under one key all or none
    if not common:
        first = next(iter(others.values()))
        raise first.file.error("has no parameter that all of the models have; give complete checkpoints")
    return common, kept


def _merged(models: Sequence[Checkpoint], name: str, alpha: float, method: Method, inpaints: bool) -> Tensor:
    if alpha == 0:
        return models[0].read(name)
    if alpha == 1 and method != "add-difference":
        return models[1].read(name)
    tensors = [model.read(name, torch.float32) for model in models]
    if inpaints and name == INPUT:
        a, b, c = tensors
        n = b.shape[1]
        return torch.cat([added(a[:, :n], b, c, alpha), a[:, n:]], dim=1)
    blends: dict[str, Callable[..., Tensor]] = {"weighted": weighted, "add-difference": added, "slerp": slerp}
    return blends[method](*tensors, alpha)


def _pending(
    a: Checkpoint,
    common: Sequence[str],
    kept: dict[str, str],
    merged: Callable[[str], Tensor],
    dtype: torch.dtype | None,
) -> tuple[dict[str, Pending], tuple[str, ...]]:
    """Every tensor of the result, and the keys of A that it has not. `kept` gets the keys that are no parameters."""
    changed = {a.places[name].key for name in common}
    dropped = set(a.averages.values())
    tensors: dict[str, Pending] = {}
    for key, spec in a.file.specs.items():
        if key in dropped:
            continue
        if key not in a.within:
            kept[key] = a.ignored.get(key, FOREIGN)
        stored = cast(spec.dtype, dtype if key in a.within else None)
        make = (
            functools.partial(a.stored, key, merged)
            if key in changed
            else functools.partial(a.file.read, key, mapped=False)
        )
        tensors[key] = Pending(stored, spec.shape, make)
    return tensors, tuple(key for key in a.file if key in dropped)


def _unused(model: Checkpoint, a: Checkpoint) -> tuple[str, ...]:
    """The keys of B or C that are parameters of theirs and not of A's, or nobody's."""
    used = {key for name, place in model.places.items() if name in a.places for key in place.keys}
    return tuple(key for key in model.file if key not in used and key not in model.ignored)


def _metadata(a: Checkpoint, recipe: Mapping[str, Any]) -> dict[str, str]:
    carried = {key: a.file.metadata[key] for key in (*CARRIED, CONFIG_KEY) if key in a.file.metadata}
    found = {"format": "pt", **carried, RECIPE: json.dumps(recipe)}
    return found if a.missing else {**found, CONFIG_KEY: to_json(a.config)}


def _source(letter: str, model: Checkpoint) -> dict[str, str]:
    name = model.file.path.resolve().name
    return {"model": letter, "name": name, "family": model.config.name, "sha256": sha256_of(model.file)}


Blocks = Mapping[str, float] | Sequence[float]  # by name, or one number for each block of the UNet


_OTHERS = {"text.": "TEXT", "vae.": "VAE", "vision.": "VISION", "depth.": "DEPTH"}


def unet_blocks(config: ModelConfig) -> list[str]:
    """IN00 ... MID ... OUT11, in the order of the forward: 25 for SD 1 and 2, 19 for SDXL."""
    inputs = len(config.unet.down_depth) * (config.unet.num_res_blocks + 1)
    outputs = sum(len(depths) for depths in config.unet.up_depth)
    return [*(f"IN{i:02}" for i in range(inputs)), "MID", *(f"OUT{i:02}" for i in range(outputs))]


def block_of(parameter: str, config: ModelConfig) -> str:
    """The block that one of our parameters belongs to.

    What comes before all blocks (time_embed, label_emb) goes with IN00, what comes after them (out) with the last one:
    the custom of the A1111 extension "merge block weighted", whose 25 numbers are shared among people.
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
    """{block: weight} as given. Raises ArgumentError for unknown names and for another number of numbers."""
    if blocks is None:
        return {}
    there = unet_blocks(config)
    if not isinstance(blocks, Mapping):
        if len(blocks) != len(there):
            what = f"the UNet of {config.name} has {len(there)} blocks ({there[0]} to {there[-1]})"
            raise _error(f"{len(blocks)} numbers; {what}: give as many, or name blocks")
        return dict(zip(there, blocks, strict=True))
    has = {"text.": config.text, "vae.": config.vae, "vision.": config.vision, "depth.": config.depth}
    there += [block for prefix, block in _OTHERS.items() if has[prefix]]
    found: dict[str, float] = {}
    for given, weight in blocks.items():
        name = {"M00": "MID"}.get(given.upper(), given.upper())
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.0)[0]
            what = f"{given[:40]} is no block of {config.name} (meant {near}?)"
            raise _error(f"{what}; there are {', '.join(_ranges(config, there))}")
        if name in found:
            raise _error(f"{name} is given twice")
        found[name] = weight
    return found


def _ranges(config: ModelConfig, there: Sequence[str]) -> list[str]:
    blocks = unet_blocks(config)
    return [f"{blocks[0]} to {blocks[blocks.index('MID') - 1]}", "MID", f"OUT00 to {blocks[-1]}", *there[len(blocks) :]]


def _error(what: str) -> ArgumentError:
    return ArgumentError(f"blocks: {what}", key="blocks")
