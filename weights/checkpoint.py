"""A recognised file or folder of weights: which model it holds, where each parameter lies, what is ignored and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from ldm.config import ModelConfig
from ldm.errors import AmbiguousCheckpoint, ArgumentError
from ldm.model import LatentDiffusion
from weights.files.opened import Tensors, Weights, is_folder, open_file
from weights.names import places as names
from weights.names.blank import shapes
from weights.names.detect import detect
from weights.names.family import family_title
from weights.names.layout import WHAT, Layout, original, reason
from weights.names.metadata import CONFIG_KEY
from weights.names.places import Place, Shape, joined, short
from weights.names.prediction import STATISTIC, Finding, Prediction, settle

NO_AVERAGE = "load it with {ema=False}"
RAW = "the moving average was not asked for: ema=True loads it"
AVERAGED = "the moving average was asked for in place of these"


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The parameters of a network in an open file or folder, and what else is in it.

    Each parameter has a place, or its keys are in `missing`; each key of the file is in a place, in `ignored` or in
    `unknown`. Nothing is refused until one of the `require` methods is called.
    """

    file: Tensors
    layout: Layout
    network: Callable[[], Mapping[str, Shape]]  # its parameters with their shapes; it takes a second to build SDXL
    ema: bool = False  # use the moving average of the weights in the place of the raw ones

    @cached_property
    def wanted(self) -> Mapping[str, Shape]:
        """The parameters that the network has, with their shapes."""
        return self.network()

    @cached_property
    def found(self) -> Mapping[str, Sequence[Place]]:
        """Every place in the file of every parameter; there should be one of each."""
        file = self.file
        return {
            name: [place for place in self.layout.places(name) if all(key in file for key in place.keys)]
            for name in self.wanted
        }

    @cached_property
    def raw(self) -> Mapping[str, Place]:
        """Where each parameter lies, moving averages aside; without those that the file lacks."""
        return {name: places[0] for name, places in self.found.items() if places}

    @cached_property
    def averaged(self) -> Mapping[str, str]:
        """Our parameter -> the key of its moving average, for all that a whole average has; the file may lack them."""
        prefix = self.layout.averaged
        if prefix is None:
            return {}
        return {name: names.ema(place.key) for name, place in self.raw.items() if place.key.startswith(prefix)}

    @cached_property
    def averages(self) -> Mapping[str, str]:
        """The same for the moving averages that the file has."""
        return {name: key for name, key in self.averaged.items() if key in self.file}

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Where each parameter lies; without those that the file lacks."""
        return {**self.raw, **{name: Place(key) for name, key in self.averaged.items()}} if self.ema else self.raw

    @cached_property
    def _rest(self) -> Mapping[str, str | None]:
        """Every key that is in no place -> why it is ignored; None: nothing accounts for it."""
        twice = (place for places in self.found.values() for place in places[1:])
        used = {key for place in (*self.places.values(), *twice) for key in place.keys}
        if self.ema:
            reasons = {self.raw[name].key: AVERAGED for name in self.averaged}
        else:
            reasons = dict.fromkeys(self.averages.values(), RAW)
        return {key: reasons.get(key) or reason(self.layout.ignored, key) for key in self.file if key not in used}

    @cached_property
    def ignored(self) -> Mapping[str, str]:
        """Key in the file from which nothing is computed -> why it may be ignored."""
        return {key: why for key, why in self._rest.items() if why is not None}

    @cached_property
    def unknown(self) -> Sequence[str]:
        """The keys in the file that nothing accounts for."""
        return [key for key, why in self._rest.items() if why is None]

    @cached_property
    def missing(self) -> Mapping[str, Sequence[str]]:
        """The keys that the file lacks, by the prefix of the network that they belong to."""
        missing: dict[str, dict[str, None]] = {}
        for name in self.wanted:
            if name not in self.raw:
                usual = self.layout.places(name)
                lacking = [key for key in usual[0].keys if key not in self.file] if usual else [name]
                missing.setdefault(network_of(name), {}).update(dict.fromkeys(lacking))
        return {network: [*keys] for network, keys in missing.items()}

    @cached_property
    def misshapen(self) -> Mapping[str, tuple[Shape, Shape]]:
        """Key of a parameter of another shape -> (the shape that it should have, the shape that it has)."""
        pairs = ((key, place, self.wanted[name]) for name, place in self.places.items() for key in place.keys)
        return {
            key: (place.stored(ours), self.file.shape(key))
            for key, place, ours in pairs
            if not place.fits(self.file.shape(key), ours)
        }

    def require_single(self, parameters: Iterable[str] | None = None) -> None:
        """Refuse a file that has one of these parameters in two places. None: of all."""
        for name in self.wanted if parameters is None else parameters:
            if len(self.found[name]) > 1:
                one, other = (short(place.key) for place in self.found[name][:2])
                raise self.file.error(
                    f"has {one} twice, also as {other}; which is right cannot be known", self.found[name][1].key
                )

    def integers(self, name: str) -> str | None:
        """The key of a parameter that is stored as integers; None: it is stored as floating-point numbers."""
        specs = self.file.specs
        return next((key for key in self.places[name].keys if not specs[key].dtype.is_floating_point), None)

    def require_numbers(self, parameters: Iterable[str] | None = None) -> None:
        """Refuse integers in the place of one of these parameters. None: of any."""
        for name in self.places if parameters is None else parameters:
            if (key := self.integers(name)) is not None:
                what = f"{key} holds {self.file.specs[key].dtype} numbers, not floating-point ones"
                raise self.file.error(f"{what}; quantised weights are not read", key)

    def require_whole(self) -> None:
        """Refuse a file that lacks a parameter, has one twice or in another shape, or has a key of no known use.

        Missing, unknown and misshapen tensors are counted, the first three are named.
        """
        self.require_single()
        there = {network_of(name) for name in self.raw}
        for network in self.missing:
            if network not in there:
                what = next((what for prefix, what in WHAT.items() if network.startswith(prefix)), network.strip("."))
                prefix = next((part.theirs for part in self.layout.parts if part.ours == network), None)
                names_of_it = f" (no {prefix}* of the names it should have)" if prefix else ""
                raise self.file.error(f"has no {what}{names_of_it}; use a complete checkpoint")
        if self.ema:
            self._require_average()
        missing = [key for keys in self.missing.values() for key in keys]
        faults = {
            "of another shape": [
                f"{short(key)} {list(has)} instead of {list(wants)}" for key, (wants, has) in self.misshapen.items()
            ],
            "missing": [short(key) for key in missing],
            "unknown": [short(key) for key in self.unknown],
        }
        if any(faults.values()):
            counts = [f"{len(keys)} {what} ({', '.join(keys[:3])})" for what, keys in faults.items() if keys]
            raise self.file.error(f"tensors {', '.join(counts)}", [*self.misshapen, *missing, *self.unknown][0])

    def _require_average(self) -> None:
        if self.layout.averaged is None:
            raise self.file.error("has no moving average: this layout never holds one", remedy=NO_AVERAGE)
        n, of = len(self.averages), len(self.averaged)
        if n == 0:
            why = "no model_ema.* at all"
            if "model_ema.decay" in self.file:
                why = "only its decay and num_updates: the average is already in the weights"
            raise self.file.error(f"has no moving average ({why})", remedy=NO_AVERAGE)
        if n < of:
            first = next(key for name, key in self.averaged.items() if name not in self.averages)
            raise self.file.error(
                f"has a moving average of {n} of {of} tensors, {short(first)} is missing", first, NO_AVERAGE
            )

    def shape(self, name: str) -> Shape:
        """The shape of one of our parameters, as large as this file has it."""
        place = self.places[name]
        shape = place.ours(self.file.shape(place.key))
        if place.more:
            shape = (sum(self.file.shape(key)[0] for key in place.keys), *shape[1:])
        return (*shape, 1, 1) if place.how == "kernel" and len(shape) == 2 else shape

    def read(
        self, name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", *, mapped: bool = False
    ) -> Tensor:
        """One of our parameters, in our shape, as `read` gives it."""
        return read(self.file, self.places[name], self.shape(name), dtype, device, mapped=mapped)

    @cached_property
    def within(self) -> Mapping[str, Sequence[str]]:
        """Key in the file -> our parameters that lie in it: three in a matrix of q, k and v."""
        within: dict[str, list[str]] = {}
        for name, place in self.places.items():
            for key in place.keys:
                within.setdefault(key, []).append(name)
        return within

    def stored(self, key: str, parameter: Callable[[str], Tensor]) -> Tensor:
        """The tensor under a key, laid out as in this file, from new values: `parameter(name)` gives one of ours."""
        parts = [(self.places[name], parameter(name)) for name in self.within[key]]
        return joined(key, parts).reshape(self.file.shape(key))


def read(
    file: Tensors, place: Place, ours: Shape, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", *,
    mapped: bool = False,
) -> Tensor:  # fmt: skip
    """What lies at a place of a file, in our shape: the only way from what is stored to the numbers of a parameter.

    dtype   None: the type in which it is stored
    mapped  share the file's memory where nothing is converted; if false it is a copy
    """
    pieces = [file.read(key, device, dtype, place.rows(file.shape(key)), mapped=mapped) for key in place.keys]
    return place.turned(torch.cat(pieces) if place.more else pieces[0], ours)


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Parameters):
    """A model in an open file or folder."""

    finding: Finding

    @property
    def config(self) -> ModelConfig:
        """What the model is made of."""
        return self.finding.config

    @property
    def title(self) -> str:
        """What it is, in words: "an SD 1 model"."""
        return family_title(self.config)

    def statistic(self) -> Tensor | None:
        """The tensor that tells SD 2's two kinds apart; None where it is not in the file."""
        return next((self.file[place.key] for place in self.layout.places(STATISTIC) if place.key in self.file), None)

    def require_settled(self, why: str) -> None:
        """Refuse a model of which only its network could tell whether it predicts eps or v; `why` that matters."""
        if self.finding.doubt is not None:
            what = f"may predict eps or v (norm1.bias std {self.finding.doubt:.3f}), and {why}"
            raise AmbiguousCheckpoint(f"{what}: pass prediction='eps' or 'v'", path=self.file.path, key="prediction")


