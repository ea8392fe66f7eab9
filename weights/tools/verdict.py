"""What two files are to each other, judged by how near their tensors are; every verdict with its evidence."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from weights.names.places import Shape
from weights.tools.closeness import Nearness, Rounding, ratio
from weights.tools.matching import Entry, Side, is_network

# Two networks of one make that were trained apart are as good as orthogonal: |B - A| = sqrt(2) |A| for equal norms. A
# relative difference of d means a cosine of about 1 - d**2 / 2 between them.
TRAINED_FROM = 0.5  # up to here, a cosine above 0.87, B's weights still point where A's do
TRAINED_APART = 1.0  # from here on, a cosine below 0.5, nothing says that one came from the other; between: undecided
# Share of a network's tensors that must have one name and shape in both: an inpainting UNet differs in 1 of 686, SD 2's
# from SD 1's in 64.
SAME_NETWORK = 0.98
# Share of a network's tensors that move when all of it is trained: small steps in float16 leave some norms as they are.
ALL_OF_IT = 0.9
# Of the smaller side of a matrix: a trained difference has nearly full rank, a LoRA's at most that of its factors.
LOW_RANK = 0.5

Kind = Literal[
    # every tensor that both have is the same
    "identical", "converted", "rounded", "pruned", "part", "overlapping", "leftovers",
    "averaged", "swapped", "merge", "lora", "fine-tune", "undecided", "unrelated",
]  # fmt: skip
SAME: tuple[Kind, ...] = ("identical", "converted")  # no number differs, and nothing is missing that anything reads

RENAMED = " under other names"

_TITLES = {
    "unet": "UNet", "vae": "VAE", "vision": "image encoder", "depth": "depth network", "ema": "moving average",
    "other": "tensors",
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A tensor that both files have, in the same shape."""

    name: str
    component: str
    shape: Shape
    dtypes: tuple[str, str]  # A's, B's
    near: Nearness


@dataclass(frozen=True)
class Rank:
    """The numerical rank of the difference of a matrix, and the highest that its sides allow."""

    name: str
    rank: int
    highest: int


@dataclass(frozen=True)
class Weight:
    """Least squares for B = (1 - weight) A + weight C in one component."""

    component: str
    weight: float | None  # None: C is A here
    residual: float  # |B - A - weight (C - A)| / |B - A|
    rounding: float  # the residual that rounding to the stored types leaves on average
    fits: bool


@dataclass(frozen=True)
class Verdict:
    """What B is to A."""

    kind: Kind
    text: str  # one sentence
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What a verdict rests on."""

    a: Side
    b: Side
    shared: Mapping[str, int]  # tensors of the same name and shape in both, by component
    compared: Sequence[Compared]  # those of them that were read
    only: tuple[Mapping[str, Entry], Mapping[str, Entry]]  # in one alone: A's, B's
    reshaped: Mapping[str, Entry]  # in both, in other shapes
    averaged: Literal["a", "b"] | None = None  # whose moving average the other's UNet is
    ranks: Sequence[Rank] = ()
    weights: Sequence[Weight] = ()

    @cached_property
    def common(self) -> set[str]:
        """Components that are in both; where names are ours, networks only."""
        return self.a.components & self.b.components

    @property
    def main(self) -> str | None:
        """The component that decides: the UNet, or else that with most tensors in both."""
        return (
            "unet"
            if "unet" in self.common
            else max(sorted(self.common), key=lambda component: self.shared.get(component, 0), default=None)
        )

    @property
    def moved(self) -> list[Compared]:
        """Tensors of components in both that are not the same, but for rounding."""
        return [one for one in self.compared if not one.near.within and one.component in self.common]

    def inside(self, component: str) -> list[Compared]:
        """The tensors of one component that were compared."""
        return [one for one in self.compared if one.component == component]

    def missing(self, side: int, component: str | None = None) -> int:
        """How many tensors, that no reason explains, one side alone has: of a component, or of all that are in both."""
        wanted = self.common if component is None else {component}
        return sum(entry.component in wanted and not entry.reason for entry in self.only[side].values())


def title(component: str) -> str:
    """A component in words."""
    return f"text tower {component[5:]}" if component.startswith("text.") else _TITLES.get(component, component)


def percent(share: float) -> str:
    """0.0312 -> 3.1 %."""
    return "all" if math.isinf(share) else f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def relative(compared: Iterable[Compared]) -> float:
    """The norm of the difference over the norm of A's, of several tensors taken as one."""
    near = [one.near for one in compared]
    return ratio(math.sqrt(math.fsum(n.distance**2 for n in near)), math.sqrt(math.fsum(n.norm**2 for n in near)))


