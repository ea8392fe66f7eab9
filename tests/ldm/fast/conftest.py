"""What tests of the kernels on a GPU are given."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend

from ldm.fast import gpu
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
