"""SD 1 at its full size: pictures from checkpoints in the original layouts, and the networks against diffusers.

That every tensor of these files arrives, in all three layouts and in bounded memory, is in
tests/weights/test_models_memory.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.models.published import manifest, seeded
from benchmarks.parity import peer_rows
from ldm.config import FAMILIES
from ldm.tasks import txt2img
from tests.made.checkpoints import lightning, save_safetensors, save_zip
from weights import load

pytestmark = pytest.mark.slow

PROMPT = "a photograph of an astronaut riding a horse"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A training checkpoint of 4.3 GB in float32, and the same weights as a pruned float16 file of 2.1 GB."""
    folder = tmp_path_factory.mktemp("full")
    with lightning(seeded(manifest("sd1"))) as contents:
        save_zip(contents, folder / "float32.ckpt")
    save_safetensors(seeded(manifest("sd1-pruned-fp16")), folder / "float16.safetensors")
    yield folder
    for path in folder.iterdir():
        path.unlink()


def picture(path: Path, dtype: torch.dtype) -> Image.Image:
    model = load(path, dtype=dtype)
    assert model.config == FAMILIES["sd1"]
    return txt2img(model, PROMPT, seeds=[7], sampler="ddim", steps=2)[
        0
    ]  # raises NonFinite rather than give a black picture


def test_full_size_pictures_hardly_depend_on_the_type_of_numbers(folder: Path) -> None:
    """In bfloat16 one forward is off by about 2e-2 of its output (some 400 roundings of relative size 1.1e-3, added
    like a random walk). Guidance 7.5 makes up to sqrt(6.5^2 + 7.5^2) = 10 times as much of it: 0.2 of the rms. Two
    unrelated pictures, such as the left and right halves of one, are sqrt(2) times the rms apart: a seventh of that is
    expected, a quarter is allowed."""
    pictures = [
        picture(folder / "float32.ckpt", torch.float32),
        picture(folder / "float16.safetensors", torch.bfloat16),
    ]
    assert [p.size for p in pictures] == [(512, 512)] * 2
    exact, rounded = (np.asarray(p, dtype=np.float64) for p in pictures)
    unrelated = np.sqrt(np.square(exact[:, :256] - exact[:, 256:]).mean())
    assert unrelated > 10  # of 255 levels: there is something in the picture
    assert np.sqrt(np.square(rounded - exact).mean()) < unrelated / 4


def test_full_size_networks_agree_with_diffusers() -> None:
    pytest.importorskip("diffusers", reason="the comparison needs the extra 'bench'")
    far = [row for row in peer_rows(FAMILIES["sd1"]) if not row.ok]
    assert not far
