"""Whether the fast code of the CPU can be compiled here."""

from __future__ import annotations

import pytest

from ldm.fast import cpu
from ldm.fast.compiler import CannotCompile


def _why_not() -> str:
    try:
        cpu.library()
    except CannotCompile as fault:
        return str(fault)
    return ""


compiled_only = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "there is a compiler")
