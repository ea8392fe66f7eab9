"""What `import weights` gives: every public name, imported when it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import weights

ROOT = Path(__file__).parents[2]


def fresh(code: str) -> str:
    """The output of Python code in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_every_public_name_is_there_and_no_other():
    for name in weights.__all__:
        found = getattr(weights, name)
        assert name == "LEFTOVERS" or found.__name__ == name
    assert dir(weights) == weights.__all__
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        weights.lode  # noqa: B018


def test_type_checkers_see_the_names_where_they_are():
    """The stub, from which the package learns where its names are, is read by them as Python."""
    tree = ast.parse((ROOT / "weights" / "__init__.pyi").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.asname is not None}
    assert sorted(seen) == weights.__all__
    for name, module in seen.items():
        assert getattr(sys.modules.get(module) or __import__(module, fromlist=[name]), name) is getattr(weights, name)


def test_no_public_name_is_that_of_a_module():
    assert not {path.stem for path in (ROOT / "weights").iterdir()} & set(weights.__all__)


def test_a_name_brings_in_what_it_needs_and_no_more():
    alone = fresh("import sys, weights; print(*sorted(name for name in sys.modules if name.startswith('weights')))")
    assert alone == "weights"
    code = "import sys, weights; weights.load; print(*(name for name in sys.modules if name.startswith('weights.')))"
    assert not {name.split(".")[1] for name in fresh(code).split()} & {"tools", "adapters"}
