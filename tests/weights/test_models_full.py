"""Published checkpoints at full size in bfloat16, from the single file and from the folder: minutes each, and up to 16
GB of memory and 15 GB of disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.models.folders import (
    FOLDERS,
    STATISTIC,
    component,
    config_json,
    folder_config,
    write_component,
    write_index,
)
from benchmarks.models.published import manifest, meaning
from benchmarks.models.seeded import weight
from ldm.config import FAMILIES
from tests.made.checkpoints import save_safetensors
from weights import load

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "x4-upscaler", "sdxl-base", "ssd-1b"])
def test_a_full_size_checkpoint_loads_from_both_layouts_bit_by_bit(family: str, tmp_path: Path) -> None:
    state = {
        key: weight(key, shape).bfloat16()
        for key, (shape, dtype) in manifest(family).items()
        if dtype.is_floating_point
    }
    if family == "sd2-v":
        state[STATISTIC] = torch.tensor([0.2, -0.2] * 160).bfloat16()
    file, folder = tmp_path / "x.safetensors", tmp_path / "folder"
    try:
        meant = meaning(state)
        save_safetensors(state, file)
        model = load(file, dtype=torch.bfloat16)
        assert model.config == FAMILIES[family]
        found = model.state_dict()
        assert set(found) == set(meant)
        assert not [name for name, value in found.items() if not value.equal(meant[name])]
        del model, found
        folder.mkdir()
        for name in FOLDERS[family]:
            write_component(
                folder / name, component(family, name, meant, wide=True), config_json(family, name, wide=True)
            )
        write_index(folder, family, FOLDERS[family])
        model = load(folder, dtype=torch.bfloat16)
        assert model.config == folder_config(family, wide=True)
        assert not [name for name, value in model.state_dict().items() if not value.equal(meant[name])]
    finally:
        for path in [file, *folder.glob("*/*.safetensors")]:
            path.unlink(missing_ok=True)
