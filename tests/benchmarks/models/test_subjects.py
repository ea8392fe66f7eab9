"""What is taught, and how it is read."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import demonstrations, quality
from benchmarks.models import subjects
from ldm import blocks
from ldm.blocks import Scene, Solid
from ldm.train.data.folder import PictureFolder


def test_magenta_is_taught_in_twenty_pictures_and_asked_for_in_other_words(tmp_path):
    lessons = subjects.magenta_lessons(20)
    said = subjects.captions(lessons)
    there = PictureFolder(str(subjects.folder(tmp_path / "magenta", map(subjects.render, lessons), said)), "")
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
