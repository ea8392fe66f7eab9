"""Memory of the CPU that is given back by one layer and taken by the next."""

from __future__ import annotations

import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LEAST, _MOST = 2**25, 2**31 - 1


@functools.cache
def keep_freed() -> bool:
    """Have the C library keep what is freed for what is asked for next, instead of returning every large tensor to the system.

    The system hands memory out in zeroed pages of 4 KB, one at a time: for the activations of a VAE that takes longer than the arithmetic.
    It holds for the whole process and until its end. Returns whether there is such a switch: glibc has one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = mallopt(_MMAP_THRESHOLD, _MOST) or mallopt(_MMAP_THRESHOLD, _LEAST)  # some versions refuse more
    return bool(mallopt(_TRIM_THRESHOLD, _MOST)) and bool(kept)
