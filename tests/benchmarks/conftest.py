"""Tests of the benchmarks are marked, so that an inner loop can leave them out."""

from __future__ import annotations

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark)
