"""Packages whose public names are imported when they are asked for: each name is there, and where the stub says."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

import pytest

import ldm
import ldm.fast
import weights

PACKAGES = [ldm, ldm.fast, weights]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_is_where_the_stub_says_and_no_other_is_there(package: ModuleType) -> None:
    stub = ast.parse(Path(package.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names if alias.asname is not None}
    own = {node.name for node in stub.body if isinstance(node, ast.FunctionDef)}
    assert sorted({*seen, *own}) == package.__all__ == dir(package)
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(package, name)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'lode'"):
        package.lode  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_no_public_name_is_that_of_a_file(package: ModuleType) -> None:
    assert not {path.stem for path in Path(package.__file__).parent.iterdir()} & set(package.__all__)
