"""Results together with the warnings that came on the way."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any


def caught(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What it gives, and the warnings on the way."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        out = run()
    assert all(w.category is UserWarning for w in seen)
    return out, [str(w.message) for w in seen]
