"""Teaches the model that ships more, in one of five ways, and scores what it then draws."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from numpy import ndarray
from PIL import Image

import weights
from benchmarks import quality
from benchmarks.machine import machine
from benchmarks.models import panels, subjects
from benchmarks.models.panels import Panel, Row
from ldm import LatentDiffusion, blocks, tasks
from ldm.blocks import SHAPES, Scene, Solid
from ldm.changes import lora
from ldm.cli.metadata import file_hash
from ldm.fast import optimize, pays
from ldm.train import run
from ldm.train.reading import load_recipe
from ldm.train.start import Files
from weights.models import embedded

RECIPES, RESULTS = Path(__file__).parent / "recipes", Path(__file__).parent / "results"
COLUMNS = 8  # pictures beside each other
MARGIN = 4  # pixels of a hole around what it hides
QUICK = ("run.steps=1", "run.batch=2", "run.micro=1")  # a run that only shows that it runs
FILES = Files(
    load=weights.load, load_vae=weights.load_vae, load_vision=weights.load_vision, save=weights.save,
    convert=weights.convert, save_lora=weights.save_lora, save_embedding=weights.save_embedding, embedded=embedded,
    digest=file_hash,
)  # fmt: skip


@dataclass(frozen=True)
class How:
    """With what a demonstration begins, where it keeps what it makes, and how much of it is measured."""

    start: Path  # checkpoint
    runs: Path  # directory of the runs
    pictures: int = 100  # of each kind that is scored
    steps: int = 20  # of DPM++ 2M
    cfg: float = 5.0  # guidance
    sets: tuple[str, ...] = ()  # keys of the recipes to change

    def model(self, path: Path | None = None) -> LatentDiffusion:
        """A model to draw with: the start, or another."""
        return fast(weights.load(path or self.start))

    def draw(self, model: LatentDiffusion, scenes: Sequence[Scene]) -> list[ndarray]:
        """A picture of each scene's canonical caption, of seeds 0, 1, ..."""
        return self.draw_prompts(model, [blocks.canonical(scene) for scene in scenes], 0)

    def draw_prompts(self, model: LatentDiffusion, prompts: Sequence[str], seed: int) -> list[ndarray]:
        """A picture of each prompt, of `seed` and those after it."""
        settings = {"sampler": "dpmpp_2m", "steps": self.steps, "cfg": self.cfg}
        return quality.pictures_of(model, prompts, range(seed, seed + len(prompts)), settings, batch=20)

    def rehearsal(self, name: str, scenes: Sequence[Scene]) -> Path:
        """Prior pictures: a directory of what the start draws of scenes, from seeds that are not scored. Made once."""
        path = self.runs / name
        if not (path / "metadata.jsonl").exists():
            prompts = [blocks.caption(scene, k) for k, scene in enumerate(scenes)]
            pictures = self.draw_prompts(self.model(), prompts, seed=10**6)
            subjects.folder(path, pictures, [[prompt] for prompt in prompts])
        return path


def fast(model: LatentDiffusion) -> LatentDiffusion:
    """The same function in fewer seconds, where that is known."""
    return optimize(model) if pays(model.device, model.dtype) else model


def changes(name: str, how: How, sets: Sequence[str] = ()) -> list[str]:
    """The keys that change a recipe; for a quick run also how many scenes it renders, or prior pictures it has."""
    data = load_recipe(RECIPES / f"{name}.toml", sets).data
    few = ["data.scenes=2"] if data.source == "scenes" else ["data.prior_pictures=2"] if data.prior_pictures else []
    return [*sets, *how.sets, *(few if set(QUICK) <= set(how.sets) else [])]


