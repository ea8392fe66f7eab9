"""A model trained with zero terminal SNR (Lin et al. 2023) is saved, loaded, converted and sampled as one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm import LatentDiffusion
from ldm.config import FAMILIES, ScheduleConfig
from ldm.errors import ArgumentError, FileError
from ldm.pictures.read import read_metadata
from ldm.tasks import img2img, txt2img
from ldm.tasks.job import Sampling
from samplers import DEFAULT_GRID, GRIDS, SAMPLERS, Schedule
from tests.made.checkpoints import TINY, checkpoint, save_safetensors
from weights import LEFTOVERS, convert, load, open_file, save
from weights.names.metadata import CONFIG_KEY, from_json, to_json

PURE_NOISE = ScheduleConfig(zero_snr=True)
CONFIG = replace(TINY, prediction="v", schedule=PURE_NOISE)
MARKS = {"v_pred", "ztsnr"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SD 1 model as `save` writes it."""
    folder = tmp_path_factory.mktemp("zero")
    return save(load(save_safetensors(checkpoint(), folder / "source.safetensors"), CONFIG), folder / "a.safetensors")


@pytest.fixture(scope="module")
def model(path: Path) -> LatentDiffusion:
    return load(path)


def scheduler(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


def test_what_is_saved_loads_with_its_schedule(model, path):
    assert model.config == CONFIG
    assert model.schedule == Schedule(zero_snr=True)
    assert model.schedule.sigma_max == pytest.approx(4096, rel=1e-7)


def test_a_saved_file_has_the_marks_that_other_programs_read(path, tmp_path):
    with open_file(path) as file:
        assert set(file) >= MARKS
        assert {file.shape(mark) for mark in MARKS} == {(0,)}
        found = {key: file.read(key, mapped=False) for key in file}
    bare = save_safetensors(found, tmp_path / "b.safetensors")  # by another program, without our metadata
    assert load(bare, replace(TINY, prediction="v")).config == CONFIG
    plain = save(load(bare, replace(TINY, prediction="v")), tmp_path / "c.safetensors")
    assert load(plain).schedule.zero_snr
    ordinary = save_safetensors(
        {key: value for key, value in found.items() if key not in MARKS}, tmp_path / "d.safetensors"
    )
    with open_file(save(load(ordinary, replace(TINY, prediction="v")), tmp_path / "e.safetensors")) as file:
        assert not MARKS & set(file)


def test_a_folder_keeps_the_schedule_and_gives_the_file_back(path, tmp_path):
    convert(path, tmp_path / "b")
    told = scheduler(tmp_path / "b")
    assert (told["prediction_type"], told["rescale_betas_zero_snr"], told["timestep_spacing"]) == (
        "v_prediction",
        True,
        "trailing",
    )
    loaded = load(tmp_path / "b")
    assert (loaded.config.prediction, loaded.config.schedule, loaded.schedule) == (
        "v",
        PURE_NOISE,
        Schedule(zero_snr=True),
    )
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    (tmp_path / "c" / LEFTOVERS).unlink()  # as diffusers writes a folder
    for source in "bc":
        convert(tmp_path / source, tmp_path / f"{source}.safetensors")
        with open_file(path) as one, open_file(tmp_path / f"{source}.safetensors") as other:
            assert {key for key in other if not key.endswith("position_ids")} == set(one)
            assert from_json(other.metadata[CONFIG_KEY]).schedule == PURE_NOISE


def test_a_config_cannot_ask_for_eps_of_pure_noise():
    with pytest.raises(ArgumentError, match=r"zero_snr with prediction 'eps': .*; set prediction='v'"):
        replace(TINY, schedule=PURE_NOISE)


def test_metadata_of_earlier_versions_are_read_and_impossible_ones_refused(tmp_path):
    told = json.loads(to_json(replace(TINY, prediction="v")))
    del told["schedule"]["zero_snr"]
    assert from_json(json.dumps(told)) == replace(TINY, prediction="v")
    told["schedule"]["zero_snr"] = True
    assert from_json(json.dumps(told)) == CONFIG
    for change, message in (
        ({"prediction": "eps"}, "zero_snr with prediction 'eps'"),
        ({"schedule": {"zero_snr": 1}}, r"schedule\.zero_snr is 1, not bool"),
    ):
        bad = save_safetensors(checkpoint(), tmp_path / "x.safetensors", {CONFIG_KEY: json.dumps(told | change)})
        with pytest.raises(FileError, match=message):
            load(bad)


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_begins_at_the_last_trained_level(sampler):
    options, schedule = Sampling(sampler=sampler, steps=10), Schedule(zero_snr=True)
    assert options.grid_name(schedule) == "trailing"
    assert options.sigmas(schedule)[0] == schedule.sigma_max
    assert [schedule.timestep(sigma) for sigma in options.sigmas(schedule)[:-1]] == [999.0 - 100 * i for i in range(10)]


@pytest.mark.parametrize("family", FAMILIES)
def test_other_models_keep_the_grid_of_the_sampler(family):
    told = FAMILIES[family].schedule
    schedule = Schedule(told.start, told.end, told.steps, told.zero_snr)
    assert {name: Sampling(sampler=name).grid_name(schedule) for name in SAMPLERS} == DEFAULT_GRID


def test_a_grid_that_is_named_is_the_one():
    options, schedule = Sampling(sampler="ddim", grid="ddim", steps=10), Schedule(zero_snr=True)
    assert options.sigmas(schedule) == GRIDS["ddim"](schedule, 10)


@pytest.fixture(scope="module")
def told() -> LatentDiffusion:
    """A model that prompts can be read to."""
    torch.manual_seed(0)
    return LatentDiffusion(replace(CONFIG, text=(replace(CONFIG.text[0], vocab=49408),))).requires_grad_(False).eval()


def test_the_network_is_first_asked_about_the_noise_itself(told, monkeypatch):
    model, forward, asked = told, told.unet.forward, []

    def watched(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        asked.append((x, t))
        return forward(x, t, *rest)

    monkeypatch.setattr(model.unet, "forward", watched)
    noise = []
    (picture,) = txt2img(
        model, "", seeds=[3], steps=3, cfg=1, height=32, width=32, on_step=lambda step: noise.append(step.x)
    )
    assert [t.tolist() for _, t in asked] == [[999.0], [666.0], [332.0]]
    assert asked[0][0].equal(noise[0] / (1 + model.schedule.sigma_max**2) ** 0.5)
    assert 0.8 < asked[0][0].std() < 1.2
    assert picture.size == (32, 32)
    assert img2img(model, picture, "", seeds=[3], steps=4, strength=1)[0].size == (32, 32)
    assert asked[3][1].tolist() == [999.0, 999.0]


def test_a_picture_says_which_grid_it_was_made_on(told, ldm, tmp_path):
    save(told, tmp_path / "x.safetensors")
    for option, grid in (("", "trailing"), ("--grid karras", "karras")):
        line = (
            f"txt2img a --ckpt {tmp_path / 'x.safetensors'} --steps 1 --seed 1 --width 32 --height 32 --dtype "
            f"float32 --no-fast --out {tmp_path / grid}.png"
        )
        assert ldm(f"{line} {option}")[0] == 0
        assert read_metadata(tmp_path / f"{grid}.png")["grid"] == grid
