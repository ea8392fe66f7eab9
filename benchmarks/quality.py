"""Scores a model that draws `ldm.blocks` on combinations that training never showed, by reading its pictures."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray
from PIL import Image, ImageDraw

from ldm import blocks
from ldm.blocks import COLORS, SHAPES, Placed, Scene

if TYPE_CHECKING:  # the scorer alone needs no torch
    from ldm import LatentDiffusion

CHROMA = 0.15  # max - min of RGB in [0, 1] from which on a pixel is of a solid; floor, wall, shadow stay below 0.07
SPECK = 20  # pixels, after erosion: fewer are an edge or a speck, not a solid
SEAM = 30  # pixels, after two erosions, that a solid between others keeps
MISFIT = 0.20  # cost of the best fit from which on a shape is none of the four; blurred true ones stay below 0.18
GRID = 30  # samples along one side of a template
PAD = 0.12  # a template reaches this much of its box beyond the box
HIDDEN = 0.1  # of the part of a shape that something else must hide, against the same part being wrong
WEIGHT = 2.0  # of a difference in brightness against a difference in outline

Colors = Mapping[str, blocks.RGB]


@dataclass(frozen=True)
class Found:
    """A solid as read from a picture. Positions are (row, column) in pixels."""

    color: str
    shape: str | None  # None: like none of the four
    base: tuple[float, float]  # middle of its bottom
    top: tuple[float, float]  # middle of its top, or its apex
    misfit: float  # 0: exactly as rendered


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    solids: tuple[Found, ...]

    def relation(self, a: int, b: int) -> str | None:
        """How solid a stands to solid b, one of RELATIONS; None if not clearly any of them."""
        first, second = self.solids[a], self.solids[b]
        if np.hypot(first.base[0] - second.top[0], first.base[1] - second.top[1]) < 8.0:
            return "on top of"
        (ax, az), (bx, bz) = blocks.on_floor(*first.base), blocks.on_floor(*second.base)
        across, away = ax - bx, az - bz
        if abs(across) > 1.15 * abs(away) and abs(across) > 0.35:
            return "to the left of" if across < 0 else "to the right of"
        if abs(away) > 1.15 * abs(across) and abs(away) > 0.6:
            return "in front of" if away < 0 else "behind"
        return None


# ---- colours ---------------------------------------------------------------------------------------------------------


def _hue(rgb: ndarray) -> ndarray:
    """The hue in degrees of rgb [..., 3]."""
    r, g, b = np.moveaxis(rgb, -1, 0)
    return np.rad2deg(np.arctan2(np.sqrt(3.0) * (g - b), 2 * r - g - b))


def _eroded(mask: ndarray) -> ndarray:
    m = np.pad(mask, 1)
    m = m[:-2] & m[1:-1] & m[2:]
    return m[:, :-2] & m[:, 1:-1] & m[:, 2:]


def _dilated(mask: ndarray) -> ndarray:
    m = np.pad(mask, 1)
    m = m[:-2] | m[1:-1] | m[2:]
    return m[:, :-2] | m[:, 1:-1] | m[:, 2:]


def _components(mask: ndarray) -> list[ndarray]:
    """The connected parts of a mask [h, w], largest first."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        m = np.pad(label, 1)
        grown = np.maximum.reduce([label, m[:-2, 1:-1], m[2:, 1:-1], m[1:-1, :-2], m[1:-1, 2:]]) * mask
        if (grown == label).all():
            break
        label = grown
    numbers, sizes = np.unique(label[label > 0], return_counts=True)
    return [label == numbers[i] for i in np.argsort(-sizes)]


