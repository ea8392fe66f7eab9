"""What tests of fast networks are given."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend

from ldm.fast import gpu
from ldm.model import LatentDiffusion
from tests.made.families import build, tiny
from tests.made.kernels import INTERPRETED


@pytest.fixture
def plain_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that is there on every device and in every type."""
    monkeypatch.setattr(gpu, "_backend", lambda *_: SDPBackend.MATH)


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, tiles of 256 x 256: each takes milliseconds, however large it is."""
    if INTERPRETED:
        for name in ("ROWS", "COLS"):
            monkeypatch.setattr(gpu.kernels(), name, 256)


@pytest.fixture(scope="module")
def sd1() -> LatentDiffusion:
    return build(tiny("sd1"))
