"""The demonstrations: what they cost, what they write, and that each command would run."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import demonstrations
from benchmarks.models import panels
from ldm import blocks
from ldm.train.reading import load_recipe

NAMES = {"lora": "lora", "dreambooth": "full", "inpainting": "full", "v": "full", "distill": "distill"}


@pytest.mark.parametrize("name", NAMES)
def test_every_demonstration_has_a_recipe(name):
    assert (
        set(demonstrations.DEMONSTRATIONS)
        == set(NAMES)
        == {path.stem for path in demonstrations.RECIPES.glob("*.toml")}
    )
    assert load_recipe(demonstrations.RECIPES / f"{name}.toml", demonstrations.QUICK).method.kind == NAMES[name]


def test_a_hole_hides_all_that_tells_of_a_solid():
    for number, scene in enumerate(blocks.held_out_scenes(4)):
        which = number % 2
        hole = demonstrations.hiding(scene, which)
        assert 0 < (hole == 255).mean() < 0.7
        alone = blocks.render(
            scene, build=lambda scene, rng, which=which: blocks.layout(scene, rng)[1 - which : 2 - which]
        )
        assert (blocks.render(scene)[hole == 0] == alone[hole == 0]).all()


def test_a_run_that_goes_on_costs_what_both_parts_did(tmp_path):
    for _ in range(2):
        with demonstrations.stopwatch(tmp_path / "cost.json"):
            sum(range(10**6))
        seen = json.loads((tmp_path / "cost.json").read_text())["cpu_seconds"]
    (tmp_path / "cost.json").write_text('{"cpu_seconds": 100.0}')
    with demonstrations.stopwatch(tmp_path / "cost.json"):
        pass
    assert 0 < seen < 100 <= json.loads((tmp_path / "cost.json").read_text())["cpu_seconds"]


def test_figures_of_one_demonstration_leave_the_others_be(tmp_path, monkeypatch):
    picture = np.full((128, 128, 3), 90, np.uint8)
    panel = panels.Panel(
        "one",
        [
            panels.Row("before\n0 of 1", [picture], [False], ["a magenta cube"]),
            panels.Row("after\n1 of 1", [picture], [True], ["a magenta cube"]),
        ],
    )
    monkeypatch.setattr(
        demonstrations,
        "DEMONSTRATIONS",
        {name: lambda how, name=name: ({"told": name, "start": 1}, panel) for name in ("v", "lora")},
    )
    start = tmp_path / "start.safetensors"
    start.write_bytes(b"weights")
    for name in ("lora", "v", "lora"):
        demonstrations.report(name, demonstrations.How(start, tmp_path), tmp_path / "results")
    found = json.loads((tmp_path / "results" / "demonstrations.json").read_text())
    assert [(name, figures["told"]) for name, figures in found.items()] == [("v", "v"), ("lora", "lora")]
    assert all(figures["start"] == 1 and figures["machine"]["cores"] for figures in found.values())
    with Image.open(tmp_path / "results" / "demonstrations.png") as sheet, Image.open(tmp_path / "v.png") as one:
        assert (sheet.width, sheet.height) == (one.width, 2 * one.height)


def test_the_command_teaches_and_scores(tmp_path, capsys):
    demonstrations.main(["lora", "--quick", "--runs", str(tmp_path / "runs")])
    figures = json.loads((tmp_path / "runs-quick" / "demonstrations.json").read_text())["lora"]
    assert figures["after"]["pairs"]["n"] == 1
    assert figures["pictures"] == 20
    assert '"core_minutes"' in capsys.readouterr().out
    with Image.open(tmp_path / "runs-quick" / "demonstrations.png") as sheet:
        assert sheet.width > 1000
