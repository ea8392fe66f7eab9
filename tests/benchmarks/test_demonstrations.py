"""The demonstrations: what is taught, how it is read, and that each command would run."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks import demonstrations, quality
from benchmarks.models import panels, subjects
from ldm import blocks
from ldm.blocks import Scene, Solid
from ldm.train.data.folder import Folder
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


def test_magenta_is_taught_in_twenty_pictures_and_asked_for_in_other_words(tmp_path):
    lessons = subjects.magenta_lessons(20)
    said = subjects.said(lessons)
    there = Folder(str(subjects.folder(tmp_path / "magenta", map(subjects.render, lessons), said)), "")
    assert len(there.items) == 20
    assert not there.bad
    assert [set(item.captions) for item in there.items] == [set(ways) for ways in said]
    assert all(sum(solid.color == subjects.MAGENTA for solid in scene.solids) == 1 for scene in lessons)
    known = {blocks.canonical(scene) for scene in lessons}
    asked = subjects.magenta_pairs(50, seed=1, without=known)
    assert len({blocks.canonical(scene) for scene in asked} - known) == 50


def test_magenta_is_read_as_magenta_and_as_nothing_else():
    for scene in [*subjects.magenta_lessons(2), *subjects.magenta_pairs(5, seed=2)]:
        reading = demonstrations.of_nine(subjects.render(scene))
        assert quality.agrees(reading, scene)["all"], blocks.canonical(scene)
        for color in ("purple", "pink"):
            other = replace(
                scene,
                solids=tuple(
                    replace(solid, color=color) if solid.color == subjects.MAGENTA else solid for solid in scene.solids
                ),
            )
            if len({solid.color for solid in other.solids}) == len(other.solids):
                assert not quality.agrees(reading, other)["colours"]
                assert not quality.agrees(demonstrations.of_nine(blocks.render(other)), scene)["colours"]


def test_the_particular_cone_is_read_as_one_thing_wherever_it_stands():
    for scene in [*subjects.cone_lessons(2), *subjects.cone_pairs(5, seed=2)]:
        assert quality.agrees(subjects.read(subjects.render(scene)), scene)["all"], blocks.canonical(scene)


def test_other_cones_are_not_the_particular_one():
    wanted = subjects.cone_lessons(1)[0]
    blue, yellow = Solid("cone", subjects.BODY), Solid("cone", subjects.TIP, "small")
    for scene in (
        Scene((blue,)),
        Scene((yellow,)),
        *(Scene((yellow, blue), (relation,)) for relation in blocks.RELATIONS),
    ):
        reading = subjects.read(blocks.render(scene))
        assert not quality.agrees(reading, wanted)["all"], blocks.canonical(scene)
        assert quality.agrees(reading, scene)["all"], blocks.canonical(scene)


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
