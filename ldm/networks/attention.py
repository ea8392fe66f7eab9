"""The transformer inside the UNet."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.networks.modules import Layers, M, Modules


class Attend(nn.Module):
    """softmax(q k^T / sqrt(d)) v, without parameters: swap this module to look at attention or to change it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # q [b, h, n, d], k and v [b, h, m, d]; as q
        return F.scaled_dot_product_attention(q, k, v)


class CrossAttention(nn.Module):
    """Multi-head attention of x to a context, which is x itself in self-attention."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        widths = (dim, context_dim, context_dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, dim, bias=False) for width in widths)
        self.to_out = Layers(nn.Linear(dim, dim), nn.Dropout(0.0))
        self.attend: nn.Module = Attend()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # x [b, n, dim], context [b, m, context_dim]
        q, k, v = (
            rearrange(y, "b n (h d) -> b h n d", h=self.heads)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(self.attend(q, k, v), "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """x * gelu(gate) (Shazeer 2020, "GLU Variants Improve Transformer"), with the exact GELU, as trained."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a linear layer, four times as wide inside."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = Layers(GEGLU(dim, 4 * dim), nn.Dropout(0.0), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each behind a LayerNorm and around a residual.

    With `cross_only` the first attention looks at the context too (x4 upscaler).
    """

    def __init__(self, dim: int, context_dim: int, heads: int, cross_only: bool = False):
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = CrossAttention(dim, context_dim if cross_only else dim, heads)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, context if self.cross_only else h)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class TokenProjection(nn.Module):
    """A linear map of tokens whose weight is stored as a matrix or as a 1x1 convolution, as the checkpoints have it."""

    def __init__(self, dim: int, linear: bool):
        super().__init__()
        shape = nn.Linear(dim, dim) if linear else nn.Conv2d(dim, dim, 1)
        self.weight, self.bias = shape.weight, shape.bias

    def forward(self, x: Tensor) -> Tensor:  # [b, n, dim]
        return F.linear(x, self.weight.flatten(1), self.bias)


class SpatialTransformer(nn.Module):
    """A picture as tokens through transformer blocks, added to itself."""

    def __init__(
        self, dim: int, context_dim: int, heads: int, depth: int, *, linear_proj: bool, cross_only: bool = False
    ):
        super().__init__()
        self.norm = nn.GroupNorm(32, dim, eps=1e-6)  # 1e-5 in ResBlock: as trained
        self.proj_in = TokenProjection(dim, linear_proj)
        self.transformer_blocks = Modules(
            BasicTransformerBlock(dim, context_dim, heads, cross_only) for _ in range(depth)
        )
        self.proj_out = zero(TokenProjection(dim, linear_proj))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # x [b, c, h, w], context [b, n, context_dim]
        h = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + rearrange(self.proj_out(h), "b (h w) c -> b c h w", h=x.shape[2])


def zero(module: M) -> M:
    """`module` with all its parameters 0: it ends a residual branch, so that an untrained block is the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