def low_rank(ranks: Sequence[Rank]) -> bool:
    """Are all of these differences what factors of a LoRA could make?"""
    return bool(ranks) and all(1 <= one.rank <= LOW_RANK * one.highest for one in ranks)


def may_be_lora(moved: Sequence[Compared]) -> bool:
    """Did matrices and kernels of the UNet or the text towers move, and none of their norms, biases and embeddings?"""
    changed = [one for one in moved if one.component != "vae"]
    layers = all(len(one.shape) > 1 and ".embeddings." not in one.name for one in changed)
    return (
        bool(changed)
        and layers
        and all(one.component == "unet" or one.component.startswith("text.") for one in changed)
    )


def judge(facts: Facts) -> Verdict:
    """The verdict: rules are asked one after the other, and the first that has an answer gives it."""
    return next(
        verdict
        for rule in (_structure, _copy, _averaged, _merge, _lora, _swapped, _by_distance)
        if (verdict := rule(facts))
    )


def _structure(facts: Facts) -> Verdict | None:
    """Files that cannot be compared number by number."""
    a, b, main = facts.a, facts.b, facts.main
    titles = f"both are {a.title}" if a.title == b.title else f"A is {a.title}, B is {b.title}"
    if main is None or not any(facts.shared.get(component) for component in facts.common):
        same = f"{sum(facts.shared.values())} tensors have the same name and shape in both"
        same = f"{same}, {len(facts.reshaped)} only the name"
        return Verdict("unrelated", f"A and B have no network in common: {titles}.", (same,))
    shared, named = facts.shared.get(main, 0), sum(entry.component == main for entry in facts.reshaped.values())
    lacking = max(facts.missing(0, main), facts.missing(1, main)) if a.ours else 0  # a LoRA may change any part
    of = shared + named + lacking
    if shared < SAME_NETWORK * of:
        equal = [component for component in sorted(facts.common - {main}) if _all_same(facts, component)]
        same = f"{shared} of {of} tensors of the {title(main)} have the same name and shape in both"
        evidence = (f"{same}, {named} only the name", *(f"their {title(component)} is the same" for component in equal))
        return Verdict("unrelated", f"B is another network than A: {titles}.", evidence)
    return None


def _copy(facts: Facts) -> Verdict | None:
    """Every tensor of the networks in both is the same."""
    if facts.moved:
        return None
    lost = [sorted(one.components - other.components) for one, other in ((facts.a, facts.b), (facts.b, facts.a))]
    missing = [facts.missing(0), facts.missing(1)]
    reshaped = [name for name, entry in facts.reshaped.items() if entry.component in facts.common]
    forward, evidence = _forward(facts), tuple(_evidence(facts))
    if reshaped or all(missing) or all(lost):
        what = [f"{'AB'[side]} alone has {_besides(facts, side)}" for side in (0, 1) if facts.only[side]]
        text = f"What A and B both have is the same{_how(facts, True)}."
        return Verdict("overlapping", text, (*what, *evidence))
    if any(lost):
        whole, part = ("A", "B") if lost[0] else ("B", "A")
        own = ", ".join(title(component) for component in sorted(facts.common))
        text = f"{part} is a part of {whole}: its {own}{_how(facts, part == 'B').removesuffix(RENAMED)}."
        return Verdict("part", text, evidence)
    if any(missing):
        whole, part = ("A", "B") if missing[0] else ("B", "A")
        rest = f"the rest is the same{_how(facts, part == 'B')}"
        text = f"{part} is a part of {whole}: {max(missing)} tensors are missing, {rest}."
        return Verdict("overlapping", text, evidence)
    near = [one for one in facts.compared if one.near.relation == "different" and one.component in facts.common]
    if near:
        text = f"B is A up to rounding{_how(facts, True)}: {len(near)} tensors differ in the last place"
        return Verdict("rounded", f"{text}{_coverage(facts, True)}.", evidence)
    if _rounding(facts):
        kind: Kind = "rounded"
    elif any(entry.component == "ema" or not entry.reason for side in facts.only for entry in side.values()):
        kind = "pruned"
    elif _odd_leftovers(facts):
        kind = "leftovers"
    elif _relaid(facts):
        kind = "converted"
    else:
        kind = "pruned" if facts.only[0] or facts.only[1] else "identical"
    if kind == "identical":
        return Verdict(kind, f"A and B hold the same {sum(facts.shared.values())} tensors, bit by bit.", evidence)
    subject, other = ("B", "A") if forward else ("A", "B")
    exactly = "" if kind == "rounded" else ", bit by bit,"
    text = f"{subject} is {other}{exactly}{_how(facts, forward)}{_coverage(facts, forward)}.".replace(
        ",,", ","
    ).replace(",.", ".")
    return Verdict(kind, text, evidence)


