"""Two files of weights -> what is in one alone, how far the rest differs, and what B is to A."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any, Literal

import torch

from ldm.config import ModelConfig
from ldm.errors import ArgumentError
from weights.checkpoint import open_any
from weights.names.family import require_family
from weights.names.places import Shape
from weights.tools.closeness import nearness, products, rank, ratio, rounding_error, same_numbers
from weights.tools.matching import Side, by_keys, by_parameters, is_network
from weights.tools.verdict import SAME, Compared, Facts, Rank, Verdict, Weight, judge, may_be_lora, relative

# Tensors of a component that `quick` compares: matrices show training, norms and biases tell a LoRA from it.
QUICK_MATRICES, QUICK_VECTORS = 6, 2
# Differences whose rank is found: each is a singular value decomposition, a second for the largest.
RANKED_MATRICES, RANKED_KERNELS = 6, 2
LARGEST_RANKED = 2**22  # numbers in such a matrix, if there are any as small; every attention matrix of SDXL is
UNEXPLAINED = 4.0  # times the rounding of the stored types: a merge in float16 rounds at each of its three steps


@dataclass(frozen=True)
class Read:
    """How far the comparison is: what `on_read` gets after each tensor."""

    name: str
    done: int  # bytes of both files so far
    total: int


OnRead = Callable[[Read], None]


@dataclass(frozen=True)
class Input:
    """One of the files."""

    path: str
    title: str  # what it is: "an SD 1 model"
    container: str  # what it lies in: "a diffusers folder"
    tensors: int  # in the file


@dataclass(frozen=True)
class Component:
    """A network, or the rest, in numbers."""

    name: str  # unet, vae, text.0, text.1, vision, depth, ema, other
    shared: int  # tensors of one name and shape in both
    equal: int  # of those that were compared: bit by bit
    rounded: int  # after rounding to the narrower type
    different: int
    largest: float  # largest absolute difference
    relative: float  # norm of the difference over norm of A's
    dtypes: Mapping[str, int]  # "float32" or "float32 -> float16" -> tensors


@dataclass(frozen=True)
class Reshaped:
    """A tensor with another shape in B."""

    name: str
    a: Shape
    b: Shape


@dataclass(frozen=True)
class Difference:
    """What `diff` found. `as_dict` has the same names."""

    verdict: Verdict
    a: Input
    b: Input
    names: Literal["parameters", "keys"]  # whether tensors are named as in `LatentDiffusion`, or as in the files
    components: tuple[Component, ...]
    only_a: Mapping[str, str]  # key in A of what B lacks -> why a file may lack it; "" where no reason is known
    only_b: Mapping[str, str]
    reshaped: tuple[Reshaped, ...]
    retyped: Mapping[str, int]  # "float32 -> float16" -> tensors
    not_finite: Mapping[str, str]  # name -> whose has NaN or infinity: "a", "b" or "both"
    different: tuple[
        Compared, ...
    ]  # tensors that are not the same after rounding, those that differ most by their norm first
    ranks: tuple[Rank, ...]
    weights: tuple[Weight, ...]  # of the third file
    quick: tuple[str, ...] | None  # names of the tensors that were compared, if not all were

    @property
    def same(self) -> bool:
        """Does B hold A's tensors bit by bit, in any container and layout, except leftovers that nothing reads?"""
        return self.verdict.kind in SAME

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: None for infinite numbers, and `different` flat, with the names below."""
        flat = [
            {"name": one.name, "component": one.component, "shape": one.shape, "a": one.dtypes[0], "b": one.dtypes[1],
             "largest": one.near.largest, "relative": one.near.relative}
            for one in self.different
        ]  # fmt: skip
        return {"same": self.same, **_plain(asdict(self) | {"different": flat})}


def diff(
    a: str | PathLike[str], b: str | PathLike[str], *, third: str | PathLike[str] | None = None, quick: bool = False,
    config: ModelConfig | str | None = None, on_read: OnRead | None = None,
) -> Difference:  # fmt: skip
    """Compare two files of weights, or diffusers folders, tensor by tensor, and judge what B is to A.

    third    a file C: weights w of B = (1 - w) A + w C are estimated for each network
    quick    compare names, shapes and types of all, but the numbers of few tensors of each component, which
             `Difference.quick` names
    config   a ModelConfig or a family's name, for the structure of models that lack tensors
    on_read  is called after each tensor
    Models, and VAEs and UNets alone, are compared by our parameters, so that layouts do not matter; everything else by
    the files' own keys. All numbers are read, one tensor of each file at a time, and compared in float64. Files of
    different kinds are a result. Raises FileError for files that cannot be read, ArgumentError for an unknown config.
    """
    if isinstance(config, str):
        require_family(config)
    elif config is not None and not isinstance(config, ModelConfig):
        raise ArgumentError("config is neither a ModelConfig nor the name of a family", key="config")
    with ExitStack() as stack:
        files = [stack.enter_context(open_any(path)) for path in (a, b, third) if path is not None]
        known = [by_parameters(file, config) for file in files]
        sides = [side for side in known if side is not None]
        if len(sides) < len(files):  # one has no network of a known make: all are compared by their own keys
            sides = [
                by_keys(file, None if side is None else side.title) for file, side in zip(files, known, strict=True)
            ]
        found = _diff(sides, quick, on_read)
        for file in files:
            file.require_unchanged()
    return found


def _diff(sides: list[Side], quick: bool, on_read: OnRead | None) -> Difference:
    a, b, *rest = sides
    both = [name for name in a.entries if name in b.entries]
    shared = [name for name in both if a.entries[name].shape == b.entries[name].shape]
    reshaped = {name: a.entries[name] for name in both if a.entries[name].shape != b.entries[name].shape}
    chosen = [*_quick(a, shared)] if quick else shared
    between = [name for name in chosen if rest and _between(sides, name)]
    reading = _Reading(sides, on_read)
    reading.total = sum(reading.size(name, 2) for name in chosen) + sum(reading.size(name, 3) for name in between)

    compared = []
    for name in chosen:
        entry, other = a.entries[name], b.entries[name]
        types = _name(entry.dtype), _name(other.dtype)
        near = nearness(a.read(name), b.read(name))
        compared.append(Compared(name, entry.component, entry.shape, types, near))
        reading.tell(name, 2)
    only_a = {name: entry for name, entry in a.entries.items() if name not in b.entries}
    only_b = {name: entry for name, entry in b.entries.items() if name not in a.entries}
    counts = Counter(a.entries[name].component for name in shared)
    facts = Facts(a, b, counts, compared, (only_a, only_b), reshaped)
    weights = tuple(_weights(sides, between, reading))
    ranks = tuple(_ranks(facts))
    facts = replace(facts, averaged=_averaged(facts), ranks=ranks, weights=weights)
    different = [one for one in compared if one.near.relation == "different"]
    types_of = {name: (a.entries[name].dtype, b.entries[name].dtype) for name in both}
    return Difference(
        verdict=judge(facts),
        a=_input(a),
        b=_input(b),
        names="parameters" if a.ours else "keys",
        components=tuple(_components(facts)),
        only_a={entry.place.key: entry.reason for entry in only_a.values()},
        only_b={entry.place.key: entry.reason for entry in only_b.values()},
        reshaped=tuple(Reshaped(name, entry.shape, b.entries[name].shape) for name, entry in reshaped.items()),
        retyped=dict(Counter(_types(_name(one), _name(other)) for one, other in types_of.values() if one != other)),
        not_finite={one.name: _whose(one.near.finite) for one in compared if not all(one.near.finite)},
        different=tuple(sorted(different, key=lambda one: (-one.near.relative, one.name))),
        ranks=ranks,
        weights=weights,
        quick=tuple(chosen) if quick else None,
    )


def _whose(finite: tuple[bool, bool]) -> str:
    """Whose numbers are not all finite."""
    return "both" if not any(finite) else "b" if finite[0] else "a"


def _quick(side: Side, names: list[str]) -> Iterator[str]:
    """A few tensors of each component, from all over it."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        groups.setdefault((side.entries[name].component, len(side.entries[name].shape) > 1), []).append(name)
    for (_, matrices), group in groups.items():
        yield from spread(group, QUICK_MATRICES if matrices else QUICK_VECTORS)