def _regions(rgb: ndarray, colors: Colors) -> list[tuple[str, ndarray]]:
    """The solids' colours and visible pixels [h, w] in a picture [h, w, 3] in [0, 1]."""
    names = tuple(colors)
    chroma = rgb.max(-1) - rgb.min(-1)
    solid = chroma > CHROMA
    apart = np.abs((_hue(rgb)[..., None] - _hue(np.array(list(colors.values()))) + 180) % 360 - 180)
    nearest = apart.argmin(-1)
    present = []
    for k in range(len(names)):
        mask = solid & (nearest == k)
        if _eroded(mask).sum() < SPECK:
            continue
        around = _dilated(mask) & ~mask
        beside = np.bincount(nearest[around & solid], minlength=1)
        highlight = beside.max() > 0.8 * around.sum()  # inside one other colour
        seam = beside.sum() > 0.5 * around.sum() and _eroded(_eroded(mask)).sum() < SEAM  # thin, where two others mix
        if not highlight and not seam:
            present.append(k)
    if not present:
        return []
    nearest = np.array(present)[apart[..., present].argmin(-1)]  # the colours of blurred edges go to their neighbours
    regions = []
    for k in present:
        mask = solid & (nearest == k)
        others = _dilated(_dilated(solid & (nearest != k)))
        parts = [part for part in _components(mask) if _eroded(part).sum() >= SPECK]
        if not parts:
            continue
        main = parts[0]
        for part in parts[1:]:
            if (others & part).any():  # cut off by what stands before it
                main = main | part
            else:
                regions.append((names[k], part))
        regions.append((names[k], main))
    return regions


# ---- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Templates:
    """Every shape as seen in one part of the picture; boxes are the tight ones around the outline."""

    shape: ndarray  # [n] index into SHAPES
    aspect: ndarray  # [n] width / height of the box
    outline: ndarray  # [n, GRID, GRID] coverage
    bright: ndarray  # [n, GRID, GRID] brightness, 1 = the colour itself
    base: ndarray  # [n, 2] row and column in units of the box
    top: ndarray  # [n, 2]


def _extent(mask: ndarray) -> tuple[int, int, int, int]:
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1


def _blur(x: ndarray) -> ndarray:
    """A binomial blur of x [h, w] over 3 x 3 cells: a difference of half a cell in an outline then costs little."""
    x = np.pad(x.astype(np.float32), 1)
    x = (x[:-2] + 2 * x[1:-1] + x[2:]) / 4
    return (x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]) / 4


def _sample(image: ndarray, rows: ndarray, cols: ndarray, outside: float = 0.0) -> ndarray:
    h, w = image.shape
    inside = (rows >= 0) & (rows < h) & (cols >= 0) & (cols < w)
    near = np.clip(rows, 0, h - 1).astype(int), np.clip(cols, 0, w - 1).astype(int)
    return np.where(inside, image[near], np.float32(outside))


_STEPS = (np.arange(GRID) + 0.5) / GRID * (1 + 2 * PAD) - PAD
_WINDOW_ROWS, _WINDOW_COLS = (16.0, 38.0, 60.0, 82.0, 104.0), (32.0, 64.0, 96.0)


@lru_cache(maxsize=32)
def _templates(row: float, col: float) -> _Templates:
    """The shapes as the camera sees them around this place of a picture of 128 pixels."""
    size, scale, light = 512, 0.5, blocks.light_from()  # small enough to lie inside the picture
    found: list[tuple] = []
    for k, shape in enumerate(SHAPES):
        for turn in np.deg2rad((22.0, 29.0, 36.0, 43.0, 50.0)) if shape == "cube" else (0.0,):
            x, z = blocks.on_floor(112.0, col)
            base = np.array([x, 0.0, z])
            height = np.array([0.0, Placed(shape, "pink", base, scale, 0.0).height, 0.0])
            for _ in range(3):  # raise it until its middle appears at the wanted row
                low = blocks.project((base + height / 2)[None])[0][0] - row
                base[1] += low / blocks.PIXELS_PER_UNIT
            placed = Placed(shape, "pink", base, scale, float(turn))
            picture = blocks.paint([placed], light, size)
            top, bottom, left, right = _extent(picture[..., 3] > 0.5)
            h, w = bottom - top, right - left
            rows, cols = np.meshgrid(top + _STEPS * h, left + _STEPS * w, indexing="ij")
            bright = _brightness(picture[..., :3], np.array(COLORS["pink"]))
            down, across = blocks.project(np.stack((base, base + height)), size)
            ends = np.stack(((down - top) / h, (across - left) / w), -1)
            outline = _blur(_sample(picture[..., 3], rows, cols))
            found.append((k, w / h, outline, _sample(bright, rows, cols), ends[0], ends[1]))
    return _Templates(*(np.stack(part) for part in zip(*found, strict=True)))


def _brightness(rgb: ndarray, color: ndarray) -> ndarray:
    return rgb @ color / (color @ color)


