"""A family is data: one `replace` and a title in FAMILIES, and everything that reads files knows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import weights
from ldm.__main__ import main
from ldm.changes.lora import Changes, LowRank
from ldm.config import FAMILIES, SDXL, SSD1B, UNetConfig
from ldm.errors import FileError
from tests.made.families import build, tiny
from weights.adapters.read import read_lora
from weights.names.family import family as recognised
from weights.names.sizes import visible_unet

SIZES = tiny("sd1")
CUBES = replace(
    SIZES,
    name="cubes",
    title="a model of cubes",
    base="",
    unet=replace(SIZES.unet, down_depth=((1,), (2,)), up_depth=((2, 2), (1, 1)), mid_depth=2),
)


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "cubes", CUBES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of such a model that says nothing of itself, as other programs write them."""
    state = weights.original_state(build(CUBES))
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "cubes.safetensors")
    return tmp_path / "cubes.safetensors"


def same(one: Path, other: Path) -> bool:
    with weights.open_file(one) as a, weights.open_file(other) as b:
        return set(a) <= set(b) and all(a[key].equal(b[key]) for key in a)


def test_it_is_loaded_by_its_shapes_and_saved(path: Path, tmp_path: Path):
    model = weights.load(path)
    assert model.config == CUBES
    again = weights.load(weights.save(model, tmp_path / "again.safetensors", dtype=None))
    assert (again.config, again.config.title) == (CUBES, CUBES.title)
    assert same(path, tmp_path / "again.safetensors")


def test_it_is_inspected(path: Path):
    report = weights.inspect(path)
    assert (report.family, report.title, report.loadable) == ("cubes", "model of cubes", True)
    assert report.evidence[0].endswith("-> cubes")


def test_it_is_converted_there_and_back(path: Path, tmp_path: Path):
    weights.convert(path, tmp_path / "folder")
    assert weights.load(tmp_path / "folder").config == CUBES
    weights.convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(path, tmp_path / "back.safetensors")
    difference = weights.diff(path, tmp_path / "folder")
    assert (difference.verdict.kind, difference.a.title) == ("converted", "a model of cubes")


def test_it_is_merged_with_its_like_and_with_no_other(path: Path, tmp_path: Path):
    merged = weights.merge(path, path, tmp_path / "m.safetensors", alpha=0.5)
    assert same(path, merged.path)
    other = weights.save(build(SIZES), tmp_path / "sd1.safetensors", dtype=None)
    with pytest.raises(FileError, match=r"B is an SD 1 model and A .+ is a model of cubes; merge models of one"):
        weights.merge(path, other, tmp_path / "n.safetensors")


def test_its_loras_are_known_by_their_shapes(tmp_path: Path):
    name = "unet.middle_block.1.transformer_blocks.1.attn1.to_q.weight"
    width = CUBES.unet.model_channels * CUBES.unet.channel_mult[-1]
    changes = {name: LowRank(torch.ones(2, width), torch.ones(width, 2), None)}
    weights.save_lora(Changes(changes, "lora"), tmp_path / "lora.safetensors", CUBES)
    assert read_lora(tmp_path / "lora.safetensors").config.name == "cubes"
    assert weights.inspect(tmp_path / "lora.safetensors").lora.families == ("cubes",)


def test_it_is_trained(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text("a cube")
    recipe = f"""
[model]
start = "{path.name}"
family = "cubes"
[data]
path = "pictures"
size = 32
[optimizer]
lr = 1e-3
[run]
steps = 3
batch = 2
micro = 2
save_every = 3
save_dtype = "float32"
[watch]
timesteps = 1
"""
    (tmp_path / "recipe.toml").write_text(recipe)
    assert main(["train", "recipe.toml", "--out", "run"]) == 0
    trained = weights.load(next((tmp_path / "run").glob("model*.safetensors")))
    assert trained.config == CUBES
    assert not trained.unet.out[2].weight.equal(weights.load(path).unet.out[2].weight)


def test_a_file_of_another_width_is_of_the_family_with_its_structure(path: Path, tmp_path: Path):
    wide = replace(CUBES, unet=replace(CUBES.unet, model_channels=64))
    state = weights.original_state(build(wide))
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "wide.safetensors")
    assert weights.inspect(tmp_path / "wide.safetensors").family == "cubes"


def test_a_unet_has_the_inputs_of_its_family_and_its_structure():
    for inputs, name in ((4, "ssd-1b"), (9, "sdxl-inpainting"), (5, "unknown"), (8, "ip2p")):
        assert family_of(replace(SSD1B, in_channels=inputs)) == name
    for inputs, name in ((4, "cubes"), (9, "sd1-inpainting"), (8, "ip2p"), (5, "unknown")):
        assert family_of(replace(CUBES.unet, in_channels=inputs)) == name
    assert family_of(replace(SDXL, down_depth=((0, 0), (1, 1), (2, 2)))) == "vega"
    assert family_of(replace(SDXL, mid_depth=1)) == "koala"


def family_of(unet: UNetConfig) -> str:
    return recognised(visible_unet(unet), False, ())
