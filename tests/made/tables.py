"""The tables of figures in the README files, made from benchmarks/results/*.json.

`python -m tests.made.tables` writes those tables anew in every README.md that has a mark for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ldm.train.reading import load_recipe, names

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"<!-- table: (\w+) -->\n(?:(?!<!--).*\n)*<!-- end of table -->")
SIDES = {"ldm": "ldm, readable", "fast": "ldm, fast", "diffusers": "diffusers", "openvino": "OpenVINO"}


def results(name: str) -> dict[str, Any]:
    """What a benchmark left in benchmarks/results/."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def rows_of(name: str, **wanted: object) -> list[dict[str, Any]]:
    """The rows of a result whose fields are as wanted."""
    return [row for row in results(name)["rows"] if all(row.get(key) == value for key, value in wanted.items())]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def three(value: float) -> str:
    """Three digits: 11.5, 0.205, 120."""
    return f"{value:#.3g}".rstrip(".")


def percent(share: float, digits: int = 0) -> str:
    """0.945 -> 94.5 %."""
    return f"{100 * share:.{digits}f} %"


def small(value: float) -> str:
    """1.3484e-05 -> 1.3e-5; 0 -> 0."""
    return re.sub(r"e([-+])0", r"e\1", f"{value:.1e}") if value else "0"


# --- parity ---------------------------------------------------------------------------------------------------------


def parity() -> str:
    """The worst of every kind of comparison with the original code, and with diffusers and transformers."""
    rows = results("parity")["rows"]
    kinds = {
        "tiny UNets of SD 1, SD 2, depth, x4, SDXL, SSD-1B": ["unet"],
        "VAEs, factor 8 and 4": ["vae"],
        "CLIP and OpenCLIP text towers; 770 ids of tokens": ["text"],
        "CLIP vision tower; safety checker, 6 flags": ["vision"],
        "MiDaS DPT-hybrid, beyond the rounding of its float16 reference": ["depth"],
        "runs of samplers, timesteps exactly": ["sampler"],
        "time grids": ["grid"],
    }
    lines = []
    for what, kind in kinds.items():
        found = [row for row in rows if row["kind"] in kind]
        lines.append(
            [what, str(len(found)), small(max(row["max"] for row in found)), small(max(row["rms"] for row in found))]
        )
    known = {kind for (kind,) in kinds.values()}
    families = [row for row in rows if row["kind"] not in known]
    count = len({row["kind"] for row in families})
    for part in ("UNet", "VAE", "encoder"):
        found = [row for row in families if part in row["name"]]
        what = {"UNet": "UNets", "VAE": "VAEs", "encoder": "text and vision towers"}[part]
        worst = small(max(row["max"] for row in found)), small(max(row["rms"] for row in found))
        lines.append(
            [f"{what} of {count} families, narrow, beside diffusers and transformers", str(len(found)), *worst]
        )
    return markdown(["what is compared", "comparisons", "largest error / rms", "rms error / rms"], lines)


# --- speed, loading, training ---------------------------------------------------------------------------------------


def _speed(name: str, cells: dict[str, str], sides: Sequence[str]) -> str:
    lines = []
    for cell, what in cells.items():
        found = {row["side"]: row for row in rows_of(name, cell=cell, status="same")}
        seconds = {side: found[side]["seconds"]["median"] if side in found else None for side in sides}
        times = [
            three(value / seconds["fast"]) for side, value in seconds.items() if side not in ("ldm", "fast") and value
        ]
        shown = [three(value) if value else "does not fit" for value in seconds.values()]
        lines.append([what, *shown, ", ".join(times)])
    others = [SIDES[side] for side in sides if side not in ("ldm", "fast")]
    return markdown(["seconds", *(SIDES[side] for side in sides), f"fast: times {', '.join(others)}"], lines)


def speed() -> str:
    """SD 1 in float32, all sides."""
    cells = {
        "step, 1 at 512": "one guided step at 512 x 512",
        "step, 1 at 256": "one guided step at 256 x 256",
        "decode, 1 at 256": "VAE decoding at 256 x 256",
        "picture ddim:2, 1 at 256": "picture at 256 x 256, DDIM, 2 steps",
        "text, 1 at 512": "text, prompt and negative prompt",
    }
    return _speed("speed-quick", cells, ("ldm", "fast", "diffusers", "openvino"))


def speed_sdxl() -> str:
    """SDXL in float32."""
    cells = {f"step, 1 at {size}": f"one guided step at {size} x {size}" for size in (1024, 512)}
    return _speed("speed-sdxl", cells, ("fast", "diffusers"))


def loading() -> str:
    """SD 1 in float16, from the disk and from the system's cache."""
    kinds = {
        "single": "one `.safetensors`",
        "pickled": "a `.ckpt`, every checksum checked",
        "folder": "a diffusers folder",
    }
    lines = []
    for kind, what in kinds.items():
        line = [what]
        for cold in (True, False):
            read = {row["side"]: row["read"] for row in rows_of("load-float16", row=kind, cold=cold)}
            ours = read["ldm"]
            line += [f"{ours:.2f} s", f"{ours / read['raw']:.2f}", f"{ours / read['diffusers']:.2f}"]
        lines.append(line)
    head = ["", "not cached", "against raw", "against diffusers", "cached", "against raw", "against diffusers"]
    return markdown(head, lines)