def train(name: str, how: How, sets: Sequence[str] = (), into: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Train as recipes/`name`.toml says, or go on with an interrupted run. Returns the run's directory and cost."""
    out = how.runs / (into or name)
    keys = [f"model.start={how.start}", f"run.out={out}", *changes(name, how, sets)]
    recipe = load_recipe(RECIPES / f"{name}.toml", keys)
    out.mkdir(parents=True, exist_ok=True)
    with stopwatch(out / "cost.json"):
        ended = run.train(recipe, FILES, device="cpu", say=lambda line: print(line, flush=True))
    minutes = round(json.loads((out / "cost.json").read_text())["cpu_seconds"] / 60, 1)
    cost = {"updates": recipe.run.steps, "batch": recipe.run.batch, "lr": recipe.optimizer.lr}
    return out, {**cost, "core_minutes": minutes, "skipped": ended.fitted.skipped}


def prior_pictures(name: str, how: How) -> int:
    """How many pictures the recipe wants to keep the rest as it is."""
    return load_recipe(RECIPES / f"{name}.toml", changes(name, how)).data.prior_pictures


@contextmanager
def stopwatch(path: Path) -> Iterator[None]:
    """Adds the processor's seconds of the block, of all threads, to those in a file, which counts for the whole run."""
    before = json.loads(path.read_text())["cpu_seconds"] if path.exists() else 0.0
    begun = time.process_time()
    try:
        yield
    finally:
        path.write_text(json.dumps({"cpu_seconds": before + time.process_time() - begun}) + "\n")


Read = Callable[[ndarray], quality.Reading]


def score(right: Sequence[bool]) -> dict[str, Any]:
    """How many of n pictures show all of what they were asked for."""
    return {"n": len(right), "right": sum(right), "share": round(float(np.mean(right)), 4)}


def marks(pictures: Sequence[ndarray], scenes: Sequence[Scene], read: Read = quality.read) -> list[bool]:
    """Whether each picture is entirely right."""
    return [quality.agrees(read(picture), scene)["all"] for picture, scene in zip(pictures, scenes, strict=True)]


def of_nine(picture: ndarray) -> quality.Reading:
    """What a picture shows, where magenta is a colour beside the eight."""
    return quality.read(picture, subjects.COLORS)


def percent(right: Sequence[bool]) -> str:
    return f"{100 * score(right)['share']:.0f} % of {len(right)}"


@dataclass(frozen=True)
class Drawn:
    """What a model makes of scenes of several kinds: of each kind pictures, and which of them are right."""

    asked: Mapping[str, Sequence[Scene]]
    pictures: dict[str, list[ndarray]]
    right: dict[str, list[bool]]

    @classmethod
    def by(cls, how: How, model: LatentDiffusion, asked: Mapping[str, Sequence[Scene]], read: Read) -> Drawn:
        pictures = {kind: how.draw(model, scenes) for kind, scenes in asked.items()}
        return cls(asked, pictures, {kind: marks(pictures[kind], scenes, read) for kind, scenes in asked.items()})

    def figures(self) -> dict[str, Any]:
        return {kind: score(right) for kind, right in self.right.items()}

    def row(self, name: str, kinds: dict[str, tuple[str, int]]) -> Row:
        """The first pictures of each kind beside each other; `kinds` gives each its label, and how many."""
        lines = [f"{label} {percent(self.right[kind])}" for kind, (label, _) in kinds.items()]
        picked = [(kind, k) for kind, (_, n) in kinds.items() for k in range(min(n, len(self.pictures[kind])))]
        return Row(
            "\n".join([name, *lines]),
            [self.pictures[kind][k] for kind, k in picked],
            [self.right[kind][k] for kind, k in picked],
            [blocks.canonical(self.asked[kind][k]) for kind, k in picked],
        )


Result = tuple[dict[str, Any], Panel]  # figures, pictures


def teach_magenta(how: How) -> Result:
    """A LoRA that knows a ninth colour from 20 pictures."""
    lessons = subjects.magenta_lessons(20)
    data = subjects.folder(how.runs / "magenta", map(subjects.render, lessons), subjects.captions(lessons))
    n = prior_pictures("lora", how)
    prior = how.rehearsal("magenta-prior", [blocks.sample(seed) for seed in range(n)])
    out, cost = train("lora", how, [f"data.path={data}", f"data.prior={prior}"])
    file = out / "lora.safetensors"
    taught = weights.load(how.start)
    lora.merge(taught, [(weights.load_lora(file, taught.config), 1.0)])
    known = {blocks.canonical(scene) for scene in lessons}
    few = max(1, how.pictures // 2)
    asked = {
        "alone": [Scene((Solid(SHAPES[k % len(SHAPES)], subjects.MAGENTA),)) for k in range(few)],
        "pairs": subjects.magenta_pairs(few, seed=1, without=known),
        "held_out": blocks.held_out_scenes(how.pictures),
    }
    figures = {"pictures": len(lessons), "prior_pictures": n, "training": cost, "bytes": file.stat().st_size}
    shown = lessons[-COLUMNS:]
    rows = [Row("learnt from", [*map(subjects.render, shown)], captions=[*map(blocks.canonical, shown)])]
    for when, model in (("before", how.model()), ("after", fast(taught))):
        drawn = Drawn.by(how, model, asked, of_nine)
        figures[when] = drawn.figures()
        rows.append(drawn.row(when, {"alone": ("alone", 3), "pairs": ("in pairs", 3), "held_out": ("others", 2)}))
    return figures, Panel("LoRA: a ninth colour from 20 pictures", rows)


def bind_sks(how: How) -> Result:
    """DreamBooth with prior pictures and without: "sks" is one cone, and other cones stay what they were."""
    lessons = subjects.cone_lessons(6)
    data = subjects.folder(how.runs / "cone", map(subjects.render, lessons), [["a sks cone"]] * len(lessons))
    cones = [Scene((Solid("cone", color),)) for color in (*blocks.COLORS, "")]
    n = prior_pictures("dreambooth", how)
    scenes = [cones[k // 3 % len(cones)] if k % 3 == 0 else blocks.sample(k) for k in range(n)]
    prior = how.rehearsal("cone-prior", scenes)
    kept, cost = train("dreambooth", how, [f"data.path={data}", f"data.prior={prior}"])
    batch = f"run.batch={load_recipe(kept / 'recipe.toml').run.micro}"
    none = [f"data.path={data}", "data.prior=", "data.prior_caption=", "data.prior_pictures=0", batch]
    alone, cost_alone = train("dreambooth", how, none, into="dreambooth-alone")
    few, colors = max(1, how.pictures // 2), [*blocks.COLORS]
    asked = {
        "sks": [Scene((Solid("cone", subjects.SKS),))] * few,
        "sks_elsewhere": subjects.cone_pairs(few, seed=1),
        "other_cones": [Scene((Solid("cone", colors[k % len(colors)]),)) for k in range(few)],
        "held_out": blocks.held_out_scenes(how.pictures),
    }
    columns = {
        "sks": ("sks", 2),
        "sks_elsewhere": ("elsewhere", 3),
        "other_cones": ("cones", 2),
        "held_out": ("others", 1),
    }
    training = {"with_prior": cost, "without_prior": cost_alone}
    figures: dict[str, Any] = {"pictures": len(lessons), "prior_pictures": n, "training": training}
    rows = [Row("learnt from", [*map(subjects.render, lessons)], captions=["a sks cone"] * len(lessons))]
    paths = {"start": how.start, "without_prior": alone / "model.safetensors", "with_prior": kept / "model.safetensors"}
    for when, path in paths.items():
        model = how.model(path)
        drawn = Drawn.by(how, model, asked, subjects.read)
        as_sks = marks(how.draw(model, [Scene((Solid("cone", ""),))] * few), asked["sks"], subjects.read)
        figures[when] = drawn.figures() | {"any_cone_is_sks": score(as_sks)}
        rows.append(drawn.row(when.replace("_", " "), columns))
    return figures, Panel("DreamBooth: sks is one particular cone", rows)


def fill_holes(how: How) -> Result:
    """An inpainting model made from the start, beside the start itself, whose result keeps the known region."""
    out, cost = train("inpainting", how)
    scenes = blocks.held_out_scenes(how.pictures)
    whole = [blocks.render(scene) for scene in scenes]
    holes = [hiding(scene, k % 2) for k, scene in enumerate(scenes)]
    captions = [blocks.canonical(scene) for scene in scenes[:COLUMNS]]
    grey = [np.where(hole[..., None], np.uint8(128), picture) for picture, hole in zip(whole, holes, strict=True)]
    figures: dict[str, Any] = {"training": cost}
    rows = [Row("one solid\nis hidden", grey[:COLUMNS], captions=captions)]
    for when, path in (("start", how.start), ("widened", out / "model.safetensors")):
        model = how.model(path)
        painted = []
        for k, scene in enumerate(scenes):
            picture, hole = Image.fromarray(whole[k]), Image.fromarray(holes[k])
            settings: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": how.steps, "cfg": how.cfg}
            painted += tasks.inpaint(model, picture, hole, blocks.canonical(scene), seeds=[k], **settings)
        pictures = [*map(np.asarray, painted)]
        right = marks(pictures, scenes)
        figures[when] = score(right)
        label = f"{'known kept' if when == 'start' else when}\n{percent(right)}"
        rows.append(Row(label, pictures[:COLUMNS], right[:COLUMNS], captions))
    return figures, Panel("Inpainting: widened by mask and masked picture", rows)


def hiding(scene: Scene, which: int) -> ndarray:
    """A mask, uint8 [128, 128] of 0 and 255: a rectangle around one solid and its shadow, MARGIN pixels larger."""

    def without(scene: Scene, rng: np.random.Generator) -> list[blocks.Placed]:
        placed = blocks.layout(scene, rng)
        return placed[:which] + placed[which + 1 :]

    changed = (blocks.render(scene) != blocks.render(scene, build=without)).any(-1)
    rows, cols = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    mask = np.zeros(changed.shape, np.uint8)
    mask[max(0, rows[0] - MARGIN) : rows[-1] + 1 + MARGIN, max(0, cols[0] - MARGIN) : cols[-1] + 1 + MARGIN] = 255
    return mask


def predict_v(how: How) -> Result:
    """The start, taught to predict v."""
    out, cost = train("v", how)
    figures, rows = beside_start(how, {"v": out / "model.safetensors"})
    return {"training": cost} | figures, Panel("v-prediction", rows)


def shrink(how: How) -> Result:
    """A student of half the size beside its teacher."""
    out, cost = train("distill", how)
    figures, rows = beside_start(how, {"student": out / "model.safetensors"})
    for when, path in (("start", how.start), ("student", out / "model.safetensors")):
        model = weights.load(path)
        sizes = {"unet_parameters": model.unet, "parameters": model}
        figures[when] |= {name: sum(p.numel() for p in network.parameters()) for name, network in sizes.items()}
        figures[when]["bytes"] = path.stat().st_size
    return {"training": cost} | figures, Panel("Distillation: a student of half the size", rows)


def beside_start(how: How, others: dict[str, Path]) -> tuple[dict[str, Any], list[Row]]:
    """What the start and other models make of prompts of held-out combinations, from the same seeds."""
    scenes = blocks.held_out_scenes(how.pictures)
    captions = [blocks.canonical(scene) for scene in scenes[:COLUMNS]]
    figures, rows = {}, []
    for when, path in {"start": how.start, **others}.items():
        drawn = how.draw(how.model(path), scenes)
        right = marks(drawn, scenes)
        figures[when] = score(right)
        rows.append(Row(f"{when}\n{percent(right)}", drawn[:COLUMNS], right[:COLUMNS], captions))
    return figures, rows


DEMONSTRATIONS: dict[str, Callable[[How], Result]] = {
    "lora": teach_magenta, "dreambooth": bind_sks, "inpainting": fill_holes, "v": predict_v, "distill": shrink,
}  # fmt: skip


def report(name: str, how: How, out: Path) -> dict[str, Any]:
    """Run one. Its figures go into demonstrations.json beside the others', and all pictures into demonstrations.png."""
    figures, panel = DEMONSTRATIONS[name](how)
    figures |= {"checkpoint": file_hash(how.start), "steps": how.steps, "cfg": how.cfg, "machine": machine()}
    panels.draw(panel).save(how.runs / f"{name}.png")
    out.mkdir(parents=True, exist_ok=True)
    file = out / "demonstrations.json"
    found = (json.loads(file.read_text()) if file.exists() else {}) | {name: figures}
    file.write_text(json.dumps({key: found[key] for key in DEMONSTRATIONS if key in found}, indent=1) + "\n")
    drawn = [path for key in DEMONSTRATIONS if (path := how.runs / f"{key}.png").exists()]
    panels.stacked([Image.open(path) for path in drawn]).save(out / "demonstrations.png")
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """`python benchmarks/demonstrations.py lora`: trains, scores, writes the results, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    runs = "folder of the runs; an interrupted one found there goes on (default: %(default)s)"
    quick = "one update and one picture of each kind, in folders of their own: only to see that it runs"
    parser.add_argument("name", choices=[*DEMONSTRATIONS], help="which")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--runs", type=Path, default=Path("runs/demonstrations"), help=runs)
    parser.add_argument("--model", type=Path, help="checkpoint to begin with (default: the model that ships)")
    parser.add_argument("--pictures", type=int, default=100, help="of each kind that is scored (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe")
    parser.add_argument("--quick", action="store_true", help=quick)
    args = parser.parse_args(argv)
    start, sets = (args.model or embedded()).resolve(), tuple(args.set)
    how = How(start, args.runs, args.pictures, sets=sets)
    if args.quick:
        how = How(start, args.runs.with_name(f"{args.runs.name}-quick"), pictures=1, steps=2, sets=(*sets, *QUICK))
    print(json.dumps(report(args.name, how, args.out or (how.runs if args.quick else RESULTS)), indent=1))


if __name__ == "__main__":
    main()
