"""The operations of `ldm.fast.gpu` for a VAE whose activations do not fit into half precision: in a smaller unit.

SDXL's VAE reaches numbers that float16 does not have. Everything inside passes through linear maps, GroupNorms and one
attention, so it can be carried in a smaller unit, with the trained weights as they are. With u = 2^-7 and x' = u x:
a convolution or product gives u y for u x if its bias is u b; a GroupNorm of u x with eps u^2 gives the norm of x, and
is multiplied by u after its SiLU; attention takes q' / u, k' / u and v'. The input of the first convolution is
multiplied by u, and the output of the last divided by it. Powers of two round nothing, so the result differs only where
numbers leave float16's range: 2^16 is reached at 8.4 million instead of 65,504, and the full 11 bits end at
2^-14 / u = 0.008. Below that an error of 2^-25 / u = 4e-6 is made, as much as half of the last bit of a number around
0.008. That is less than rounding costs wherever the root mean square is above 0.01.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm.fast import gpu

UNIT = 2.0**-7
GROUPS = 32  # of all norms: only the first convolution takes, and the last gives, channels that are no multiple of it


def norm(x: Tensor, norm: nn.GroupNorm, silu: bool = False) -> Tensor:
    """As `plain.norm`, in units."""
    return gpu.norm(x, norm, silu, UNIT)


def conv(x: Tensor, conv: nn.Conv2d, add: Tensor | None = None) -> Tensor:
    """As `plain.conv`, in units; the first convolution of a network takes plain numbers and the last one gives them."""
    x = x * UNIT if conv.in_channels % GROUPS else x
    y = gpu.convolved(x, conv, _in_units(conv.bias), add)
    return y / UNIT if conv.out_channels % GROUPS else y


def conv_up(x: Tensor, conv: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """As `plain.conv_up`, in units."""
    return gpu.convolved(gpu.enlarged(x, size), conv, _in_units(conv.bias))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """As `plain.linear`, in units."""
    return gpu.linear(x, weight, _in_units(bias), add)


def _in_units(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias * UNIT


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As `plain.attend`, in units."""
    return gpu.attend(q / UNIT, k / UNIT, v, heads)
