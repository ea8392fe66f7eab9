"""A side in a process of its own says why it fails."""

from __future__ import annotations

import pytest

from benchmarks.sides import cells, process
from benchmarks.timing import turns


def test_a_side_that_fails_says_why(tmp_path):
    job = cells.Job("ldm", "sd1", True, str(tmp_path / "nothing"), "", "float32", "cpu", 1)
    with pytest.raises(process.SideFailed, match="nothing") as failed:
        turns.Turns(job)
    assert str(tmp_path) not in str(failed.value)  # it goes into a file that others read
