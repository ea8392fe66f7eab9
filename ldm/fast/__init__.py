"""The same functions, faster: the only place that knows of backends."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ldm.fast.choice import optimize
    from ldm.fast.groupnorm import fast_group_norms

__all__ = ["fast_group_norms", "optimize", "pays"]


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `optimize` has been measured to be faster there: float32 on a CPU, with a compiler."""
    if device.type != "cpu" or dtype != torch.float32:
        return False
    from ldm.fast import cpu

    return cpu.missing() is None


def __getattr__(name: str) -> Any:
    """A function from its file when it is first asked for: where nothing is to be faster, no backend is imported."""
    files = {"fast_group_norms": "groupnorm", "optimize": "choice"}
    if name not in files:
        raise AttributeError(f"module 'ldm.fast' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"ldm.fast.{files[name]}"), name)
    return globals()[name]
