"""What is saved loads again bit by bit, here and in other tools, and a save that fails leaves no trace."""

from __future__ import annotations

import errno
import os
import sys

import pytest
import safetensors
import safetensors.torch
import torch

from benchmarks.models.published import original_name
from ldm.errors import FileError, OutputError
from tests.made.checkpoints import TINY, checkpoint, save_safetensors
from weights import load, open_file, original_state, save
from weights.models import embedded


@pytest.fixture
def model(tmp_path):
    return load(save_safetensors(checkpoint(), tmp_path / "source.safetensors"), TINY)


def test_original_names_are_those_of_the_published_file(model):
    state = original_state(model)
    assert set(state) == {original_name(name) for name in model.state_dict()}
    assert all(
        state[original_name(name)].data_ptr() == value.data_ptr() for name, value in model.state_dict().items()
    )  # no copies


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, None])
def test_what_is_saved_loads_again_without_a_config(dtype, model, tmp_path):
    path = save(model, tmp_path / "x.safetensors", {"title": "t\u00e9st"}, dtype=dtype)
    again = load(path)
    assert again.config == TINY
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].equal(value.to(dtype or torch.float32).float())
    with open_file(path) as file:
        assert file.metadata["title"] == "t\u00e9st"
        assert {spec.dtype for spec in file.specs.values()} == {dtype or torch.float32}


def test_other_tools_read_what_is_saved(model, tmp_path):
    path = save(model, tmp_path / "x.safetensors")
    theirs = safetensors.torch.load_file(path)
    ours = original_state(model)
    assert set(theirs) == set(ours)
    assert all(theirs[key].equal(value.half()) for key, value in ours.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_the_same_model_gives_the_same_bytes(model, tmp_path):
    assert save(model, tmp_path / "a").read_bytes() == save(model, tmp_path / "b").read_bytes()


def test_a_file_is_not_overwritten_unasked(model, tmp_path):
    path = save(model, tmp_path / "x.safetensors")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        save(model, path, dtype=torch.float32)
    assert path.read_bytes() == before
    save(model, path, dtype=torch.float32, overwrite=True)
    assert len(path.read_bytes()) > len(before)
    (tmp_path / "link").symlink_to("/dev/null")
    with pytest.raises(OutputError, match="not a regular file"):
        save(model, tmp_path / "link", overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        save(model, tmp_path / "nowhere" / "x.safetensors")


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_file_and_no_other(call, model, tmp_path, monkeypatch):
    path = save(model, tmp_path / "x.safetensors")
    before, names = path.read_bytes(), sorted(os.listdir(tmp_path))
    real, calls = getattr(os, call), []

    def fail(*arguments):
        calls.append(arguments)
        if call != "write" or len(calls) == 100:  # in the middle of the tensors
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match="No space left on device"):
        save(model, path, overwrite=True, dtype=torch.float32)
    assert calls
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == names


def test_an_interrupted_save_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        save(model, tmp_path / "x.safetensors")
    assert sorted(os.listdir(tmp_path)) == names


def test_short_writes_are_continued(model, tmp_path, monkeypatch):
    whole = save(model, tmp_path / "a").read_bytes()
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:100_000]))
    assert save(model, tmp_path / "b").read_bytes() == whole


def test_numbers_that_float16_cannot_hold_are_an_error(model, tmp_path):
    model.unet.time_embed[0].weight[0, 0] = 1e5
    with pytest.raises(OutputError, match=r"too large for float16; write float32 or bfloat16") as caught:
        save(model, tmp_path / "x.safetensors")
    assert caught.value.key == "model.diffusion_model.time_embed.0.weight"
    assert not (tmp_path / "x.safetensors").exists()
    save(model, tmp_path / "x.safetensors", dtype=torch.float32)


def test_without_a_path_the_model_that_ships_is_loaded(model, tmp_path, monkeypatch):
    home = tmp_path / "embedded"
    home.mkdir()
    monkeypatch.setattr(sys.modules["weights.models"], "EMBEDDED", home)
    with pytest.raises(FileError, match="0 models ship"):
        embedded()
    save(model, home / "blocks.safetensors")
    assert load().config == TINY
