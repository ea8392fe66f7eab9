"""The fused operations of `ldm.fast.plain` in C++ for float32 on a CPU, from ldm/fast/cpu.cpp."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.fast import plain
from ldm.fast.compiler import CannotCompile, compiled

_POINTER, _WHOLE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_TAKES = {
    "ldm_linear": [*[_POINTER] * 5, *[_WHOLE] * 3, _INT, _INT],
    "ldm_conv": [*[_POINTER] * 5, *[_WHOLE] * 7, _INT, _INT, _INT],
    "ldm_attend": [*[_POINTER] * 4, *[_WHOLE] * 8, _INT],
    "ldm_norm": [*[_POINTER] * 4, *[_WHOLE] * 4, ctypes.c_double, _INT, _INT],
}


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions. Raises `ldm.fast.compiler.CannotCompile`."""
    return prepared(compiled("cpu.cpp"))


def missing() -> str | None:
    """Why these operations cannot be had here; None: they can."""
    try:
        library()
    except CannotCompile as fault:
        return str(fault)
    return None


def prepared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions' arguments."""
    for name, takes in _TAKES.items():
        getattr(library, name).argtypes = takes
    return library


def norm(x: Tensor, norm: nn.GroupNorm, silu: bool = False) -> Tensor:
    """As `plain.norm`."""
    y = x.new_empty(x.shape)
    b, c = x.shape[0], x.shape[-1]
    _run("ldm_norm", (x, norm.weight, norm.bias, y), b, x.numel() // (b * c), c, norm.num_groups, norm.eps, silu)
    return y


layer_norm = plain.layer_norm


def conv(x: Tensor, conv: nn.Conv2d, add: Tensor | None = None) -> Tensor:
    """As `plain.conv`; by Winograd's algorithm where it is a 3x3 convolution of stride 1 with many channels."""
    wide = conv.in_channels >= 16 and conv.out_channels >= 16
    if not (wide and conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.padding == (1, 1)):
        return plain.conv(x, conv, add)
    return _winograd(x, conv, x.shape[1:3], False, add)


def conv_up(x: Tensor, conv: nn.Conv2d, size: Sequence[int]) -> Tensor:
    """As `plain.conv_up`; the enlarged picture is never written."""
    return _winograd(x, conv, size, True, None)


def _winograd(x: Tensor, conv: nn.Conv2d, size: Sequence[int], up: bool, add: Tensor | None) -> Tensor:
    b, h, w, c = x.shape
    y = x.new_empty(b, *size, conv.out_channels)
    kind = 0 if add is None else 1 if add.ndim == 2 else 2
    _run("ldm_conv", (x, conv.weight, conv.bias, add, y), b, h, w, c, *size, conv.out_channels, up, kind)
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """As `plain.linear`."""
    n, k = weight.shape
    y = x.new_empty(*x.shape[:-1], n)
    _run("ldm_linear", (x, weight, bias, add, y), x.numel() // k, n, k, False)
    return y


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `plain.geglu`; the projection is never written."""
    n, k = len(weight) // 2, weight.shape[1]
    y = x.new_empty(*x.shape[:-1], n)
    _run("ldm_linear", (x, weight, bias, None, y), x.numel() // k, n, k, True)
    return y


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As `plain.attend`."""
    b, n, c = q.shape
    y = q.new_empty(b, n, c)
    _run("ldm_attend", (q, k, v, y), b, heads, n, k.shape[1], c // heads, c, c, c)
    return y


def _run(name: str, tensors: Sequence[Tensor | None], *numbers: float) -> None:
    """Call a function with where the tensors lie, as contiguous ones, and the numbers.

    Raises TypeError for tensors that are not float32 in the CPU's memory, and MemoryError.
    """
    held = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    for tensor in held:
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            raise TypeError(f"{name}: {tensor.dtype} on {tensor.device}; these operations are for float32 on the CPU")
    if getattr(library(), name)(
        *(None if tensor is None else tensor.data_ptr() for tensor in held), *numbers, torch.get_num_threads()
    ):
        raise MemoryError(f"{name}: no memory for its working space")
