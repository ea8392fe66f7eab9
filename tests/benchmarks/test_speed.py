"""The command that times pictures, on tiny networks: what it prints, writes and draws, and that it can say no."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from PIL import Image, ImageColor

from benchmarks import speed
from benchmarks.sides import all as sides
from benchmarks.timing import plot, rounds


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One run of `speed --tiny --quick` without the sides that need minutes: what it returned, wrote and drew."""
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    folder = tmp_path_factory.mktemp("speed")
    chosen, files = ["ldm", "diffusers", "sdcpp"], [f"--out={folder / 'speed.json'}", f"--plot={folder / 'speed.png'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "peak", lambda *_: {"rates": {"float32": {"assumed": 1e11}}, "best": 1e11})
        patch.setitem(sides.NEEDS, "sdcpp", ("stable_diffusion_cpp_that_nobody_has", "stable-diffusion-cpp-python"))
        status = speed.main(
            ["--tiny", "--quick", "--side", *chosen, "--threads=1", f"--cache={folder / 'cache'}", *files]
        )
    return status, json.loads((folder / "speed.json").read_text()), Image.open(folder / "speed.png")


def test_speed_has_a_row_for_every_cell_and_side(measured):
    status, found, _ = measured
    assert status == 0
    assert [(row["stage"], row["side"]) for row in found["rows"]] == list(
        product(["picture", "step", "text", "decode"], ["ldm", "diffusers", "sdcpp"])
    )
    timed = [row for row in found["rows"] if row["side"] != "sdcpp"]
    for row in timed:
        assert row["status"] == "same", row
        assert 0 < row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"]
        assert row["repeats"] == 2
        assert row["turns"] == "in turn"
        assert row["of_floor"] == row["seconds"]["median"] / row["floor"] > 0
        assert row["floor"] == row["flops"] / found["peak"]["best"]
    for ours, theirs in zip(timed[::2], timed[1::2], strict=True):
        assert ours["ratio"] == pytest.approx(theirs["seconds"]["median"] / ours["seconds"]["median"])
        assert theirs["ratio"] == 1
    assert all((row["cold"] is not None) == (row["stage"] == "picture") for row in timed)
    assert [side["side"] for side in found["sides"]] == ["ldm", "diffusers"]
    assert found["machine"]["torch"] == torch.__version__
    assert found["settings"]["threads"] == found["machine"]["threads"] == 1


def test_a_peer_that_is_not_installed_has_rows_that_say_so(measured):
    absent = [row for row in measured[1]["rows"] if row["side"] == "sdcpp"]
    assert {(row["status"], row["why"]) for row in absent} == {
        ("absent", "stable_diffusion_cpp_that_nobody_has is not installed: pip install stable-diffusion-cpp-python")
    }
    assert all(row["seconds"] is None and row["ratio"] is None for row in absent)


def test_ratios_are_drawn(measured):
    _, found, picture = measured
    cells = len({row["cell"] for row in found["rows"]})
    assert picture.size == (
        plot.WIDTH,
        plot.HEAD + 2 * plot.MARGIN + cells * (2 * (plot.BAR + plot.GAP) + plot.CELL_GAP),
    )
    row = {"model": "sd1", "dtype": "float32", "cell": "step", "side": "fast", "seconds": {"median": 1.0}}
    drawn = plot.draw([{**row, "ratio": 2.0}, {**row, "ratio": 0.5}, {**row, "ratio": None}], "title", "caption")
    bars = [
        sum(
            drawn.getpixel((x, plot.HEAD + plot.MARGIN + 2 + i * (plot.BAR + plot.GAP)))
            == ImageColor.getrgb(plot.COLOURS["fast"])
            for x in range(plot.WIDTH)
        )
        for i in range(2)
    ]
    assert bars[0] == pytest.approx(
        4 * bars[1], abs=8
    )  # pixels: ends are rounded, and the line at 1 crosses the longer bar
    assert bars[1] > 100


def test_a_void_or_failed_row_is_an_exit_status(monkeypatch, capsys):
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    row = {
        "model": "sd1",
        "cell": "step, 1 at 64",
        "side": "fast",
        "seconds": None,
        "why": "it fell over",
        "cold": None,
    }
    monkeypatch.setattr(speed, "write_folder", lambda *_: None)
    monkeypatch.setattr(speed, "peak", lambda *_: {"rates": {}, "best": 1e9})
    for status, code in (("failed", 1), ("void", 1), ("absent", 0)):
        monkeypatch.setattr(speed, "rows_of", lambda *_, status=status: iter([{**row, "status": status}]))
        assert speed.main(["--tiny"]) == code
        assert f"{status}: it fell over" in capsys.readouterr().out


def test_sides_one_after_the_other_have_the_same_rows(measured, monkeypatch, tmp_path):
    """The folder of weights is a fresh one, in a passing cache; nothing fits beside anything."""
    monkeypatch.setattr(rounds, "fitting", lambda job, sides, cells: (False, {}))
    monkeypatch.setattr(speed, "peak", lambda *_: {"rates": {}, "best": 1e11})
    out = tmp_path / "speed.json"
    assert (
        speed.main(
            [
                "--tiny",
                "--side",
                "diffusers",
                "ldm",
                "--stage",
                "text",
                "step",
                "--size",
                "64",
                "128",
                "--repeats=1",
                "--threads=1",
                f"--out={out}",
            ]
        )
        == 0
    )
    found = json.loads(out.read_text())
    assert [(row["stage"], row["size"], row["side"]) for row in found["rows"]] == [
        (*cell, side) for cell in (("step", 64), ("step", 128), ("text", 64)) for side in ("diffusers", "ldm")
    ]
    assert all(
        row["status"] == "same" and row["ratio"] and row["turns"].startswith("one side after the other")
        for row in found["rows"]
    )
    assert {(each["what"], each["side"]) for each in found["growth"]} == {("size", "diffusers"), ("size", "ldm")}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--size=100"],
        ["--size=32"],
        ["--repeats=0"],
        ["--sampler=ddim:1000"],
        ["--sampler=plms:5"],
        ["--batch=0"],
        ["--threads=0"],
        ["--dtype=int8"],
        ["--device=mps"],
        ["--stage=text", "--quick"],
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        speed.main(arguments)
    assert left.value.code == 2
    assert arguments[0].split("=")[0] in capsys.readouterr().err
