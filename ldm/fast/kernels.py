"""The kernels of the GPU, in Triton, for what PyTorch does in several passes over memory or with a part of the chip.

Every function here says what it computes in plain PyTorch. Activations are channels last; sums and statistics are kept
in float32 (in float64 for float64), so each result is rounded once, when it is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import tensor

ROWS, COLS = 32, 64  # of a tile: positions x channels. 64 channels in half precision are one 128-byte line of the cache
PROGRAMS = 1024  # per picture that sum up parts of a norm: several for every multiprocessor of a large GPU
CHUNK = 1024  # parts of one group that are joined at once


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool, unit: float = 1.0
) -> Tensor:
    """GroupNorm of x [b, ..., c], contiguous, then SiLU if asked.

    unit  x is this many times its value, and so is the result: unit * silu(group_norm(x / unit))

    In three launches: the mean and the sum of squared deviations of every channel over a part of the positions; their
    union over a group, as a factor and a summand per channel; x times the one plus the other. How a picture is divided
    depends on its own size alone, so its result does not depend on the batch.
    """
    assert x.is_contiguous()
    b, c = x.shape[0], x.shape[-1]
    n = x.numel() // (b * c)
    tiles, blocks = triton.cdiv(n, ROWS), triton.cdiv(c, COLS)
    length = ROWS * triton.cdiv(tiles, max(1, PROGRAMS // blocks))  # positions in a part
    parts = triton.cdiv(n, length)
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, squares = x.new_empty(2, b, parts, c, dtype=wide)
    factor, summand = x.new_empty(2, b, c, dtype=wide)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _moments[parts, blocks, b](x, mean, squares, n, c, length, ROWS, COLS)
        _fold[groups, b](
            mean, squares, weight, bias, factor, summand, n, c, c // groups, parts, length, eps * unit**2, CHUNK
        )
        _affine[tiles, blocks, b](x, factor, summand, y, n, c, unit, silu, ROWS, COLS)
    return y


@triton.jit
def _wide(x: tensor) -> tensor:
    """x in the type of sums."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _at(row: tensor, col: tensor, c: tensor) -> tensor:
    """Where [row, col] is in rows of c numbers; in 64 bits, which the decoder's largest pictures need."""
    return row.to(tl.int64)[:, None] * c + col[None, :]


