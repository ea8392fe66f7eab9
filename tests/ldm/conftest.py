"""What tests of pictures are given."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def noisy() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