def _averaged(facts: Facts) -> Verdict | None:
    """The UNet of one is the moving average that the other keeps beside its own."""
    if facts.averaged is None:
        return None
    whose, other = ("A", "B") if facts.averaged == "a" else ("B", "A")
    text = f"{other} is {whose} with the moving average as its weights{_beside(facts, 'unet')}."
    return Verdict("averaged", text, tuple(_evidence(facts)))


def _merge(facts: Facts) -> Verdict | None:
    """The main network lies on the line from A to C."""
    main = next((one for one in facts.weights if one.component == facts.main), None)
    if main is None or not main.fits or main.weight is None or all(one.component != facts.main for one in facts.moved):
        return None
    fitting = ((one, one.weight) for one in facts.weights if one is not main and one.fits)
    others = [f"{title(one.component)} {w:.4g}" for one, w in fitting if w is not None and w != main.weight]
    beside = f" ({', '.join(others)})" if others else ""
    odd = [one.component for one in facts.weights if not one.fits]
    apart = f"; not so its {', '.join(map(title, odd))}" if odd else ""
    text = f"B is a merge: {1 - main.weight:.4g} A + {main.weight:.4g} C in its {title(main.component)}{beside}{apart}."
    return Verdict("merge", text, tuple(_evidence(facts)))


def _lora(facts: Facts) -> Verdict | None:
    """What moved is of low rank."""
    if not (facts.a.ours and may_be_lora(facts.moved) and low_rank(facts.ranks)):
        return None
    changed = [one for one in facts.moved if one.component != "vae"]
    highest = max(one.rank for one in facts.ranks)
    where = " and ".join(title(component) for component in dict.fromkeys(one.component for one in changed))
    text = f"B is A with a LoRA of rank about {highest} merged into {len(changed)} weights of its {where}"
    text += f"{_beside(facts, *{one.component for one in changed})}."
    kernels = sum(len(one.shape) > 2 and math.prod(one.shape[2:]) > 1 for one in changed)
    wide = f"{kernels} convolutions did" if kernels else "and no convolution wider than 1x1"
    return Verdict("lora", text, (f"no norm and no bias moved, {wide}", *_evidence(facts)))


def _swapped(facts: Facts) -> Verdict | None:
    """The main network is the same, another one is not."""
    if any(one.component == facts.main for one in facts.moved):
        return None
    return Verdict(
        "swapped", f"B is A{_beside(facts, facts.main).removeprefix(',')}{_how(facts, True)}.", tuple(_evidence(facts))
    )


def _by_distance(facts: Facts) -> Verdict:
    """How far the main network moved, by its matrices, says whether it was trained from the other."""
    main = facts.main
    assert main is not None
    there = facts.inside(main)
    far = relative([one for one in there if len(one.shape) > 1] or there)
    moved = [one for one in there if not one.near.within]
    evidence = tuple(_evidence(facts))
    all_moved = len(moved) >= ALL_OF_IT * len(there)
    share = "all of" if all_moved else f"{len(moved)} of {len(there)} tensors of"
    how = f"{share} its {title(main)} moved, its matrices by {percent(far)}{_beside(facts, main)}"
    if far > TRAINED_APART:
        where = f"the weights of its {title(main)} point elsewhere (its matrices differ by {percent(far)})"
        return Verdict("unrelated", f"B was trained apart from A: {where}.", evidence)
    if far > TRAINED_FROM:
        text = f"B may be trained a long way from A, or merged with something far from it: {how}."
        return Verdict("undecided", text, evidence)
    return Verdict("fine-tune", f"B looks like a fine-tune of A, or A of B: {how}.", evidence)


