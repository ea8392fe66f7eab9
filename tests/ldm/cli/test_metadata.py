"""What a picture says of how it was made is all that is needed to make it again."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import weights
from ldm.cli.options import OPTIONS
from ldm.pictures.read import open_image, read_metadata
from tests.made.families import build, tiny

ROWS = [*itertools.chain(*OPTIONS.values())]
SAID = "--sampler euler_ancestral --eta 0.5 --steps 4 --cfg 5 --cfg-rescale 0.4 --cfg-interval 0.1 12 --clip-skip 2"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tiny model and a picture."""
    monkeypatch.chdir(tmp_path)
    weights.save(build(tiny("sd1")), "tiny.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)).save("photo.png")
    Image.new("L", (40, 32), 255).save("mask.png")
    return tmp_path


def again(facts: dict[str, str]) -> str:
    """The command line that makes a picture again, from its metadata and the table of options alone."""
    words = ["--dtype", facts["dtype"], "--ckpt", facts["model"], "--no-fast", "--out", "again.png"]
    rows = {row.key: row for row in ROWS if row.key and facts["task"] in row.commands.split()}
    for key, row in rows.items():
        flag = (row.flags or (f"--{row.name.replace('_', '-')}",))[0]
        if key == "size":
            words += ["--width", facts["size"].split("x")[0], "--height", facts["size"].split("x")[1]]
        elif isinstance(row.default, bool):
            words += [flag] if facts.get(key, str(row.default).lower()) != str(row.default).lower() else []
        elif key in facts and (isinstance(row.default, list) or "nargs" in row.more):
            words += [flag, *facts[key].split()]
        elif key in facts:
            words += [flag, facts[key]]
    return shlex.join([facts["task"], facts["prompt"], *words])


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("hires 'a (cat:1.4)'", {"scale": "2.0", "enlarge": "pixel", "strength": "0.6"}),
        ("hires 'a cat' --scale 1.5x --enlarge latent --strength 0.8 --width 24 --no-weighting --negative dog",
         {"scale": "1.5", "enlarge": "latent", "strength": "0.8", "size": "24x32", "weighting": "false"}),
        ("txt2img 'a cat' --hires 2x --truncate --tile 32",
         {"scale": "2.0", "enlarge": "pixel", "strength": "0.6", "truncate": "true", "tile": "32"}),
        ("txt2img 'a cat' --grid linspace", {"grid": "linspace"}),
        ("img2img 'a cat' --init photo.png --strength 0.7", {"strength": "0.7", "init": "photo.png"}),
        ("inpaint 'a cat' --init photo.png --mask mask.png --feather 2", {"mask_from": "white", "feather": "2"}),
        ("outpaint 'a cat' --init photo.png --extend left=8", {"extend": "left=8", "strength": "1.0"}),
    ],
)  # fmt: skip
def test_a_picture_can_be_made_again_from_its_metadata(line, settings, here, ldm):
    assert ldm(f"{line} {SAID} --seed 7 --ckpt tiny.safetensors --dtype float32 --no-fast --out first.png")[0] == 0
    facts = read_metadata("first.png")
    common = {
        "sampler": "euler_ancestral", "eta": "0.5", "steps": "4", "cfg": "5.0", "cfg_rescale": "0.4",
        "cfg_interval": "0.1 12.0", "clip_skip": "2", "seed": "7", "model": "tiny.safetensors",
    }  # fmt: skip
    assert facts.items() >= (common | settings).items()
    assert ldm(again(facts))[0] == 0
    assert np.array_equal(open_image("first.png"), open_image("again.png"))
    assert read_metadata("again.png") == facts


def test_every_option_of_the_table_has_its_own_key_and_metadata_that_parse_again():
    for command in dict.fromkeys(itertools.chain(*(row.commands.split() for row in ROWS))):
        rows = [row for row in ROWS if command in row.commands.split()]
        keys = [row.key for row in rows if row.key not in (None, "size")]
        assert len(set(keys)) == len(keys)
        assert len({row.name for row in rows}) == len(rows)
        assert all(row.key for row in rows if row.varies)
        assert all(row.needs[0] in {other.name for other in rows} for row in rows if row.needs)
