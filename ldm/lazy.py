"""Public names that are imported when they are first asked for: a command then imports only what it needs."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def names_of(package: str, file: str, *own: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose `__init__.pyi` says where each public name comes from.

    package, file  its `__name__` and `__file__`
    own            public names that `__init__.py` defines itself
    """
    stub = Path(file).with_suffix(".pyi").read_text(encoding="utf-8")
    home = {name: module for module, name in re.findall(r"^from ([\w.]+) import (\w+) as", stub, re.MULTILINE)}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(import_module(home[name]), name)
        setattr(sys.modules[package], name, found)
        return found

    public = sorted([*home, *own])
    return get, lambda: public, public