def _evidence(facts: Facts) -> Iterable[str]:
    """What was measured, in words."""
    for component in sorted(facts.common):
        there = facts.inside(component)
        moved = [one for one in there if one.near.relation == "different"]
        if moved:
            far = percent(relative(there))
            yield f"{title(component)}: {len(moved)} of {len(there)} tensors differ, by {far} of the norm of A's"
    if named := [name for name, entry in facts.reshaped.items() if entry.component in facts.common]:
        shapes = "; ".join(
            f"{name}: {list(facts.a.entries[name].shape)} and {list(facts.b.entries[name].shape)}" for name in named[:2]
        )
        yield f"{len(named)} tensors have another shape ({shapes})"
    if facts.ranks:
        listed = ", ".join(f"{one.rank} of {one.highest} ({one.name})" for one in facts.ranks[:3])
        yield f"rank of the difference: {listed}{', ...' if len(facts.ranks) > 3 else ''}"
    if facts.averaged:
        other = "B" if facts.averaged == "a" else "A"
        yield f"the moving average in {facts.averaged.upper()} is the UNet of {other} in every tensor"
    for one in facts.weights:
        weight = "C is A here" if one.weight is None else f"weight of C {one.weight:.6g}"
        left = f"{percent(one.residual)} of the difference unexplained (rounding: {percent(one.rounding)})"
        yield f"{title(one.component)}: {weight}, {left}"
    if odd := _odd_leftovers(facts):
        yield f"{len(odd)} tensors that no network reads differ ({', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''})"
    if facts.shared and len(facts.compared) < sum(facts.shared.values()):
        yield f"only {len(facts.compared)} of {sum(facts.shared.values())} tensors were compared"


def _how(facts: Facts, forward: bool) -> str:
    """In which type and container B is what A is, or, backwards, A what B is."""
    words = ""
    hows = _rounding(facts)
    for (to, by), _ in Counter((how.to, how.by) for how in hows).most_common(1):
        subject = (by == "b") == forward
        lossless = all(how.lossless for how in hows)
        if subject:
            stored = {one.dtypes[1 if forward else 0] for one in facts.compared if one.near.rounding}
            words += f" in {to}" if to in stored else f" rounded to {to}"
            words += " (nothing was lost)" * lossless
        else:
            words += " in a wider type (nothing was lost)" if lossless else f", whose numbers the other has in {to}"
    mine, theirs = (facts.b, facts.a) if forward else (facts.a, facts.b)
    if mine.container != theirs.container:
        return f"{words} as {mine.container}"
    return words + RENAMED * _relaid(facts)


def _coverage(facts: Facts, forward: bool) -> str:
    """What one has and the other has not."""
    mine, theirs = (1, 0) if forward else (0, 1)
    without = f", without {_besides(facts, theirs)}" if facts.only[theirs] else ""
    return without + (f", with {_besides(facts, mine)} added" if facts.only[mine] else "")


def _besides(facts: Facts, side: int) -> str:
    """What one side alone has, in words."""
    entries = facts.only[side].values()
    networks = Counter(entry.component for entry in entries if is_network(entry.component) and not entry.reason)
    ema = sum(entry.component == "ema" for entry in entries)
    known = sum(bool(entry.reason) and entry.component != "ema" for entry in entries)
    unknown = sum(
        not entry.reason and not is_network(entry.component) and entry.component != "ema" for entry in entries
    )
    words = [f"{count} tensors of the {title(component)}" for component, count in networks.items()]
    words += [f"the moving average ({ema} tensors)"] * bool(ema)
    words += [_counted(n, what) for n, what in ((known, "leftover"), (unknown, "unknown tensor")) if n]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _beside(facts: Facts, *but: str | None) -> str:
    """What else moved."""
    words = ""
    of_c = {
        one.component for one in facts.weights if one.fits and one.weight is not None and f"{one.weight:.4g}" == "1"
    }
    for component in sorted({one.component for one in facts.moved} - {*but}):
        far = relative(facts.inside(component))
        name = title(component)
        moved = f"another {name}" if far > TRAINED_FROM else f"its {name} changed by {percent(far)}"
        words += f", with the {name} of C" if component in of_c else f", with {moved}"
    return words


def _rounding(facts: Facts) -> list[Rounding]:
    """How the tensors of networks in both were rounded, those that are not equal."""
    return [
        one.near.rounding for one in facts.compared if one.component in facts.common and one.near.rounding is not None
    ]


def _forward(facts: Facts) -> bool:
    """Is B the copy, by its rounding or else by what it lacks?"""
    by = Counter(how.by for how in _rounding(facts) if not how.lossless)
    if by:
        return by["b"] >= by["a"]
    return not (facts.only[1] and not facts.only[0])


def _odd_leftovers(facts: Facts) -> list[str]:
    """Tensors in both that differ and belong to no network."""
    return [
        one.name for one in facts.compared if one.near.relation == "different" and one.component not in facts.common
    ]


def _relaid(facts: Facts) -> bool:
    """Does B hold A's tensors under other names, or in a file of another kind?"""
    a, b = facts.a, facts.b
    return a.container != b.container or any(
        a.entries[name].place != b.entries[name].place for name in a.entries.keys() & b.entries.keys()
    )


def _all_same(facts: Facts, component: str) -> bool:
    there = facts.inside(component)
    return bool(there) and all(one.near.within for one in there)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
