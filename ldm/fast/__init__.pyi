"""Where each public name of this package is: for type checkers, and for `__init__.py`, which imports it when asked."""

import torch

from ldm.fast.choice import optimize as optimize
from ldm.fast.groupnorm import fast_group_norms as fast_group_norms

def pays(device: torch.device, dtype: torch.dtype) -> bool: ...
