"""Every family's networks against diffusers and transformers, where they are installed: one folder, read by both."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from benchmarks.models import families
from benchmarks.models.golden import relative

TOLERANCE = 1e-5  # float32; measured: at most 4.9e-6, and 0 for most


@pytest.mark.parametrize("family", families.FOLDERS)
@torch.no_grad()
def test_every_network_gives_what_diffusers_gives(family: str, tmp_path: Path) -> None:
    for name, ours, theirs in families.rows(family, tmp_path / family):
        assert theirs.std() > 0.01, name
        assert relative(ours, theirs) < TOLERANCE, name