def _boxes(aspect: ndarray, mask: ndarray, hidden: bool) -> tuple[ndarray, ndarray]:
    """Where the whole solid may be: [k] template numbers; [k, 4] top, left, height, width in pixels."""
    top, bottom, left, right = _extent(mask)
    h, w = bottom - top, right - left
    which, boxes = [], []
    for i, a in enumerate(aspect):
        low, high = min(h, w / a), max(h, w / a)
        if not hidden:
            heights = np.linspace(max(low, 0.9 * high), high, 4)
            places = [((top + bottom - heights) / 2, (left + right - heights * a) / 2)]
        else:
            heights = np.geomspace(0.97 * high, max(1.9 * high, 24), 16)
            down = (np.full_like(heights, top), bottom - heights)
            across = (np.full_like(heights, left), right - heights * a, (left + right - heights * a) / 2)
            places = [(y, x) for y in down for x in across]
        for y, x in places:
            boxes.append(np.stack((y, x, heights, heights * a), -1))
            which.append(np.full(len(heights), i))
    return np.concatenate(which), np.concatenate(boxes)


def _cost(
    own: ndarray, known: ndarray, bright: ndarray, bank: _Templates, which: ndarray, boxes: ndarray
) -> tuple[ndarray, ndarray]:
    """How badly templates in boxes [k, 4] explain what is seen, [k]; and which share of each must be hidden, [k].

    own [h, w] is 1 on the solid, known [h, w] 0 where it may be hidden, bright [h, w] 1 where it has its own colour.
    """
    y, x, h, w = (part[:, None] for part in boxes.T)
    rows, cols = (y + h * _STEPS)[:, :, None], (x + w * _STEPS)[:, None, :]
    own, known, bright = (_sample(image, rows, cols, outside) for image, outside in ((own, 0), (known, 1), (bright, 0)))
    outline, expected = bank.outline[which], bank.bright[which]
    wrong = (known * (own - outline) ** 2).sum((1, 2)) / np.maximum((known * outline).sum((1, 2)), 1)
    both = (own > 0.7) & (outline > 0.7) & (known > 0)
    count = np.maximum(both.sum((1, 2)), 1)
    gain = ((bright * both).sum((1, 2)) / (expected * both).sum((1, 2)).clip(1e-6)).clip(0.5, 2.0)
    shade = (np.abs(bright / gain[:, None, None] - expected) * both).sum((1, 2)) / count
    hidden = ((1 - known) * outline).sum((1, 2)) / outline.sum((1, 2))
    return wrong + WEIGHT * shade, hidden


def _fit(rgb: ndarray, color: str, mask: ndarray, others: ndarray, colors: Colors) -> Found:
    """The shape whose outline and shading fit best; behind `others` [h, w] it may go on."""
    # Thin seams are in doubt: two colours mixed may look like a third, or like none.
    doubtful = mask & ~_dilated(_eroded(mask)) & _dilated(_dilated(others))
    mask = mask & ~doubtful
    top, bottom, left, right = _extent(mask)
    row = min(_WINDOW_ROWS, key=lambda r: abs(r - (top + bottom) / 2))
    col = min(_WINDOW_COLS, key=lambda c: abs(c - (left + right) / 2))
    bank = _templates(row, col)
    near = _dilated(mask) & others
    which, boxes = _boxes(bank.aspect, mask, bool(near.any()))
    between = _dilated(mask) & _dilated(others)
    own = _blur(mask)
    known = mask | ~(others | between | doubtful)
    bright = _brightness(rgb, np.array(colors[color]))
    cost, hidden = _cost(own, known, bright, bank, which, boxes)
    if near.any():  # look closer around the best
        few = np.argsort(cost + HIDDEN * hidden)[:12]
        nudges = np.array([(y, x, h) for y in (-0.02, 0, 0.02) for x in (-0.02, 0, 0.02) for h in (-0.03, 0, 0.03)])
        which, boxes = np.repeat(which[few], len(nudges)), np.repeat(boxes[few], len(nudges), 0)
        nudges = np.tile(nudges, (len(few), 1))
        place, size, grow = boxes[:, :2], boxes[:, 2:], nudges[:, 2:]
        boxes = np.concatenate((place + (nudges[:, :2] - grow / 2) * size, size * (1 + grow)), 1)
        cost, hidden = _cost(own, known, bright, bank, which, boxes)
    best = int((cost + HIDDEN * hidden).argmin())
    box, i = boxes[best], which[best]
    (y, x), (top_y, top_x) = ((box[:2] + ends[i] * box[2:]).tolist() for ends in (bank.base, bank.top))
    shape = SHAPES[bank.shape[i]] if cost[best] < MISFIT else None
    return Found(color, shape, (y, x), (top_y, top_x), float(cost[best]))


