"""Two or three models of one family -> one, parameter by parameter, in the layout of the first."""

from __future__ import annotations

import contextlib
import difflib
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
from ldm.disk import require_writable
from ldm.errors import ArgumentError, FileError
from weights.files.folders import is_folder
from weights.files.hashes import sha256_of
from weights.files.write import OnWrite, Pending, cast, guarded, write
from weights.models import open_any, require_dtype
from weights.names.layout import reason
from weights.names.metadata import CONFIG_KEY, to_json
from weights.names.places import Shape
from weights.names.prediction import Prediction, require_prediction
from weights.plan import short
from weights.tools.merge_sides import Side, agreeing, averages, side_of

Method = Literal["weighted", "add-difference", "slerp"]
METHODS: tuple[Method, ...] = ("weighted", "add-difference", "slerp")
PARALLEL = 1e-3  # radians between two tensors, or from opposite ones, below which `slerp` is `weighted`; see there
CHUNK = 2**20  # numbers multiplied in float64 at once


def weighted(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) a + alpha b, float32, computed as a + alpha (b - a) so that what is the same in both stays the same bit by bit. Uses up `a`."""
    return a.lerp_(b, alpha)


def added(a: Tensor, b: Tensor, c: Tensor, alpha: float) -> Tensor:
    """a + alpha (b - c), float32; where b and c are equal, a bit by bit. Uses up `b`."""
    same = b == c
    return torch.where(same, a, a + b.sub_(c).mul_(alpha))


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985, section 3.3) between two tensors taken as vectors, each with its own length. Uses up both.

    sin((1 - alpha) w) / sin(w) a + sin(alpha w) / sin(w) b, w being the angle between them. `weighted` where a length is 0, where w is below
    PARALLEL, since there the factors differ by less than half a unit in the last place of float32 (they deviate by at most 0.065 w^2), and
    where w is as near to pi, since there the formula names no plane to turn in.
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
        said = [f"{len(self.merged)} tensors merged"]
        said += [f"{n} kept as in A: {why}" for why, n in Counter(self.kept.values()).items()]
        if self.dropped:
            said.append(f"{len(self.dropped)} of A's moving average dropped: they average other weights than these")
        said += [
            f"{len(keys)} of {model} unused: A has no place for them ({', '.join(map(short, keys[:3]))})"
            for model, keys in self.unused.items()
            if keys
        ]
        return [*said, *self.notes]


def merge(
    a: str | PathLike[str],
    b: str | PathLike[str],
    out: str | PathLike[str],
    *,
    c: str | PathLike[str] | None = None,
    method: Method = "weighted",
    alpha: float = 0.5,
    blocks: Blocks | None = None,
    dtype: torch.dtype | None = None,
    config: ModelConfig | str | None = None,
    prediction: Prediction | None = None,
    partial: bool = False,
    overwrite: bool = False,
    on_write: OnWrite | None = None,
) -> Merged:
    """Merge models of one family into a file with A's keys: .safetensors, or a torch file where `out` ends so.

    a           a single file in any container; b and c may also be diffusers folders
    method      weighted        (1 - alpha) A + alpha B
                add-difference  A + alpha (B - C)
                slerp           from A (0) to B (1) along the arc between them, tensor by tensor (`weights.blend.slerp`)
    alpha       0 to 1; for add-difference -2 to 2. 0 gives A's numbers bit by bit, 1 gives B's where A stores the same type
    blocks      other weights for some blocks: {"IN00": 0.2, "MID": 0.5, "TEXT": 0, "VAE": 0}, or one number for each block of the UNet
    dtype       of what is merged; None: as in A. The arithmetic is in float32
    config, prediction   as in `load`, for all models, where the files do not tell
    partial     keep A's where B or C lacks a parameter, which is an error otherwise
    on_write    called after every tensor

    A and B may be of an inpainting family and of the one it was made from, with C of the latter, for add-difference: the difference then
    goes to the four latent channels of the UNet's input, and A's other five stay. What is no parameter (position_ids, schedules,
    bookkeeping) is A's. A's moving average is left out. The recipe goes into the metadata.
    One tensor at a time is in memory, of each model. Raises ArgumentError, FileError, AmbiguousCheckpoint, OutputError.
    """
    _check(method, alpha, c, blocks, dtype, prediction)
    require_writable(out, overwrite)
    if is_folder(a):
        raise FileError(
            "is a diffusers folder; A must be a single file, whose layout the result has: convert it first (ldm convert)",
            path=a,
        )
    paths = {"A": a, "B": b} if c is None else {"A": a, "B": b, "C": c}
    with contextlib.ExitStack() as opened:
        sides = [
            side_of(letter, opened.enter_context(open_any(path)), config, prediction) for letter, path in paths.items()
        ]
        inpaints = agreeing(sides, method)
        weights = weights_of(blocks, sides[0].config)
        common, kept = _common(sides, inpaints, partial)
        alphas = {name: weights.get(block_of(name, sides[0].config), alpha) for name in common}

        def merged(name: str) -> Tensor:
            return _merged(sides, name, alphas[name], method, inpaints)

        tensors, dropped = _pending(sides[0], common, kept, merged, dtype)
        recipe = {
            "method": method,
            "alpha": alpha,
            **({"blocks": weights} if weights else {}),
            "arithmetic": "float32",
            "sources": [_source(side) for side in sides],
        }
        if dropped:
            recipe["moving_average"] = "dropped: it averaged A's weights"
        path = write(
            tensors,
            out,
            _metadata(sides[0], recipe),
            overwrite=overwrite,
            on_write=guarded([side.file for side in sides], on_write),
        )
        used = {sides[0].places[name].key for name in common}
        unused = {side.letter: _unused(side, sides[0]) for side in sides[1:]}
        notes = (
            ["the 4 latent channels of the UNet's input got the difference, its other channels are A's"]
            if inpaints
            else []
        )
        notes += [f"{side.letter} has a moving average, which was not used" for side in sides[1:] if averages(side)]
        return Merged(path, tuple(key for key in tensors if key in used), kept, tuple(dropped), unused, tuple(notes))


# --- what is asked for ----------------------------------------------------------------------------------------------


def _check(
    method: str, alpha: float, c: Any, blocks: Blocks | None, dtype: torch.dtype | None, prediction: str | None
) -> None:
    """Refuse what no models could be merged with."""
    if method not in METHODS:
        raise ArgumentError(f"method: {str(method)[:40]!r}; there are {', '.join(METHODS)}", key="method")
    if (c is None) == (method == "add-difference"):
        fault = (
            "needs a third model, C, to take from B"
            if c is None
            else f"takes two models; the third is for add-difference, not {method}"
        )
        raise ArgumentError(f"method: {method} {fault}", key="method")
    _check_weight("alpha", alpha, method)
    for name, weight in blocks.items() if isinstance(blocks, Mapping) else enumerate(blocks or ()):
        _check_weight("blocks", weight, method, f"{name}: ")
    if dtype is not None:
        require_dtype(dtype)
    require_prediction(prediction)


def _check_weight(option: str, weight: Any, method: str, where: str = "") -> None:
    low, high = LIMITS[method]
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not math.isfinite(weight)
        or not low <= weight <= high
    ):
        raise ArgumentError(f"{option}: {where}{str(weight)[:40]}; give {low:g} to {high:g} for {method}", key=option)


# --- parameter by parameter -----------------------------------------------------------------------------------------


def _common(sides: Sequence[Side], inpaints: bool, partial: bool) -> tuple[list[str], dict[str, str]]:
    """The parameters that are merged, and why other keys of A's parameters stay as they are. Raises FileError for missing and misshapen ones."""
    a, common, kept = sides[0], [], {}
    for name, place in a.places.items():
        if all(name in side.places for side in sides[1:]):
            common.append(name)
        else:
            kept[place.key] = NOTHING_READS if _unread(name, a.config) else PARTIAL
    for side in sides[1:]:
        lacking = [name for name in a.places if name not in side.places and not _unread(name, a.config)]
        if lacking and not partial:
            shown = ", ".join(short(name) for name in lacking[:3])
            raise side.file.error(
                f"{side.letter} lacks {len(lacking)} parameters that A has ({shown}); partial=True keeps A's",
                lacking[0],
            )
        for name in common:
            ours = _shape(a, name)
            if inpaints and name == INPUT:
                ours = (ours[0], side.config.unet.in_channels, *ours[2:])
            place = side.places[name]
            odd = next((key for key in place.keys if not place.fits(side.file.shape(key), ours)), None)
            if odd:
                there, want = list(side.file.shape(odd)), list(place.stored(ours))
                raise side.file.error(
                    f"{short(odd)} is {there} in {side.letter}, {want} would go with A; merge models of one size", odd
                )
    common = [name for name in common if a.places[name].key not in kept]  # of q, k and v under one key all or none
    if not common:
        raise sides[1].file.error("has no parameter that all of the models have; give complete checkpoints")
    return common, kept


