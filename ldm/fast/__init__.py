"""The same functions, faster: the only place that knows of backends."""

import torch

from ldm.lazy import names_of

__getattr__, __dir__, __all__ = names_of(__name__, __file__, "pays")


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `optimize` has been measured to be faster there: float32 on a CPU, with a compiler."""
    if device.type != "cpu" or dtype != torch.float32:
        return False
    from ldm.fast import cpu

    return cpu.missing() is None
