"""Low-rank products cut to the rank, or to the share of their energy, that is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ldm.changes.lora import LowRank, rank
from ldm.errors import ArgumentError, NonFinite

MAX_RANK = 2**16


@dataclass(frozen=True)
class Rule:
    """How much of a product to keep: a rank, or the least rank that keeps a share of its energy."""

    rank: int | None = None  # exactly this, where there is as much
    variance: float | None = None  # in (0, 1]: of the squared Frobenius norm, the sum of the squared singular values
    max_rank: int | None = None  # with variance: no more than this


@dataclass(frozen=True)
class Kept:
    """What became of one module."""

    parameter: str  # our name of its weight
    rank: int
    energy: float  # share of the squared Frobenius norm that is left, in [0, 1]
    whole: float = 0.0  # the squared Frobenius norm before


def rule(what: int | None, variance: float | None, max_rank: int | None = None) -> Rule:
    """The rule that options make. Raises ArgumentError unless one of rank and variance is given, and in range."""
    if (what is None) == (variance is None):
        raise ArgumentError("give a rank or a share of the variance to keep, and not both", key="rank")
    if max_rank is not None and variance is None:
        raise ArgumentError("max_rank bounds what variance chooses; with a rank leave it out", key="max_rank")
    for name, value in (("rank", what), ("max_rank", max_rank)):
        require_rank(name, value)
    if variance is not None and (not isinstance(variance, Real) or isinstance(variance, bool) or not 0 < variance <= 1):
        raise ArgumentError(f"variance {str(variance)[:20]}: give a share, more than 0 and at most 1", key="variance")
    return Rule(what, None if variance is None else float(variance), max_rank)


def require_rank(name: str, value: int | None) -> None:
    """Refuse what is no rank."""
    if value is not None and (type(value) is not int or not 1 <= value <= MAX_RANK):
        raise ArgumentError(f"{name} {str(value)[:20]}: give a whole number, 1 to {MAX_RANK}", key=name)


def chosen(values: Tensor, rule: Rule) -> tuple[int, float, float]:
    """(rank, share of the energy that it keeps, all energy) for these singular values, the largest first."""
    energies = values.double().square().cumsum(0)
    whole = energies[-1].item()
    if rule.variance is not None:
        r = int((energies < rule.variance * whole).sum()) + 1
        r = min(r, len(values), rule.max_rank or len(values))
    else:
        r = min(rule.rank or 1, len(values))
    return r, energies[r - 1].item() / whole if whole else 1.0, whole


def factored(matrix: Tensor, rule: Rule, parameter: str, dtype: torch.dtype = torch.float32) -> tuple[LowRank, Kept]:
    """The product of the rule's rank that is nearest in the Frobenius norm (Eckart and Young 1936), with alpha = rank.

    matrix  [out, in] or [out, in, k, k]
    The singular value decomposition is exact, in float32: with one core 0.1 s for 640 x 640, 0.8 s for 1280 x 1280,
    2.5 s for 10240 x 1280, 13 s for the largest 3x3 kernels. Randomised ones are faster and miss part of a flat tail.
    """
    flat = _finite(matrix.float().flatten(1), parameter)
    wide = flat.shape[0] < flat.shape[1]  # LAPACK takes half the time for the tall form
    u, s, vh = torch.linalg.svd(flat.T if wide else flat, full_matrices=False)
    if wide:
        u, vh = vh.T, u.T
    r, energy, whole = chosen(s, rule)
    change = _lowrank(u[:, :r], s[:r], vh[:r], float(r), matrix.shape, dtype, parameter)
    return change, Kept(parameter, r, energy, whole)


def resized(change: LowRank, rule: Rule, parameter: str, dtype: torch.dtype | None = None) -> tuple[LowRank, Kept]:
    """The nearest change of the rule's rank with the same scale alpha / rank; dtype None: that of the old factors.

    up = Qu Ru and down^T = Qd Rd, so up @ down = Qu (Ru Rd^T) Qd^T: its singular values are those of an r x r matrix.
    That costs (out + in) r^2 instead of out in min(out, in), 400 times less for rank 32 of 1280 x 1280, so that float64
    is affordable; and the full product, with its rounding, is never computed. A core `mid` is first multiplied into
    down, which changes no number of the product.
    """
    down, up = _finite(change.down.double(), parameter), _finite(change.up.double().flatten(1), parameter)
    if change.mid is not None:
        down = torch.einsum("m n ..., n i -> m i ...", change.mid.double(), down.flatten(1))
    qu, ru = torch.linalg.qr(up)
    qd, rd = torch.linalg.qr(down.flatten(1).T)
    u, s, vh = torch.linalg.svd(ru @ rd.T, full_matrices=False)
    r, energy, whole = chosen(s, rule)
    strength = scale(change)
    shape = (up.shape[0], *down.shape[1:])
    new = _lowrank(qu @ u[:, :r], s[:r], vh[:r] @ qd.T, strength * r, shape, dtype or change.up.dtype, parameter)
    return new, Kept(parameter, r, energy, whole * strength**2)


def scale(change: LowRank) -> float:
    """alpha / rank."""
    return 1.0 if change.alpha is None else change.alpha / (rank(change) or 1)


def energy(kept: Iterable[Kept]) -> float:
    """The share of the energy of all modules that is left."""
    kept = tuple(kept)
    whole = math.fsum(one.whole for one in kept)
    return math.fsum(one.whole * one.energy for one in kept) / whole if whole else 1.0


def _lowrank(
    u: Tensor, s: Tensor, vh: Tensor, alpha: float, shape: tuple[int, ...], dtype: torch.dtype, parameter: str
) -> LowRank:
    """Both factors get the root of the singular values: numbers of one size, of which float16 loses the least."""
    root, r = s.sqrt(), len(s)
    down = (root[:, None] * vh).reshape(r, *shape[1:]).to(dtype)
    up = (u * root).reshape(shape[0], r, *(1 for _ in shape[2:])).to(dtype)
    return LowRank(_finite(down.contiguous(), parameter), _finite(up.contiguous(), parameter), alpha)


def _finite(tensor: Tensor, parameter: str) -> Tensor:
    if not tensor.isfinite().all():
        what = f"{parameter[-80:]}: its change has NaN or infinity in {tensor.dtype}"
        raise NonFinite(f"{what}; repair the file, or use a wider type", key=parameter)
    return tensor
