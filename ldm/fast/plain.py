"""What every fused operation means, in plain PyTorch: the tests' reference, and what runs where there are no kernels.

All operations take and give channels last: pictures are [b, h, w, c], tokens [b, n, c], both contiguous, so that one is
a view of the other. A backend is a module with functions of these names and meanings.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def norm(x: Tensor, norm: nn.GroupNorm, silu: bool = False) -> Tensor:
    """GroupNorm of [b, ..., c] over all positions, then SiLU if asked."""
    y = F.group_norm(x.movedim(-1, 1), norm.num_groups, norm.weight, norm.bias, norm.eps).movedim(1, -1)
    return (F.silu(y) if silu else y).contiguous()


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm of [b, n, c] over c."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def conv(x: Tensor, conv: nn.Conv2d, add: Tensor | None = None) -> Tensor:
    """A convolution of [b, h, w, c], plus `add`: [b, o] for every position (time embedding), or [b, h, w, o]."""
    y = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
    return y if add is None else y + (add[:, None, None] if add.ndim == 2 else add)


def conv_up(x: Tensor, conv: nn.Conv2d, size: tuple[int, int]) -> Tensor:
    """Nearest enlargement of [b, h, w, c] to `size` (twice the size, or one less), then a 3x3 convolution."""
    y = conv(F.interpolate(x.permute(0, 3, 1, 2), size=size, mode="nearest"))
    return y.permute(0, 2, 3, 1).contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """x weight^T + bias + add: [..., i], [o, i], [o], [..., o] -> [..., o]."""
    y = F.linear(x, weight, bias)
    return y if add is None else y + add


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[..., i] -> [..., o]: value * gelu(gate), the exact GELU; a projection [2 o, i] has the rows of values first."""
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head: [b, n, h d], [b, m, h d], [b, m, h d] -> [b, n, h d]."""
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
