"""Scenes of simple solids: which of them exist, which of them training never shows, and their captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

RGB = tuple[float, float, float]

SHAPES = ("cube", "sphere", "cylinder", "cone")
COLORS = {  # RGB in [0, 1], spread over the hue circle so that shading, which keeps the hue, cannot confuse two of them
    "red": (0.86, 0.12, 0.12), "green": (0.14, 0.62, 0.20), "blue": (0.14, 0.28, 0.88), "yellow": (0.96, 0.85, 0.12),
    "purple": (0.52, 0.16, 0.78), "cyan": (0.14, 0.80, 0.86), "orange": (0.98, 0.50, 0.08), "pink": (0.98, 0.46, 0.74),
}  # fmt: skip
SIZES = {"small": 0.74, "large": 1.0}
RELATIONS = ("on top of", "to the left of", "to the right of", "in front of", "behind")
INVERSE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "in front of": "behind",
    "behind": "in front of",
}


@dataclass(frozen=True)
class Solid:
    """One thing in a scene."""

    shape: str  # of SHAPES
    color: str  # of COLORS
    size: str = "large"  # of SIZES


@dataclass(frozen=True)
class Scene:
    """The solids of a picture. `relations[0]` relates solid 0 to solid 1, `relations[1]` solid 2 to both."""

    solids: tuple[Solid, ...]  # one to three, all of different colours
    relations: tuple[str, ...] = ()  # of RELATIONS; one fewer than solids
    seed: int = 0  # of everything that no caption mentions: exact places, turns, light, tints

    def pairs(self) -> Iterator[tuple[Solid, str, Solid]]:
        """Every (solid, relation, solid) that the scene asserts."""
        if len(self.solids) > 1:
            yield self.solids[0], self.relations[0], self.solids[1]
        if len(self.solids) > 2:
            yield self.solids[2], self.relations[1], self.solids[0]
            yield self.solids[2], self.relations[1], self.solids[1]


def _pair_held_out(a: Solid, relation: str, b: Solid) -> bool:
    if relation in ("to the right of", "behind"):  # the same picture as the inverse relation with a and b exchanged
        a, relation, b = b, INVERSE[relation], a
    color, shape = list(COLORS).index, SHAPES.index
    of_pair = 3 * color(a.color) + 5 * shape(a.shape) + 7 * color(b.color) + 2 * shape(b.shape)
    return (of_pair + 4 * RELATIONS.index(relation)) % 13 == 3  # "a red cube on top of a blue sphere" is 16


def held_out(scene: Scene) -> bool:
    """Whether training never shows this scene: it holds one of a fixed thirteenth of all combinations of two solids."""
    return any(_pair_held_out(*pair) for pair in scene.pairs())


def _draw(rng: np.random.Generator, n: int) -> Scene:
    colors = rng.permutation(list(COLORS))[:n]
    solids = tuple(
        Solid(str(rng.choice(SHAPES)), str(color), "large" if rng.random() < 0.6 else "small") for color in colors
    )
    relations: tuple[str, ...] = ()
    if n > 1:
        relations = (str(rng.choice(RELATIONS, p=(0.28, 0.18, 0.18, 0.18, 0.18))),)
    if n > 2:
        first = str(rng.choice(RELATIONS[:3], p=(0.5, 0.25, 0.25)))
        relations = (first, str(rng.choice(RELATIONS[1:] if first == "on top of" else RELATIONS[1:3])))
    return Scene(solids, relations, int(rng.integers(2**31)))


def sample(seed: int, held_out: bool = False) -> Scene:
    """Scene number `seed`: one to three solids in training combinations, or two in a held-out one."""
    rng = np.random.default_rng([seed, held_out])
    n = 2 if held_out else int(rng.choice((1, 2, 3), p=(0.2, 0.6, 0.2)))
    while True:
        scene = _draw(rng, n)
        if any(_pair_held_out(*pair) for pair in scene.pairs()) == held_out:
            return scene


def held_out_scenes(n: int, seed: int = 0) -> list[Scene]:
    """`n` scenes of two solids whose combinations training never shows, each with another canonical caption."""
    scenes: dict[str, Scene] = {}
    for number in count(seed * 1_000_003):
        if len(scenes) == n:
            return list(scenes.values())
        scene = sample(number, held_out=True)
        scenes.setdefault(canonical(scene), scene)
    raise AssertionError("unreachable")


_PREFIXES = ("", "", "a photo of ", "a picture of ", "an image of ", "a rendering of ")
_RELATION_WORDS = {
    "on top of": ("on top of", "on", "sitting on", "resting on top of", "standing on"),
    "to the left of": ("to the left of", "left of", "on the left of", "at the left of"),
    "to the right of": ("to the right of", "right of", "on the right of", "at the right of"),
    "in front of": ("in front of", "standing in front of", "placed in front of"),
    "behind": ("behind", "standing behind", "placed behind"),
    "under": ("under", "below", "beneath", "underneath"),
}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _named(solid: Solid, size: str = "") -> str:
    return _with_article(f"{size} {solid.color} {solid.shape}".strip())


def canonical(scene: Scene) -> str:
    """The plain caption, without sizes: "a red cube on top of a blue sphere, and a green cone to the left of them"."""
    names = [_named(solid) for solid in scene.solids]
    pair = f" {scene.relations[0]} {names[1]}" if len(names) > 1 else ""
    third = f", and {names[2]} {scene.relations[1]} them" if len(names) > 2 else ""
    return names[0] + pair + third


def caption(scene: Scene, seed: int) -> str:
    """One of many captions: half the time the canonical one. Sizes are sometimes mentioned, and then true."""
    rng = np.random.default_rng([seed, 2])
    if rng.random() < 0.5:
        return canonical(scene)

    def choose(options: tuple[str, ...]) -> str:
        return options[int(rng.integers(len(options)))]

    sizes = rng.random() < 0.7
    names = [_named(s, choose(_SIZE_WORDS[s.size]) if sizes and rng.random() < 0.7 else "") for s in scene.solids]
    prefix = choose(_PREFIXES)
    if not prefix and rng.random() < 0.3:  # telegram style: "red cube, left of a green cone"
        names[0] = names[0].split(" ", 1)[1] + ("," if len(names) > 1 and rng.random() < 0.5 else "")
    text = names[0]
    if len(names) > 1:
        relation, (a, b) = scene.relations[0], names[:2]
        if rng.random() < 0.6:
            text = f"{a} {choose(_RELATION_WORDS[relation])} {b}"
        else:  # from the other end
            a = a.rstrip(",")
            a = a if a.startswith(("a ", "an ")) else _with_article(a)
            if relation != "on top of":
                text = f"{b} {choose(_RELATION_WORDS[INVERSE[relation]])} {a}"
            elif rng.random() < 0.5:
                text = f"{b} with {a} on top of it"
            else:
                text = f"{b} {choose(_RELATION_WORDS['under'])} {a}"
    if len(names) > 2:
        relation = scene.relations[1]
        joint = choose((", and ", " and ", ", with "))
        if relation in ("to the left of", "to the right of") and rng.random() < 0.3:
            text += f"{joint}{names[2]} to their {relation.split()[2]}"
        else:
            text += f"{joint}{names[2]} {relation} them"
    return prefix + text
