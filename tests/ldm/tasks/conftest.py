"""What tests of the tasks are given: a tiny model, a picture, and what the network was asked."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm import LatentDiffusion
from tests.made.families import build


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build()


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """(x, t, context, y) of every network call."""
    from ldm.networks.unet import UNet

    seen: list[tuple[Tensor, ...]] = []
    forward = UNet.forward
    monkeypatch.setattr(
        UNet,
        "forward",
        lambda self, x, t, context, y=None: (seen.append((x, t, context, y)), forward(self, x, t, context, y))[1],
    )
    return seen


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are shown as they are: decoding large pictures takes most of the time, and is another test's subject."""
    monkeypatch.setattr(
        "ldm.limits.precision.decode",
        lambda model, latent, tile=None: F.interpolate(latent[:, :3], scale_factor=model.config.vae.factor).clamp(
            -1, 1
        ),
    )