@triton.jit(do_not_specialize=["n", "length"])
def _moments(
    x: tensor, mean: tensor, squares: tensor, n: tensor, c: tensor, length: tensor, ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:  # fmt: skip
    """Mean and sum of squared deviations of each channel over positions part * length and following.

    Sums are of differences from the mean of the first tile, so squares lose little to cancellation: with T tiles, that
    mean is at most sqrt(T) standard deviations of the part from the mean of the part.
    """
    part, block, picture = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    x += picture * n * c
    col = block * COLS + tl.arange(0, COLS)
    row = part * length + tl.arange(0, ROWS)
    end = tl.minimum(part * length + length, n)
    first = _wide(tl.load(x + _at(row, col, c), mask=(row < end)[:, None] & (col < c)[None, :], other=0.0))
    origin = tl.sum(first, 0) / tl.minimum(end - part * length, ROWS)
    total, total2 = tl.zeros_like(first), tl.zeros_like(first)
    for start in range(part * length, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (col < c)[None, :]
        d = tl.where(inside, _wide(tl.load(x + _at(row, col, c), mask=inside, other=0.0)) - origin[None, :], 0.0)
        total += d
        total2 += d * d
    count = end - part * length
    sum1, sum2 = tl.sum(total, 0), tl.sum(total2, 0)
    to = (picture * tl.num_programs(0) + part) * c + col
    tl.store(mean + to, origin + sum1 / count, mask=col < c)
    tl.store(squares + to, tl.maximum(sum2 - sum1 * sum1 / count, 0.0), mask=col < c)


@triton.jit(do_not_specialize=["n", "c", "width", "parts", "length"])
def _fold(
    mean: tensor, squares: tensor, weight: tensor, bias: tensor, factor: tensor, summand: tensor, n: tensor,
    c: tensor, width: tensor, parts: tensor, length: tensor, eps: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """The norm of a group of `width` channels as factor and summand of each, from the moments of its channels' parts.

    Chan, Golub & LeVeque 1983, eq. 2.1 for many parts: deviations within parts, and of their means from the whole mean.
    """
    group, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    mean += picture * parts * c + group * width
    squares += picture * parts * c + group * width
    i = tl.arange(0, CHUNK)
    sums = tl.zeros([CHUNK], mean.dtype.element_ty)
    for start in range(0, parts * width, CHUNK):
        part, channel = (start + i) // width, (start + i) % width
        m = tl.load(mean + part * c + channel, mask=part < parts, other=0.0)
        sums += m * tl.minimum(length, n - part * length)
    centre = tl.sum(sums) / n / width
    sums = tl.zeros_like(sums)
    for start in range(0, parts * width, CHUNK):
        part, channel = (start + i) // width, (start + i) % width
        d = tl.load(mean + part * c + channel, mask=part < parts, other=0.0) - centre
        within = tl.load(squares + part * c + channel, mask=part < parts, other=0.0)
        sums += tl.where(part < parts, within + d * d * tl.minimum(length, n - part * length), 0.0)
    scale = 1 / tl.sqrt(tl.sum(sums) / n / width + eps)
    for start in range(0, width, CHUNK):
        channel = group * width + start + i
        inside = start + i < width
        a = _wide(tl.load(weight + channel, mask=inside, other=0.0)) * scale
        tl.store(factor + picture * c + channel, a, mask=inside)
        shift = _wide(tl.load(bias + channel, mask=inside, other=0.0)) - centre * a
        tl.store(summand + picture * c + channel, shift, mask=inside)


@triton.jit(do_not_specialize=["n"])
def _affine(
    x: tensor, factor: tensor, summand: tensor, y: tensor, n: tensor, c: tensor, unit: tensor, SILU: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """unit * silu(factor x + summand), or without SiLU."""
    picture = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < n)[:, None] & (col < c)[None, :]
    at = picture * n * c + _at(row, col, c)
    a = tl.load(factor + picture * c + col, mask=col < c, other=0.0)[None, :]
    k = tl.load(summand + picture * c + col, mask=col < c, other=0.0)[None, :]
    h = _wide(tl.load(x + at, mask=inside, other=0.0)) * a + k
    if SILU:
        h = h / (1 + tl.exp(-h))
    tl.store(y + at, h * unit, mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.layer_norm(x, [c], weight, bias, eps) of x [..., c], contiguous."""
    assert x.is_contiguous()
    c = x.shape[-1]
    n = x.numel() // c
    y = torch.empty_like(x)
    width = triton.next_power_of_2(c)
    rows = max(1, ROWS * COLS // width)
    with torch.cuda.device_of(x):
        _layer_norm[triton.cdiv(n, rows),](x, weight, bias, y, n, c, eps, rows, width)
    return y


@triton.jit(do_not_specialize=["n"])
def _layer_norm(
    x: tensor, weight: tensor, bias: tensor, y: tensor, n: tensor, c: tensor, eps: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:  # fmt: skip
    """Whole rows, in registers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < n)[:, None] & (col < c)[None, :]
    at = _at(row, col, c)
    h = _wide(tl.load(x + at, mask=inside, other=0.0))
    d = tl.where(inside, h - (tl.sum(h, 1) / c)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(d * d, 1) / c + eps)
    a, k = _wide(tl.load(weight + col, mask=col < c, other=0.0)), _wide(tl.load(bias + col, mask=col < c, other=0.0))
    tl.store(y + at, d * scale[:, None] * a[None, :] + k[None, :], mask=inside)


def gated(x: Tensor) -> Tensor:
    """value * gelu(gate), the exact GELU, of value and gate side by side: [..., 2 h], contiguous -> [..., h]."""
    assert x.is_contiguous()
    h = x.shape[-1] // 2
    n = x.numel() // (2 * h)
    y = x.new_empty(*x.shape[:-1], h)
    with torch.cuda.device_of(x):
        _gated[triton.cdiv(n, ROWS), triton.cdiv(h, COLS)](x, y, n, h, ROWS, COLS)
    return y


@triton.jit(do_not_specialize=["n"])
def _gated(x: tensor, y: tensor, n: tensor, h: tensor, ROWS: tl.constexpr, COLS: tl.constexpr) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < n)[:, None] & (col < h)[None, :]
    at = _at(row, col, 2 * h)
    value = _wide(tl.load(x + at, mask=inside, other=0.0))
    gate = _wide(tl.load(x + at + h, mask=inside, other=0.0))
    out = value * 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))  # 1 / sqrt(2)
    tl.store(y + _at(row, col, h), out, mask=inside)


def plus(x: Tensor, bias: Tensor, add: Tensor) -> Tensor:
    """x + bias + add in the place of x, all contiguous.

    x [b, ..., c], bias [c], add [b, c] (for every position) or of x's shape
    """
    b, c = x.shape[0], x.shape[-1]
    n = x.numel() // (b * c)
    assert bias.shape == (c,)
    assert add.shape in ((b, c), x.shape)
    assert x.is_contiguous()
    assert add.is_contiguous()
    with torch.cuda.device_of(x):
        _plus[triton.cdiv(n, ROWS), triton.cdiv(c, COLS), b](x, bias, add, n, c, add.ndim == 2, ROWS, COLS)
    return x


@triton.jit(do_not_specialize=["n"])
def _plus(
    x: tensor, bias: tensor, add: tensor, n: tensor, c: tensor, SAME: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:  # fmt: skip
    """SAME: `add` is the same for every position."""
    picture = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < n)[:, None] & (col < c)[None, :]
    at = picture * n * c + _at(row, col, c)
    h = _wide(tl.load(x + at, mask=inside, other=0.0))
    h += _wide(tl.load(bias + col, mask=col < c, other=0.0))[None, :]
    if SAME:
        h += _wide(tl.load(add + picture * c + col, mask=col < c, other=0.0))[None, :]
    else:
        h += _wide(tl.load(add + at, mask=inside, other=0.0))
    tl.store(x + at, h, mask=inside)
