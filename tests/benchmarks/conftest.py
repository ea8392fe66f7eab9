"""Tests of the benchmarks are marked, so that an inner loop can leave them out; and what several of them need."""

from __future__ import annotations

import pytest


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.benchmark)


@pytest.fixture
def with_peers() -> None:
    """Only where the libraries are that diffusers' training needs."""
    for package in ("diffusers", "accelerate", "peft"):
        pytest.importorskip(package, reason="the comparison needs the extra 'bench'")
