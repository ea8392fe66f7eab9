"""Where fast code runs in tests: Triton's kernels on a GPU or in its interpreter, the CPU's where a compiler is."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from torch import nn

from ldm.fast import cpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read by Triton when it is imported
DEVICE = "cpu" if INTERPRETED else "cuda"

_why = cpu.missing()
compiled_only = pytest.mark.skipif(_why is not None, reason=_why or "there is a compiler")


def on_the_device(test: Callable[..., None]) -> Callable[..., None]:
    """A test that needs a GPU, or the interpreter instead."""
    return test if INTERPRETED else pytest.mark.gpu(test)


def few_groups(network: nn.Module) -> nn.Module:
    """`network` with norms over 4 groups instead of 32: in the interpreter each group takes milliseconds."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 4
    return network