def spread(items: list[Any], count: int) -> list[Any]:
    """`count` items, evenly spaced from the first to the last; all, if there are fewer."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _between(sides: list[Side], name: str) -> bool:
    """Is this a tensor of a network that all three have, so that B's can lie between A's and C's?"""
    entries = [side.entries.get(name) for side in sides]
    shapes = {entry and entry.shape for entry in entries}
    networks = all(entry and (is_network(entry.component) or not sides[0].ours) for entry in entries)
    return len(shapes) == 1 and networks and all(entry and entry.dtype.is_floating_point for entry in entries)


class _Reading:
    """How much was read of all that will be, for `on_read`."""

    def __init__(self, sides: Sequence[Side], on_read: OnRead | None):
        self.sides, self.on_read, self.done, self.total = sides, on_read, 0, 0

    def size(self, name: str, n: int) -> int:
        """The bytes of a tensor in the first n files."""
        entries = [side.entries[name] for side in self.sides[:n]]
        return sum(entry.dtype.itemsize * math.prod(entry.shape) for entry in entries)

    def tell(self, name: str, n: int) -> None:
        """A tensor was read from the first n files."""
        self.done += self.size(name, n)
        if self.on_read is not None:
            self.on_read(Read(name, self.done, self.total))


def _averaged(facts: Facts) -> Literal["a", "b"] | None:
    """Whose moving average the other's UNet is; looked for only in those that have one, until a tensor is another."""
    moved = [one.name for one in facts.moved if one.component == "unet"]
    compared = [one.name for one in facts.compared if one.component == "unet"]

    def averages(side: Side, other: Side) -> bool:
        if not moved or any(f"ema.{name}" not in side.entries for name in moved):
            return False
        names = dict.fromkeys(name for name in (*moved, *compared) if f"ema.{name}" in side.entries)
        return all(same_numbers(side.read(f"ema.{name}"), other.read(name)) for name in names)

    return "a" if averages(facts.a, facts.b) else "b" if averages(facts.b, facts.a) else None


