"""For which family a LoRA was made: families are data, and what fits two is told apart by what is whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import weights
from ldm.changes.lora import Changes, LowRank
from ldm.config import FAMILIES, ModelConfig
from ldm.errors import AmbiguousCheckpoint, FileError
from tests.made.checkpoints import save_safetensors
from tests.made.families import build, tiny
from tests.made.loras import blank_lora
from weights.adapters import names as lora_names
from weights.adapters.extract import attention
from weights.adapters.family import kinds
from weights.adapters.read import load_lora, read_lora

TINY = tiny("sd1")
CUBES = replace(TINY, name="cubes", unet=replace(TINY.unet, down_depth=((1,), (2,)), up_depth=((2, 2), (1, 1))))


@pytest.fixture
def cubes(monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """A family of which nothing knows but FAMILIES."""
    monkeypatch.setitem(FAMILIES, "cubes", CUBES)
    return CUBES


def lora(config: ModelConfig) -> Changes:
    """Rank 2 for every matrix of attention of the UNet."""
    shapes = {name: shape for name, shape in lora_names.shapes(config).items() if attention(name)}
    return Changes(
        {
            name: LowRank(torch.full((2, shape[1]), 0.01), torch.full((shape[0], 2), 0.01))
            for name, shape in shapes.items()
            if name.startswith("unet.")
        }
    )


def test_families_of_one_kind_count_once_and_the_shallowest_comes_first():
    assert kinds() == ["sd1", "sd2-base", "x4-upscaler", "ssd-1b", "sdxl-refiner", "sdxl-base"]


@pytest.mark.parametrize(
    "change",
    [
        {"prediction": "v"},
        {"text": (replace(FAMILIES["sd1"].text[0], skip=1, norm=False),)},
        {"unet": replace(FAMILIES["sd1"].unet, heads=None, head_dim=40, linear_proj=True)},
        {"text": ()},
    ],
)
def test_what_names_and_shapes_do_not_show_makes_no_kind(change: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FAMILIES, "mine", replace(FAMILIES["sd1"], name="mine", **change))
    assert "mine" not in kinds()


@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_a_lora_of_a_family_that_is_only_data_is_written_read_and_refused_elsewhere(
    to: str, cubes: ModelConfig, tmp_path: Path
):
    path = weights.save_lora(lora(cubes), tmp_path / "a.safetensors", cubes, to)
    source = read_lora(path)
    assert (source.config, source.dialect) == (cubes, to)
    assert set(source.changes) == set(lora(cubes))
    with pytest.raises(FileError, match=r"is a LoRA for cubes .* the model is sd1 .* use one made for sd1"):
        read_lora(path, "sd1")


def test_it_is_merged_into_a_file_and_extracted_again(cubes: ModelConfig, tmp_path: Path):
    base = weights.save(build(cubes), tmp_path / "base.safetensors", dtype=None)
    path = weights.save_lora(lora(cubes), tmp_path / "a.safetensors", cubes)
    merged = weights.merge_lora(base, [(path, 1.0)], tmp_path / "merged.safetensors")
    assert (merged.family, set(merged.parameters)) == ("cubes", set(lora(cubes)))
    made = weights.extract_lora(base, merged.path, tmp_path / "b.safetensors", rank=2)
    assert (made.family, {kept.parameter for kept in made.modules}) == ("cubes", set(lora(cubes)))
    assert weights.resize_lora(made.path, tmp_path / "c.safetensors", rank=1).family == "cubes"
    assert read_lora(tmp_path / "c.safetensors").config == cubes


def test_of_two_families_it_is_the_one_whose_blocks_it_changes_all(cubes: ModelConfig, monkeypatch, tmp_path: Path):
    """Every module of `fewer` is in `cubes`, in the same shape."""
    fewer = replace(cubes, name="fewer", unet=replace(cubes.unet, down_depth=((1,), (1,)), up_depth=((1, 1), (1, 1))))
    monkeypatch.setitem(FAMILIES, "fewer", fewer)
    path = weights.save_lora(lora(fewer), tmp_path / "a.safetensors", fewer)
    assert read_lora(path).config == fewer
    assert weights.inspect(path).lora.families == ("fewer",)
    with pytest.raises(
        FileError, match="is a LoRA for fewer: it changes exactly the blocks of that; the model is cubes"
    ):
        load_lora(path, cubes)
    assert read_lora(weights.save_lora(lora(cubes), tmp_path / "b.safetensors", cubes)).config == cubes


def test_targets_that_two_families_have_alike_are_ambiguous(cubes: ModelConfig, monkeypatch, tmp_path: Path):
    monkeypatch.setitem(FAMILIES, "twin", replace(cubes, name="twin", unet=replace(cubes.unet, mid_depth=2)))
    some = {name: change for name, change in lora(cubes).items() if "input_blocks.1.1." in name and "attn1" in name}
    path = weights.save_lora(Changes(some), tmp_path / "a.safetensors", cubes)
    with pytest.raises(AmbiguousCheckpoint, match="has targets that cubes, twin have alike; say which with --family"):
        read_lora(path)
    assert read_lora(path, "twin").config.name == "twin"


@pytest.mark.parametrize(
    ("manifest", "family", "is_for"),
    [
        ("sd1", "sd2-v", "sd1"),
        ("sd2", "sd1", "sd2-base"),
        ("sdxl", "sd1", "sdxl-base"),
        ("sd1", "sdxl-base", "sd1"),
        ("sdxl", "ssd-1b", "sdxl-base"),
        ("ssd-1b", "sdxl-base", "ssd-1b"),
    ],
)
def test_a_lora_for_another_family_is_refused_with_both_families(manifest: str, family: str, is_for: str, tmp_path):
    """The last is the hard one: all of SSD-1B's modules exist in SDXL, with the same shapes."""
    path = save_safetensors(blank_lora(manifest, text=False), tmp_path / "a.safetensors")
    with pytest.raises(FileError, match=f"a.safetensors: is a LoRA for {is_for}.* the model is {family}") as caught:
        load_lora(path, FAMILIES[family])
    assert caught.value.exit_code == 2
    assert not str(caught.value).endswith("...")


def test_a_lora_of_some_blocks_is_no_other_family(tmp_path):
    some = {
        key: value
        for key, value in blank_lora("sdxl", text=False).items()
        if "mid_block" in key or "up_blocks_0" in key
    }
    found = load_lora(save_safetensors(some, tmp_path / "a.safetensors"), FAMILIES["sdxl-base"])
    assert found.modules == len(some) // 3
