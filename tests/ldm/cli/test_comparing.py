"""`--grid-of`: every combination is drawn, and sheets show them where they belong."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import numpy as np
import pytest

import weights
from ldm.cli import COMMANDS, arguments, comparing
from ldm.pictures.read import open_image, read_metadata
from tests.made.commands import QUICK, drawn, same


def test_a_comparison_makes_every_combination_and_a_sheet(here, ldm):
    code, lines, errors = ldm(f"txt2img 'a cat' {QUICK} --grid-of cfg=1,4.5,8 --grid-of sampler=ddim,dpmpp_2m")
    assert (code, errors) == (0, [])
    assert lines == [*(f"outputs/0000{n}.png" for n in range(1, 7)), "outputs/00001-sheet.png"]
    model = weights.load("tiny.safetensors")
    for path, (cfg, sampler) in zip(lines, itertools.product((1.0, 4.5, 8.0), ("ddim", "dpmpp_2m")), strict=False):
        assert same(path, drawn(model, cfg=cfg, sampler=sampler))
        assert (read_metadata(path)["cfg"], read_metadata(path)["sampler"]) == (repr(cfg), sampler)
    sheet = np.asarray(open_image(lines[-1]))
    for i, path in enumerate(lines[:6]):
        assert places_of(np.asarray(open_image(path)), sheet), i
    rows, columns = zip(*(places_of(np.asarray(open_image(path)), sheet)[0] for path in lines[:6]), strict=True)
    assert rows[0] == rows[2] == rows[4] < rows[1] == rows[3] == rows[5]
    assert columns[0] == columns[1] < columns[2] == columns[3] < columns[4] == columns[5]
    facts = read_metadata(lines[-1])
    assert facts["grid_of"] == "cfg=1,4.5,8; sampler=ddim,dpmpp_2m"
    assert not {"cfg", "sampler"} & set(facts)


def places_of(picture: np.ndarray, sheet: np.ndarray) -> list[tuple[int, int]]:
    """Where on the sheet the picture is, to the pixel."""
    height, width = picture.shape[:2]
    starts = np.argwhere((sheet[: 1 - height, : 1 - width] == picture[0, 0]).all(axis=-1))
    return [(y, x) for y, x in starts.tolist() if np.array_equal(sheet[y : y + height, x : x + width], picture)]


def test_with_one_axis_every_prompt_and_seed_has_a_row(here, ldm):
    Path("prompts.txt").write_text("a cat\na dog\n")
    lines = ldm(f"txt2img --prompts prompts.txt {QUICK} --n 2 --grid-of clip_skip=1,2")[1]
    assert len(lines) == 2 * 4 + 1
    sheet = np.asarray(open_image(lines[-1]))
    rows = [places_of(np.asarray(open_image(path)), sheet)[0][0] for path in lines[:8]]
    assert rows[:4] == rows[4:] == sorted(set(rows))
    assert read_metadata(lines[-1])["seeds"] == "7 8"


def test_with_two_axes_every_prompt_has_a_sheet(here, ldm):
    Path("prompts.txt").write_text("a cat\na dog\n")
    lines = ldm(f"txt2img --prompts prompts.txt {QUICK} --steps 1 --grid-of seed=1,2 --grid-of cfg=1,2")[1]
    assert lines[8:] == ["outputs/00001-sheet.png", "outputs/00002-sheet.png"]
    assert [read_metadata(path)["prompt"] for path in lines[8:]] == ["a cat", "a dog"]
    assert [read_metadata(path)["seed"] for path in lines[:8]] == ["1"] * 4 + ["2"] * 4


@pytest.mark.parametrize(
    ("line", "axis", "name"),
    [
        ("img2img x --init photo.png", "strength=0.5,1", "strength"),
        ("upscale x --init photo.png", "noise-level=0,300", "noise_level"),
        ("hires x", "scale=1.5x,2x", "scale"),
        ("hires x", "hires=1.5x,2x", "scale"),
        ("txt2img x --hires 2x", "enlarge=pixel,latent", "enlarge"),
        ("inpaint x --init photo.png --mask photo.png", "feather=0,3", "feather"),
        ("variations --init photo.png", "--preprocessing=card,original", "preprocessing"),
        ("txt2img x", "cfg-rescale=0,0.7", "rescale"),
        ("txt2img x --refiner r", "refine-from=0.5,0.8", "refine_from"),
    ],
)
def test_what_a_command_has_can_be_compared(line, axis, name):
    args = arguments.parse(COMMANDS, [*shlex.split(line), f"--grid-of={axis}"])
    axes = comparing.axes_of(args.grid_of, args.command)
    assert [found.dest for found in axes] == [name]
    assert len({cell[name] for cell in comparing.cells_of(axes)}) == 2
