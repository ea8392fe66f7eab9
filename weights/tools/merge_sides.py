"""The models that are merged: what each is, where its parameters lie, and whether they go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ldm.config import ModelConfig
from ldm.errors import AmbiguousCheckpoint
from ldm.model import LatentDiffusion
from weights.files.folders import Folder
from weights.files.opened import Weights
from weights.models import recognise
from weights.names import original as names
from weights.names.blank import shapes
from weights.names.detect import TITLES
from weights.names.layout import Layout
from weights.names.places import Place
from weights.names.prediction import Prediction
from weights.plan import short

BASES = {
    "sd1-inpainting": "sd1",
    "sd2-inpainting": "sd2-base",
    "sdxl-inpainting": "sdxl-base",
}  # family -> what it was made from


@dataclass(frozen=True)
class Side:
    """A model that takes part."""

    letter: str
    file: Weights | Folder
    config: ModelConfig
    layout: Layout
    places: Mapping[str, Place]  # our parameter -> its place; none for what the file lacks
    complete: bool  # it lacks none


def side_of(
    letter: str, file: Weights | Folder, config: ModelConfig | str | None, prediction: Prediction | None
) -> Side:
    """A model by what its file says of it. Raises FileError, and AmbiguousCheckpoint where its prediction cannot be known."""
    finding, layout = recognise(file, config, prediction)
    if finding.doubt is not None:
        fault = f"may predict eps or v (norm1.bias std {finding.doubt:.3f}: in between): pass prediction='eps' or 'v'"
        raise AmbiguousCheckpoint(fault, path=file.path, key="prediction")
    parameters = shapes(LatentDiffusion, finding.config)
    places = {name: place for name in parameters if (place := _place(file, layout, name)) is not None}
    return Side(letter, file, finding.config, layout, places, len(places) == len(parameters))


def _place(file: Weights | Folder, layout: Layout, name: str) -> Place | None:
    there = [place for place in layout.places(name) if all(key in file for key in place.keys)]
    if len(there) > 1:
        raise file.error(
            f"has {short(there[0].key)} twice, also as {short(there[1].key)}; which is right cannot be known",
            there[1].key,
        )
    for key in there[0].keys if there else ():
        if not file.specs[key].dtype.is_floating_point:
            raise file.error(
                f"{key} holds {file.specs[key].dtype} numbers, not floating-point ones: quantised weights are not merged",
                key,
            )
    return there[0] if there else None


def agreeing(sides: Sequence[Side], method: str) -> bool:
    """Refuse models that cannot be merged. True: A is an inpainting model and gets the difference of two of its base family."""
    a, others = sides[0], sides[1:]
    kinds = [{"sd2-v": "sd2-base"}.get(side.config.name, side.config.name) for side in sides]
    inpaints = method == "add-difference" and kinds[0] in BASES and kinds[1:] == [BASES[kinds[0]]] * len(others)
    for side, kind in zip(others, kinds[1:], strict=True):
        if kind != kinds[0] and not inpaints and _networks(side) != _networks(a):
            what, other = TITLES.get(kind, kind), TITLES.get(kinds[0], kinds[0])
            raise side.file.error(
                f"{side.letter} is {what} and A ({a.file.path.name[-40:]}) is {other}; merge models of one family"
            )
        if side.config.prediction != a.config.prediction:
            raise side.file.error(
                f"{side.letter} predicts {side.config.prediction} and A predicts {a.config.prediction}; no average of the two works: merge models that predict alike"
            )
        if side.config.schedule != a.config.schedule:
            raise side.file.error(
                f"{side.letter} was trained with another noise schedule than A; merge models with the same one"
            )
    return inpaints


def _networks(side: Side) -> tuple[object, ...]:
    """What a model is made of, whatever it is called: a folder does not keep the name that a file of its own sizes gives itself."""
    return side.config.unet, side.config.vae, side.config.text, side.config.vision, side.config.depth


def averages(side: Side) -> set[str]:
    """The keys of the moving average that a file has."""
    if side.layout.averaged is None:
        return set()
    keys = {names.ema(place.key) for place in side.places.values() if place.key.startswith(side.layout.averaged)}
    return {key for key in keys if key in side.file}