def training() -> str:
    """One update, beside diffusers' training scripts."""
    titles = {"sd1-full": "SD 1.5 full", "sd1-lora": "SD 1.5 LoRA, rank 4", "sdxl-lora": "SDXL LoRA, rank 4"}
    lines = []
    for case, title in titles.items():
        rows = [row for name in ("train-quick", "train-sd1-lora") for row in rows_of(name, case=case, side="ldm")]
        for ours in rows:
            same = {"case": case, "size": ours["size"], "checkpointing": ours["checkpointing"], "side": "diffusers"}
            (theirs,) = [row for name in ("train-quick", "train-sd1-lora") for row in rows_of(name, **same)]
            seconds = [row["seconds"]["median"] for row in (ours, theirs)]
            peaks = ", ".join(three(row["peak"] / 1e9) for row in (ours, theirs))
            kept = "yes" if ours["checkpointing"] else "no"
            lines.append([title, str(ours["size"]), kept, *map(three, seconds), three(seconds[1] / seconds[0]), peaks])
    head = ["", "pixels", "checkpointing", "ldm, s", "diffusers, s", "times diffusers", "peak, GB: ldm, diffusers"]
    return markdown(head, lines)


# --- pictures -------------------------------------------------------------------------------------------------------


def quality() -> str:
    """What the model that ships draws right."""
    found = results("quality")
    rows = {
        "both colours": "colours",
        "both solids, of the right colours": "solids",
        "the relation between them": "relation",
        "everything": "all",
    }
    lines = [[what, percent(found["right"][key], 1)] for what, key in rows.items()]
    showcase = found["showcase"]
    lines.append(
        [f'everything, {showcase["n"]} pictures of "{showcase["prompt"]}"', percent(showcase["right"]["all"], 1)]
    )
    lowest = min(found["right_by_relation"], key=found["right_by_relation"].get)
    lines.append([f'the relation that fails most, "{lowest}"', percent(found["right_by_relation"][lowest], 1)])
    return markdown([f"{found['prompts']['n']} held-out prompts", "share right"], lines)


def demonstrations() -> str:
    """What more training taught the model that ships."""
    found = results("demonstrations")

    def effort(key: str) -> str:
        done = found[key]["training"]
        return f"{done['updates']}, {done['core_minutes']:.0f}"

    def shares(key: str, before: str, after: str) -> list[str]:
        return [percent(found[key][stage]["share"]) for stage in (before, after)]

    student, lora = found["distill"], found["lora"]
    less, more = (f"{student[which]['unet_parameters'] / 1e6:.1f}" for which in ("student", "start"))
    asked = {"alone": "magenta solids alone", "pairs": "pairs with a magenta solid", "held_out": "held-out prompts"}
    lines = [
        ["predicts v", effort("v"), "held-out prompts", *shares("v", "start", "v")],
        [
            f"student, {less} instead of {more} million UNet parameters",
            effort("distill"),
            "held-out prompts",
            *shares("distill", "start", "student"),
        ],
        [
            "inpainting; before: the plain model keeps the known region",
            effort("inpainting"),
            "scenes with one solid hidden",
            *shares("inpainting", "start", "widened"),
        ],
    ]
    for kind, what in asked.items():
        name = [f"LoRA, {lora['bytes'] / 1e6:.1f} MB", effort("lora")] if kind == "alone" else ["", ""]
        lines.append([*name, what, *(percent(lora[when][kind]["share"]) for when in ("before", "after"))])
    return markdown(["", "updates, core-minutes", "asked for", "before", "after"], lines)


def dreambooth() -> str:
    """One particular cone from six pictures, with prior preservation and without."""
    found = results("demonstrations")["dreambooth"]
    rows = {
        '"a sks cone"': "sks",
        "cones of other colours": "other_cones",
        '"a cone": is it sks?': "any_cone_is_sks",
        "held-out prompts": "held_out",
        "pairs of the sks cone and another solid": "sks_elsewhere",
    }
    stages = ("start", "without_prior", "with_prior")
    lines = [
        [f"{found['start'][key]['n']} times {what}", *(percent(found[s][key]["share"]) for s in stages)]
        for what, key in rows.items()
    ]
    return markdown(["DreamBooth", "start", "without prior", f"with {found['prior_pictures']} prior pictures"], lines)


def recipes() -> str:
    """The recipes of published models that ship, by what they say themselves."""
    lines = []
    for name in names():
        recipe = load_recipe(name)
        if not name.startswith("blocks"):
            rate = f"{recipe.optimizer.lr:g}, {recipe.optimizer.schedule}"
            lines.append(
                [f"`{name}`", recipe.about.rstrip("."), f"{recipe.run.batch:,}", f"{recipe.run.steps:,}", rate]
            )
    return markdown(["recipe", "what it does", "batch", "updates", "learning rate"], lines)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table
    for table in (parity, speed, speed_sdxl, loading, training, quality, demonstrations, dreambooth, recipes)
}


def renewed(text: str) -> str:
    """The text of a README with every marked table made anew. Raises KeyError for a table that nobody makes."""
    return MARK.sub(lambda found: f"<!-- table: {found[1]} -->\n\n{TABLES[found[1]]()}\n\n<!-- end of table -->", text)


if __name__ == "__main__":
    for path in sorted(ROOT.glob("**/README.md")):
        before = path.read_text(encoding="utf-8")
        if (after := renewed(before)) != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))
