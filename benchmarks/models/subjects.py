"""What is taught to the model that ships and was in none of its pictures: a ninth colour, one particular cone."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image

from benchmarks import quality
from ldm import blocks
from ldm.blocks import RELATIONS, SHAPES, SIZES, Placed, Scene, Solid

MAGENTA = "magenta"
COLORS = blocks.COLORS | {MAGENTA: (0.75, 0.10, 0.70)}  # hue 304 degrees, halfway from purple's 275 to pink's 328
SKS = "sks"  # DreamBooth's rare word (Ruiz et al. 2023, section 3.1), here in the place of a colour
BODY, TIP = "blue", "yellow"  # of the particular cone: its lower half and its upper
CUT, WIDER = 0.5, 1.04  # where the tip begins, of the cone's height; how much wider than the body it is there
SAME = 8.0  # pixels within which the tops of both halves are the same
WAYS = 4  # of describing a picture


def folder(path: Path, pictures: Iterable[ndarray], captions: Iterable[Sequence[str]]) -> Path:
    """A directory for `data.path` or `data.prior`: pictures, with the captions of each in metadata.jsonl."""
    path.mkdir(parents=True, exist_ok=True)
    lines = []
    for k, (picture, texts) in enumerate(zip(pictures, captions, strict=True)):
        Image.fromarray(picture).save(path / f"{k:03d}.png")
        lines.append(json.dumps({"file_name": f"{k:03d}.png", "texts": list(texts)}))
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path


def render(scene: Scene) -> ndarray:
    """The picture, uint8 [128, 128, 3], of a scene whose solids may be magenta, or be the particular cone."""
    return blocks.render(scene, colors=COLORS, build=built)


def built(scene: Scene, rng: np.random.Generator) -> list[Placed]:
    """Where everything stands; the particular cone is a cone with another, wider one over its tip."""
    placed = []
    for solid in blocks.layout(scene, rng):
        if solid.color != SKS:
            placed.append(solid)
            continue
        base = solid.base + np.array([0.0, CUT * solid.height, 0.0])
        tip = replace(solid, color=TIP, base=base, scale=WIDER * (1 - CUT) * solid.scale)
        placed += [replace(solid, color=BODY), tip]
    return placed


def magenta_lessons(n: int) -> list[Scene]:
    """`n` scenes to learn magenta from: every shape in both sizes alone, then pairs."""
    alone = [Scene((Solid(shape, MAGENTA, size),), (), k) for k, (shape, size) in enumerate(product(SHAPES, SIZES))]
    return [*alone, *magenta_pairs(max(0, n - len(alone)), seed=0)][:n]


def magenta_pairs(n: int, seed: int, without: Container[str] = ()) -> list[Scene]:
    """`n` scenes of a magenta solid and another, no two with the same canonical caption, none with one in `without`."""
    rng = np.random.default_rng([seed, 4])
    found: dict[str, Scene] = {}
    while len(found) < n:
        pair = [Solid(_one(rng, SHAPES), color, _one(rng, SIZES)) for color in (MAGENTA, _one(rng, blocks.COLORS))]
        scene = Scene(tuple(pair[i] for i in rng.permutation(2)), (_one(rng, RELATIONS),), int(rng.integers(2**31)))
        if blocks.canonical(scene) not in without:
            found.setdefault(blocks.canonical(scene), scene)
    return list(found.values())


def captions(scenes: Sequence[Scene]) -> list[list[str]]:
    """Some ways to say what each scene shows."""
    return [[blocks.caption(scene, WAYS * k + way) for way in range(WAYS)] for k, scene in enumerate(scenes)]


def _one(rng: np.random.Generator, choices: Iterable[str]) -> str:
    return str(rng.choice(list(choices)))


def cone_lessons(n: int) -> list[Scene]:
    """`n` scenes of the particular cone alone, always large, standing elsewhere in each."""
    return [Scene((Solid("cone", SKS),), (), k) for k in range(n)]


def cone_pairs(n: int, seed: int) -> list[Scene]:
    """`n` scenes of the particular cone and another solid, of a colour that it has not."""
    rng = np.random.default_rng([seed, 5])
    colors = [color for color in blocks.COLORS if color not in (BODY, TIP)]
    found: dict[str, Scene] = {}
    while len(found) < n:
        pair = [Solid("cone", SKS), Solid(_one(rng, SHAPES), _one(rng, colors), _one(rng, SIZES))]
        relation = _one(rng, RELATIONS)
        order = (0, 1) if relation == "on top of" or rng.random() < 0.5 else (1, 0)  # nothing stands on the tip
        scene = Scene(tuple(pair[i] for i in order), (relation,), int(rng.integers(2**31)))
        found.setdefault(blocks.canonical(scene), scene)
    return list(found.values())


def read(picture: ndarray) -> quality.Reading:
    """The solids of a picture. A blue and a yellow cone with the same top are the particular cone, of colour "sks"."""
    solids = list(quality.read(picture).solids)
    bodies, tips = ([each for each in solids if (each.color, each.shape) == (color, "cone")] for color in (BODY, TIP))
    for body in bodies:
        for tip in tips:
            if np.hypot(body.top[0] - tip.top[0], body.top[1] - tip.top[1]) < SAME:
                solids = [each for each in solids if each not in (body, tip)]
                solids.append(replace(body, color=SKS, top=tip.top, misfit=max(body.misfit, tip.misfit)))
                break
    return quality.Reading(tuple(solids))