def open_any(path: str | PathLike[str], variant: str | None = None) -> Tensors:
    """A file of weights, or a folder's of one `variant`. Raises FileError; ArgumentError for a variant of a file."""
    if is_folder(path):
        from weights.files.folders import open_folder  # of which a single file needs nothing

        return open_folder(path, variant)
    if variant is not None:
        name = Path(path).name[-60:]
        raise ArgumentError(
            f"variant: {variant[:40]!r} is one of a diffusers folder's, and {name} is a file; leave it out",
            key="variant",
        )
    return open_file(path)


def recognise(
    file: Tensors,
    config: ModelConfig | str | None = None,
    prediction: Prediction | None = None,
    *,
    ema: bool = False,
) -> Checkpoint:
    """The model in an open file or folder. `config` and `prediction` overrule the file as in `weights.load`.

    Reads headers and, of SD 2's text models, one small tensor. Raises FileError for what is no model of a known family.
    """
    found = described(file, config)
    explicit = config is not None or CONFIG_KEY in file.metadata
    finding = settle(
        found.config, file.specs, file.metadata, found.statistic, file.error, prediction=prediction, explicit=explicit
    )
    return _checkpoint(file, found.layout, finding, ema)


def described(file: Tensors, config: ModelConfig | str | None = None) -> Checkpoint:
    """The same from headers alone: it predicts what its family does, whatever the file says of that."""
    if isinstance(file, Weights):
        there = {key: file.shape(key) for key in file}
        known, layout = detect(there, file.metadata, config, file.path), original(there)
    else:
        from weights.folder.read import describe

        known, layout = describe(file, config)
    return _checkpoint(file, layout, Finding(known))


def config_of(path: str | PathLike[str]) -> ModelConfig:
    """The config of the model in a file or folder, of which only the header is read."""
    with open_any(path) as file:
        return described(file).config


def _checkpoint(file: Tensors, layout: Layout, finding: Finding, ema: bool = False) -> Checkpoint:
    network = partial(shapes, LatentDiffusion, finding.config)
    return Checkpoint(file=file, layout=layout, network=network, ema=ema, finding=finding)


def require_dtype(dtype: torch.dtype) -> None:
    """Refuse a type that parameters cannot have."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ArgumentError(
            f"dtype {dtype} cannot hold weights; use torch.float32, torch.bfloat16 or torch.float16", key="dtype"
        )


def network_of(name: str) -> str:
    """The prefix of the network that one of our parameters belongs to."""
    match = re.match(r"text\.\d+\.|\w+\.", name)
    return match[0] if match else name
