"""Sides take turns."""

from __future__ import annotations

from benchmarks.timing import turns


def test_sides_take_turns():
    order = []
    found = turns.in_turn({side: lambda side=side: order.append(side) or 1.0 for side in "ab"}, 3)
    assert "".join(order) == "ababab"
    assert found == {"a": [1.0] * 3, "b": [1.0] * 3}
