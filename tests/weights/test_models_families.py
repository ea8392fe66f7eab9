"""Every published single file, with its exact names at narrow widths: it loads strictly, to the tensors it means, and
is saved as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.models.published import FILES, MANIFESTS, meaning, narrowed, tiny
from benchmarks.models.seeded import weight
from ldm.errors import FileError
from ldm.model import LatentDiffusion
from tests.made.checkpoints import accounted, ema_name, save_safetensors, save_stream, save_zip
from weights import load, open_file, save
from weights.names.blank import built

MODELS = [name for name, family in FILES.items() if family]
BOOKKEEPING = ("position_ids", "logit_scale", "decay", "num_updates", "sigmas")


def config_of(file: str):
    return tiny(FILES[file])


def assert_same(model: LatentDiffusion, meant: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Every parameter is bit by bit what the file means, converted."""
    found = model.state_dict()
    assert set(found) == set(meant)
    assert not [name for name, value in found.items() if not value.equal(meant[name].to(dtype))]


@pytest.mark.parametrize("family", sorted(set(FILES.values()) - {None, ""}))
def test_a_network_without_numbers_is_all_parameters_without_memory(family: str) -> None:
    """A load fills the parameters: of what else a network keeps, nothing may be left on the meta device."""
    model = built(lambda: LatentDiffusion(tiny(family)))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not list(model.buffers())
    assert model.state_dict().keys() == dict(model.named_parameters(remove_duplicate=False)).keys()


def test_every_manifest_has_its_row():
    assert set(FILES) == {path.name.removesuffix(".json.gz") for path in MANIFESTS.glob("*.gz")}


@pytest.mark.parametrize("file", MODELS)
def test_a_published_file_loads_bit_by_bit_and_is_saved_as_it_was(file: str, tmp_path: Path) -> None:
    state = narrowed(file)
    model = load(save_safetensors(state, tmp_path / "x.safetensors"), config_of(file))
    assert_same(model, meaning(state))
    assert not model.training
    again = save(model, tmp_path / "again.safetensors", dtype=None)
    with open_file(again) as saved:
        if file not in ("sd2-sgm", "ssd-1b-hfscript"):  # whose text tower is saved under the usual names
            assert set(saved) <= set(state)
            assert all(saved[key].equal(state[key].float()) for key in saved)
    assert_same(load(again), meaning(state))


def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("file", MODELS)
def test_every_key_of_a_published_file_is_loaded_or_ignored_for_a_reason(file: str) -> None:
    found = shapes(narrowed(file))
    wanted = {
        name: tuple(value.shape) for name, value in built(lambda: LatentDiffusion(config_of(file))).state_dict().items()
    }
    made = accounted(found, wanted)
    assert set(made.places) == set(wanted)
    assert {key for place in made.places.values() for key in place.keys} | set(made.ignored) == set(found)
    assert all(made.ignored.values())


@pytest.mark.parametrize("save_as", [save_zip, save_stream])
@pytest.mark.parametrize("file", ["sd2-base", "sd-image-variations"])
def test_the_thirds_of_an_attention_come_from_a_pickle_too(file: str, save_as, tmp_path: Path) -> None:
    """Storages lie at any address there, may be strided, and one may hold several tensors."""
    state = narrowed(file)
    keys = [key for key in state if "in_proj_weight" in key]
    state[keys[0]] = state[keys[0]].t().contiguous().t()
    state[keys[1]], state[keys[2]] = torch.stack([state[keys[1]], state[keys[2]]]).unbind()
    path = save_as({"state_dict": state}, tmp_path / "x.ckpt")
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(load(path, config_of(file), dtype=dtype), meaning(state), dtype)


def test_a_damaged_third_is_noticed(tmp_path: Path) -> None:
    """The file states one checksum for the whole stack."""
    state = narrowed("sd2-base")
    key = "cond_stage_model.model.transformer.resblocks.5.attn.in_proj_weight"
    path = save_zip(state, tmp_path / "x.ckpt")
    data = path.read_bytes()
    at = data.index(state[key].numpy().tobytes())
    path.write_bytes(data[: at + 100] + bytes([data[at + 100] ^ 1]) + data[at + 101 :])
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(FileError, match=r"checksum of .*in_proj_weight is wrong"):
            load(path, config_of("sd2-base"), dtype=dtype)


@pytest.mark.parametrize("file", ["sd2-base", "sd2-sgm", "x4-upscaler", "sdxl-refiner", "sd-image-variations"])
def test_the_moving_average_of_any_family_takes_the_place_of_its_unet(file: str, tmp_path: Path) -> None:
    state = narrowed(file)
    averages = {
        key: weight("ema " + key, value.shape).to(value.dtype)
        for key, value in state.items()
        if key.startswith("model.diffusion_model.")
    }
    path = save_safetensors(
        state | {ema_name(key): value for key, value in averages.items()}, tmp_path / "x.safetensors"
    )
    assert_same(load(path, config_of(file)), meaning(state))
    assert_same(load(path, config_of(file), ema=True), meaning(state | averages))
    with pytest.raises(FileError, match="has no moving average"):
        load(save_safetensors(state, tmp_path / "y.safetensors"), config_of(file), ema=True)
