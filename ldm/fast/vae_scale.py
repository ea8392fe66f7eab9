"""The operations of `ldm.fast.gpu` for a VAE whose activations do not fit into half precision: all of them as so many times their value.

SDXL's VAE reaches numbers that float16 does not have. Everything inside passes through linear maps, GroupNorms and one attention, so it can
be carried in a smaller unit, with the trained weights as they are. With u = 2^-7 and x' = u x:
a convolution or product gives u y for u x if its bias is u b; a GroupNorm of u x with eps u^2 gives the norm of x, and is multiplied by u
after its SiLU; attention takes q' / u, k' / u and v'. What comes in at the first convolution is multiplied by u, and what leaves the last
divided by it. Powers of two round nothing, so the result differs only where numbers leave float16's range: 2^16 is reached at 8.4 million
instead of 65,504, and the full 11 bits end at 2^-14 / u = 0.008, below which an error of 2^-25 / u = 4e-6 is made where half of the last bit
of a number around 0.008 is as much. That is less than rounding costs wherever the root mean square is above 0.01.
"""

from __future__ import annotations

from torch import Tensor, nn

from ldm.fast import gpu

UNIT = 2.0**-7
GROUPS = 32  # of all norms: a convolution from or to another number of channels than a multiple of it is the first or the last


def norm(x: Tensor, norm: nn.GroupNorm, silu: bool = False) -> Tensor:
    """As `plain.norm`, in units."""
    return gpu.norm(x, norm, silu, UNIT)


def conv(x: Tensor, conv: nn.Conv2d, add: Tensor | None = None) -> Tensor:
    """As `plain.conv`, in units; the first convolution of a network takes plain numbers and the last one gives them."""
    x = x * UNIT if conv.in_channels % GROUPS else x
    y = gpu.convolved(x, conv, conv.bias * UNIT, add)
    return y / UNIT if conv.out_channels % GROUPS else y


def conv_up(x: Tensor, conv: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """As `plain.conv_up`, in units."""
    return gpu.convolved(gpu.enlarged(x, size), conv, conv.bias * UNIT)


def linear(x: Tensor, weight: Tensor, bias: Tensor, add: Tensor | None = None) -> Tensor:
    """As `plain.linear`, in units."""
    return gpu.linear(x, weight, bias * UNIT, add)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As `plain.attend`, in units."""
    return gpu.attend(q / UNIT, k / UNIT, v, heads)