def _unread(name: str, config: ModelConfig) -> bool:
    """Is this of the last blocks, or the projection, of a text tower whose pooled text nothing reads? Files may leave those out."""
    match = re.match(r"text\.(\d+)\.(.+)", name)
    if not match or (config.unet.vector_dim is not None and int(match[1]) == len(config.text) - 1):
        return False
    tower, layer = config.text[int(match[1])], re.match(r"text_model\.encoder\.layers\.(\d+)\.", match[2])
    return match[2] == "text_projection.weight" or bool(layer and int(layer[1]) >= tower.layers - tower.skip)


def _shape(side: Side, name: str) -> Shape:
    """The shape of one of our parameters, as this model has it."""
    place = side.places[name]
    shape = place.ours(side.file.shape(place.key))
    return (*shape, 1, 1) if place.how == "kernel" and len(shape) == 2 else shape


def _read(side: Side, name: str, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
    """One of our parameters, in memory of its own."""
    place, file = side.places[name], side.file
    if place.more:
        return torch.cat([file.read(key, "cpu", dtype, mapped=False) for key in place.keys])
    return place.turned(file.read(place.key, "cpu", dtype, place.rows(file.shape(place.key)), mapped=False), shape)


def _merged(sides: Sequence[Side], name: str, alpha: float, method: Method, inpaints: bool) -> Tensor:
    shape = _shape(sides[0], name)
    if alpha == 0:
        return _read(sides[0], name, shape)
    if alpha == 1 and method != "add-difference":
        return _read(sides[1], name, shape)
    if inpaints and name == INPUT:
        a = _read(sides[0], name, shape, torch.float32)
        n = sides[1].config.unet.in_channels
        b, c = (_read(side, name, (shape[0], n, *shape[2:]), torch.float32) for side in sides[1:])
        return torch.cat([added(a[:, :n], b, c, alpha), a[:, n:]], dim=1)
    tensors = [_read(side, name, shape, torch.float32) for side in sides]
    return {"weighted": weighted, "add-difference": added, "slerp": slerp}[method](*tensors, alpha)


def _pending(
    a: Side, common: Sequence[str], kept: dict[str, str], merged: Callable[[str], Tensor], dtype: torch.dtype | None
) -> tuple[dict[str, Pending], list[str]]:
    """Every tensor of the result, and the keys of A that it has not. `kept` gets the keys that are no parameters."""
    parameters = {place.key for place in a.places.values()}
    parts: dict[str, dict[str, str]] = {}  # key -> {how: parameter}
    for name in common:
        parts.setdefault(a.places[name].key, {})[a.places[name].how] = name
    dropped = averages(a)
    tensors: dict[str, Pending] = {}
    for key, spec in a.file.specs.items():
        if key in dropped:
            continue
        if key in parts:
            tensors[key] = Pending(
                cast(spec.dtype, dtype),
                spec.shape,
                lambda key=key, shape=spec.shape: _stored(parts[key], shape, merged),
            )
            continue
        if key not in parameters:
            kept[key] = reason(a.layout.ignored, key) or FOREIGN
        wanted = dtype if key in parameters else None
        tensors[key] = Pending(cast(spec.dtype, wanted), spec.shape, lambda key=key: a.file.read(key, mapped=False))
    return tensors, [key for key in a.file if key in dropped]


def _stored(parts: Mapping[str, str], shape: Shape, merged: Callable[[str], Tensor]) -> Tensor:
    """What A's file has under one key, of `shape` there, from our parameters."""
    if "q" in parts:
        return torch.cat([merged(parts[how]) for how in ("q", "k", "v")])
    ((how, name),) = parts.items()
    return merged(name).T if how == "transposed" else merged(name).view(shape)


def _unused(side: Side, a: Side) -> tuple[str, ...]:
    """The keys of B or C that are parameters of theirs and not of A's, or nobody's."""
    used = {key for name, place in side.places.items() if name in a.places for key in place.keys} | averages(side)
    return tuple(key for key in side.file if key not in used and reason(side.layout.ignored, key) is None)


# --- what is said about it ------------------------------------------------------------------------------------------


def _metadata(a: Side, recipe: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "format": "pt",
        **{key: a.file.metadata[key] for key in (*CARRIED, CONFIG_KEY) if key in a.file.metadata},
        RECIPE: json.dumps(recipe),
    }
    return {**found, CONFIG_KEY: to_json(a.config)} if a.complete else found


def _source(side: Side) -> dict[str, str]:
    return {
        "model": side.letter,
        "name": side.file.path.resolve().name,
        "family": side.config.name,
        "sha256": sha256_of(side.file),
    }


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
            raise _error(
                f"{len(blocks)} numbers; the UNet of {config.name} has {len(there)} blocks ({there[0]} to {there[-1]}): give as many, or name blocks"
            )
        return dict(zip(there, blocks, strict=True))
    has = {"text.": config.text, "vae.": config.vae, "vision.": config.vision, "depth.": config.depth}
    there += [block for prefix, block in _OTHERS.items() if has[prefix]]
    found: dict[str, float] = {}
    for given, weight in blocks.items():
        name = {"M00": "MID"}.get(given.upper(), given.upper())
        if name not in there:
            near = difflib.get_close_matches(name, there, n=1, cutoff=0.0)[0]
            raise _error(
                f"{given[:40]} is no block of {config.name} (meant {near}?); there are {', '.join(_ranges(config, there))}"
            )
        if name in found:
            raise _error(f"{name} is given twice")
        found[name] = weight
    return found


def _ranges(config: ModelConfig, there: Sequence[str]) -> list[str]:
    blocks = unet_blocks(config)
    return [f"{blocks[0]} to {blocks[blocks.index('MID') - 1]}", "MID", f"OUT00 to {blocks[-1]}", *there[len(blocks) :]]


def _error(what: str) -> ArgumentError:
    return ArgumentError(f"blocks: {what}", key="blocks")