def _ranks(facts: Facts) -> Iterator[Rank]:
    """The ranks of a few differences, where they can tell a LoRA."""
    moved = [one for one in facts.moved if one.component != "vae"]
    if not (facts.a.ours and may_be_lora(facts.moved)):
        return
    matrices = [one for one in moved if all(one.near.finite) and math.prod(one.shape[2:]) == 1]
    kernels = [one for one in moved if all(one.near.finite) and math.prod(one.shape[2:]) > 1]
    for group, count in ((matrices, RANKED_MATRICES), (kernels, RANKED_KERNELS)):
        by_size = sorted(group, key=lambda one: math.prod(one.shape))
        small = [one for one in group if math.prod(one.shape) <= LARGEST_RANKED] or by_size[:1]
        for one in spread(small, count):
            found = rank(facts.a.read(one.name), facts.b.read(one.name))
            yield Rank(one.name, found, min(one.shape[0], math.prod(one.shape[1:])))


def _weights(sides: list[Side], between: list[str], reading: _Reading) -> Iterator[Weight]:
    """Least squares for B - A = w (C - A), component by component."""
    sums: dict[str, list[float]] = {}
    for name in between:
        tensors = [side.read(name) for side in sides]
        apart, along, across, square = products(tensors)
        error = rounding_error(math.sqrt(square), *(tensor.dtype for tensor in tensors)) ** 2
        total = sums.setdefault(sides[0].entries[name].component, [0.0] * 4)
        for i, value in enumerate((apart, along, across, error)):
            total[i] += value
        reading.tell(name, 3)
    for component, (apart, along, across, error) in sums.items():
        weight = along / across if across else None
        left = math.sqrt(max(apart - along * (weight or 0.0), 0.0))
        residual, rounding = ratio(left, math.sqrt(apart)), ratio(math.sqrt(error), math.sqrt(apart))
        yield Weight(component, weight, residual, rounding, left <= UNEXPLAINED * math.sqrt(error))


def _components(facts: Facts) -> Iterator[Component]:
    for component in sorted(
        {entry.component for side in (facts.a, facts.b) for entry in side.entries.values()}, key=_order
    ):
        there = facts.inside(component)
        relations = Counter(one.near.relation for one in there)
        dtypes = dict(Counter(_types(*one.dtypes) for one in there))
        largest = max((one.near.largest for one in there), default=0.0)
        shared, equal = facts.shared.get(component, 0), relations["equal"]
        rounded, different = relations["rounded"], relations["different"]
        yield Component(component, shared, equal, rounded, different, largest, relative(there), dtypes)


def _order(component: str) -> tuple[int, str]:
    known = ("unet", "vae", "text.0", "text.1", "vision", "depth", "ema", "other")
    return known.index(component) if component in known else len(known), component


def _input(side: Side) -> Input:
    return Input(str(side.file.path), side.title, side.container, len(side.file))


def _types(a: str, b: str) -> str:
    return a if a == b else f"{a} -> {b}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain(value: Any) -> Any:
    """With lists for tuples, and None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
