"""The operations of `ldm.fast.plain` for a GPU: by Triton, cuDNN, cuBLAS, and the quickest attention."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def available(device: torch.device) -> bool:
    """Whether these operations run on a device: Triton is installed, and compiles for it (compute capability 8.0)."""
    return (
        device.type == "cuda"
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@functools.cache
def kernels() -> ModuleType:
    """`ldm.fast.kernels`, imported at first use: Triton takes its time, and not every PyTorch comes with it."""
    from ldm.fast import kernels

    return kernels


def lay_out(network: nn.Module) -> None:
    """Store the weights of convolutions channels last, as cuDNN would otherwise copy them at every call.

    Parameters, numbers and the amount of memory stay; the order in memory changes, also for models that share them.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def norm(x: Tensor, norm: nn.GroupNorm, silu: bool = False, unit: float = 1.0) -> Tensor:
    """As `plain.norm`; x and the result are `unit` times their values."""
    return kernels().group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=silu, unit=unit)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """As `plain.layer_norm`."""
    return kernels().layer_norm(x, norm.weight, norm.bias, norm.eps)


def conv(x: Tensor, conv: nn.Conv2d, add: Tensor | None = None) -> Tensor:
    """As `plain.conv`."""
    return convolved(x, conv, conv.bias, add)


def conv_up(x: Tensor, conv: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """As `plain.conv_up`."""
    return convolved(enlarged(x, size), conv, conv.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """As `plain.linear`. cuBLAS adds the bias; PyTorch would copy `add` for it, which is no quicker than to add it."""
    y = F.linear(x, weight, bias)
    return y if add is None else y + add


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `plain.geglu`."""
    return kernels().gated(F.linear(x, weight, bias))


def convolved(x: Tensor, conv: nn.Conv2d, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """`conv` with another bias: the bias and `add`, if there is one, are added in one pass over cuDNN's output."""
    before, cudnn.benchmark = (
        cudnn.benchmark,
        True,
    )  # in the way measured to be quickest for a shape; cuDNN remembers it
    try:
        y = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, bias if add is None else None, conv.stride, conv.padding)
    finally:
        cudnn.benchmark = before
    y = y.permute(0, 2, 3, 1).contiguous()
    return y if add is None else kernels().plus(y, bias, add.contiguous())


def enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """[b, h, w, c] at another height and width, by its nearest values."""
    return F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="nearest").permute(0, 2, 3, 1)


BACKENDS: dict[SDPBackend, Callable[[cuda.SDPAParams], bool]] = {
    SDPBackend.CUDNN_ATTENTION: cuda.can_use_cudnn_attention,
    SDPBackend.FLASH_ATTENTION: cuda.can_use_flash_attention,
    SDPBackend.EFFICIENT_ATTENTION: cuda.can_use_efficient_attention,
}
REPEATS = 10
_fastest: dict[tuple[object, ...], SDPBackend] = {}


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As `plain.attend`, by the backend that was quickest when these shapes were first seen."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(_backend(q, k, v)):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _backend(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend:
    """The quickest of the able backends; while a graph is captured, when none can be measured, the first of them."""
    key = (q.device, q.dtype, *((t.shape, t.stride()) for t in (q, k, v)))
    if key not in _fastest:
        params = cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        with sdpa_kernel([*BACKENDS]):  # whatever somebody has allowed around this call
            able = [backend for backend, can in BACKENDS.items() if can(params)] or [SDPBackend.MATH]
        if len(able) > 1 and torch.cuda.is_current_stream_capturing():
            return able[0]
        _fastest[key] = able[0] if len(able) == 1 else min(able, key=lambda backend: _milliseconds(backend, q, k, v))
    return _fastest[key]


def _milliseconds(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> float:
    """How long REPEATS calls take on the GPU, which is kept busy until all are queued: launching them does not count.

    Infinitely long where the backend refuses after all: cuDNN finds no plan for some shapes.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device_of(q), sdpa_kernel(backend):
        try:
            F.scaled_dot_product_attention(q, k, v)  # plans and compiles
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            return math.inf
        busy = torch.zeros(2048, 2048, device=q.device)
        for _ in range(8):
            busy = busy @ busy
        begin.record()
        for _ in range(REPEATS):
            F.scaled_dot_product_attention(q, k, v)
        end.record()
    end.synchronize()
    return begin.elapsed_time(end)
