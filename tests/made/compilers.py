"""Whether the fast code of the CPU can be compiled here."""

from __future__ import annotations

import pytest

from ldm.fast import cpu

_why = cpu.missing()
compiled_only = pytest.mark.skipif(_why is not None, reason=_why or "there is a compiler")
