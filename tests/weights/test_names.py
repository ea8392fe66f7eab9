"""What asking for a name of `weights` imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fresh(code: str) -> str:
    """The output of Python code in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_name_brings_in_what_it_needs_and_no_more():
    alone = fresh("import sys, weights; print(*sorted(name for name in sys.modules if name.startswith('weights')))")
    assert alone == "weights"
    code = "import sys, weights; weights.load; print(*(name for name in sys.modules if name.startswith('weights.')))"
    assert not {name.split(".")[1] for name in fresh(code).split()} & {"tools", "adapters"}
