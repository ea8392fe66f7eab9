"""Every published single file, with its exact names at narrow widths: it loads strictly, to the tensors it means, and is saved as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm.errors import FileError
from ldm.model import LatentDiffusion
from tests.checkpoints import FILES, MANIFESTS, meaning, narrowed, save_safetensors, tiny
from weights import load, open_file, save
from weights.layout import original
from weights.load import built
from weights.plan import plan

MODELS = [name for name, family in FILES.items() if family]
BOOKKEEPING = ("position_ids", "logit_scale", "decay", "num_updates", "sigmas")


def config_of(file: str):
    return tiny(FILES[file])


def assert_same(model: LatentDiffusion, meant: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Every parameter is bit by bit what the file means, converted."""
    found = model.state_dict()
    assert set(found) == set(meant)
    assert not [name for name, value in found.items() if not value.equal(meant[name].to(dtype))]


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


def error(what: str, key: str | None = None) -> FileError:
    return FileError(what, path="x", key=key)


@pytest.mark.parametrize("file", MODELS)
def test_every_key_of_a_published_file_is_loaded_or_ignored_for_a_reason(file: str) -> None:
    found = shapes(narrowed(file))
    wanted = {name: tuple(value.shape) for name, value in built(lambda: LatentDiffusion(config_of(file))).state_dict().items()}
    made = plan(original(found), wanted, found, error)
    assert set(made.sources) == set(wanted)
    assert {key for place in made.sources.values() for key in place.keys} | set(made.ignored) == set(found)
    assert all(made.ignored.values())