def read(picture: ndarray, colors: Colors = COLORS) -> Reading:
    """The solids that a picture, uint8 [128, 128, 3], shows; each is of the nearest of `colors`."""
    rgb = picture.astype(np.float32) / 255
    regions = _regions(rgb, colors)
    solids = []
    for k, (color, mask) in enumerate(regions):
        others = np.any([np.zeros_like(mask), *(other for j, (_, other) in enumerate(regions) if j != k)], axis=0)
        solids.append(_fit(rgb, color, mask, others, colors))
    return Reading(tuple(solids))


def right(picture: ndarray, scene: Scene) -> dict[str, bool]:
    """Whether a picture, uint8 [128, 128, 3], shows the scene: `agrees` with what is read from it."""
    return agrees(read(picture), scene)


def agrees(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Whether a reading is of the scene: its colours and no others; then its solids, its relations; all of these."""
    # Sizes do not count: canonical captions do not tell them.
    colors = [solid.color for solid in reading.solids]
    wanted = [solid.color for solid in scene.solids]
    result = {"colours": sorted(colors) == sorted(wanted), "solids": False, "relation": False}
    if result["colours"]:
        place = [colors.index(color) for color in wanted]
        shapes = [reading.solids[k].shape for k in place]
        result["solids"] = shapes == [solid.shape for solid in scene.solids]
        asserted = [(0, scene.relations[0], 1)] if len(wanted) > 1 else []
        if len(wanted) > 2:
            asserted.append((2, scene.relations[1], 1))
            if scene.relations[0] != "on top of":  # what stands on top has no place on the floor to compare
                asserted.append((2, scene.relations[1], 0))
        result["relation"] = all(reading.relation(place[a], place[b]) == relation for a, relation, b in asserted)
    result["all"] = all(result.values())
    return result


# ---- the model -------------------------------------------------------------------------------------------------------

SHOWCASE = blocks.Scene((blocks.Solid("cube", "red"), blocks.Solid("sphere", "blue")), ("on top of",))
PARTS = ("colours", "solids", "relation", "all")


def pictures_of(
    model: LatentDiffusion, prompts: Sequence[str], seeds: Sequence[int], settings: dict[str, Any], batch: int
) -> list[ndarray]:
    """A picture, uint8 [128, 128, 3], of each prompt. Picture k depends on prompt k and seed k alone."""
    from ldm.tasks import txt2img

    pictures: list[ndarray] = []
    for k in range(0, len(prompts), batch):
        part = slice(k, k + batch)
        made = txt2img(model, list(prompts[part]), seeds=list(seeds[part]), width=128, height=128, **settings)
        pictures += [np.asarray(picture.convert("RGB")) for picture in made]
        if sys.stderr.isatty():
            end = "\n" if len(pictures) == len(prompts) else ""
            print(f"\r{len(pictures)}/{len(prompts)} pictures", end=end, file=sys.stderr)
    return pictures


def psnr(a: ndarray, b: ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, dB."""
    return float(10 * np.log10(255**2 / max(np.square(a.astype(np.float64) - b).mean(), 1e-10)))


def vae_psnr(model: LatentDiffusion, scenes: Iterable[Scene]) -> tuple[list[float], list[ndarray]]:
    """What the VAE alone loses: the PSNR in dB of each scene's picture, encoded (to the mean) and decoded."""
    import torch

    values, pictures = [], []
    for scene in scenes:
        true = blocks.render(scene)
        image = torch.from_numpy(true).permute(2, 0, 1)[None].to(model.device, model.dtype) / 127.5 - 1
        with torch.no_grad():
            back = model.vae.decode(model.vae.encode(image))[0].float().cpu()
        pictures.append(((back.permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy())
        values.append(psnr(true, pictures[-1]))
    return values, pictures


def sheet(
    pictures: Sequence[ndarray], captions: Sequence[str], marks: Sequence[bool], columns: int = 10
) -> Image.Image:
    """All pictures on one, each with its caption and a green tick or a red cross."""
    side, text = 128, 34
    rows = -(-len(pictures) // columns)
    out = Image.new("RGB", (columns * (side + 8) + 8, rows * (side + text + 8) + 8), "white")
    draw = ImageDraw.Draw(out)
    for k, (picture, caption, mark) in enumerate(zip(pictures, captions, marks, strict=True)):
        x, y = 8 + k % columns * (side + 8), 8 + k // columns * (side + text + 8)
        out.paste(Image.fromarray(picture), (x, y))
        draw.multiline_text((x + 16, y + side + 2), textwrap.fill(caption, 21), fill="black", font_size=10, spacing=1)
        left, middle = x + 1, y + side + 9
        if mark:
            draw.line([(left, middle), (left + 4, middle + 5), (left + 11, middle - 5)], fill=(0, 140, 40), width=3)
        else:
            draw.line([(left, middle - 5), (left + 10, middle + 5)], fill=(200, 0, 0), width=3)
            draw.line([(left, middle + 5), (left + 10, middle - 5)], fill=(200, 0, 0), width=3)
    return out


def _rates(results: Sequence[dict[str, bool]]) -> dict[str, float]:
    return {part: round(float(np.mean([result[part] for result in results])), 4) for part in PARTS}


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Makes and scores the pictures, writes the results into `args.out`, and returns the figures."""
    import torch

    import weights

    model = weights.load(args.ckpt, device=args.device)
    settings = {"sampler": args.sampler, "grid": args.grid, "steps": args.steps, "cfg": args.cfg}
    scenes = blocks.held_out_scenes(args.n, args.seed)
    captions = [blocks.canonical(scene) for scene in scenes]
    begun = time.perf_counter()
    pictures = pictures_of(model, captions, range(args.seed, args.seed + args.n), settings, args.batch)
    seconds = time.perf_counter() - begun
    results = [*map(right, pictures, scenes)]
    of = {
        each: [r for r, s in zip(results, scenes, strict=True) if s.relations[0] == each] for each in blocks.RELATIONS
    }
    by_relation = {relation: _rates(found)["all"] for relation, found in of.items() if found}
    wish = blocks.canonical(SHOWCASE)
    show = pictures_of(model, [wish] * args.showcase, range(args.seed, args.seed + args.showcase), settings, args.batch)
    shown = [right(picture, SHOWCASE) for picture in show]
    values, decoded = vae_psnr(model, scenes)

    args.out.mkdir(parents=True, exist_ok=True)
    sheet(pictures, captions, [r["all"] for r in results]).save(args.out / "quality.png")
    sheet(show, [wish] * len(show), [r["all"] for r in shown], columns=4).save(args.out / "showcase.png")
    vae = {"psnr_db_mean": round(float(np.mean(values)), 2), "psnr_db_lowest": round(min(values), 2)}
    on_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    here = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    made = []
    for k, (caption, result, picture) in enumerate(zip(captions, results, pictures, strict=True)):
        solids = [asdict(found) for found in read(picture).solids]
        made.append({"prompt": caption, "seed": args.seed + k, **result, "read": solids})
    kind = "canonical captions of held-out combinations of two solids"
    figures = {
        "model": Path(args.ckpt).name if args.ckpt else "the model that ships",
        "prompts": {"n": args.n, "kind": kind, "seed": args.seed}, "settings": settings,
        "right": _rates(results), "right_by_relation": by_relation,
        "showcase": {"prompt": wish, "n": args.showcase, "right": _rates(shown)},
        "vae": {**vae, "right_after_decoding": _rates([*map(right, decoded, scenes)])},
        "seconds_per_picture": round(seconds / args.n, 3), "machine": {**here, "python": platform.python_version()},
        "pictures": made,
    }  # fmt: skip
    (args.out / "quality.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """`python benchmarks/quality.py`: writes quality.json, quality.png and showcase.png, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    results = Path(__file__).parent / "results"
    parser.add_argument("--ckpt", help="checkpoint to score (default: the model that ships)")
    parser.add_argument("--n", type=int, default=200, help="prompts (default: %(default)s)")
    parser.add_argument("--showcase", type=int, default=16, help="pictures of its prompt (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument("--sampler", default="dpmpp_2m", help="(default: %(default)s)")
    parser.add_argument("--grid", help="(default: the sampler's)")
    parser.add_argument("--cfg", type=float, default=5.0, help="guidance scale (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and first picture (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=20, help="pictures made together (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=results, help="folder (default: benchmarks/results)")
    figures = report(parser.parse_args(argv))
    print(json.dumps({key: value for key, value in figures.items() if key != "pictures"}, indent=1))


if __name__ == "__main__":
    main()
