"""How near two tensors are: bit by bit, after rounding, by distance, by the rank of what lies between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

CHUNK = 2**20  # numbers converted to float64 at once: ten such pieces are 80 MB
GLANCE = 4096  # numbers that are rounded first, since most tensors that differ differ there
SHORT = (torch.float16, torch.bfloat16)  # what weights are rounded to
# Times the largest singular value that rounding has on average: no random matrix of these sizes comes near twice that.
SINGULAR_NOISE = 2.0
# Of the largest singular value: a product of factors in float16 (2**-11 a number) leaves less than this above its rank.
SINGULAR_SHARE = 1e-3

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Relation = Literal["equal", "rounded", "different"]


@dataclass(frozen=True)
class Rounding:
    """That one tensor is the other in a narrower type."""

    to: str  # the type
    by: Literal["a", "b"]  # whose numbers are the rounded ones
    lossless: bool  # the wider ones were exact in that type already


@dataclass(frozen=True)
class Nearness:
    """How near B's tensor is to A's; the numbers are of those elements that are finite in both."""

    relation: Relation
    rounding: Rounding | None  # how, if it is "rounded"
    within: (
        bool  # no number is off by more than a unit of the last place of each type: what another order of sums makes
    )
    largest: float  # largest absolute difference
    norm: float  # Frobenius norm of A's, as the others accumulated in float64
    distance: float  # norm of the difference
    finite: tuple[bool, bool]  # A's, B's

    @property
    def relative(self) -> float:
        """The norm of the difference over the norm of A's; infinite where only that is 0."""
        return ratio(self.distance, self.norm)


def ratio(distance: float, norm: float) -> float:
    """distance / norm, with 0 / 0 = 0."""
    return distance / norm if norm else math.inf if distance else 0.0


def nearness(a: Tensor, b: Tensor) -> Nearness:
    """Compare two tensors of one shape. Integers are compared exactly, of whatever types they are."""
    a, b = a.reshape(-1), b.reshape(-1)
    relation, rounding = _relation(a, b)
    square = apart = largest = 0.0
    finite = [True, True]
    within = relation != "different" or (a.is_floating_point() and b.is_floating_point())
    for pieces in _pieces(a) if relation == "equal" else _pieces(a, b):
        x, y = pieces[0], pieces[-1]
        if not all(math.isfinite(piece.dot(piece).item()) for piece in pieces):
            there = x.isfinite(), y.isfinite()
            finite = [finite[i] and bool(there[i].all()) for i in (0, 1)]
            x, y = x[there[0] & there[1]], y[there[0] & there[1]]
        square += x.dot(x).item()
        if relation != "equal" and len(x):
            difference = y - x
            apart += difference.dot(difference).item()
            largest = max(largest, difference.abs_().max().item())
            within = within and (
                relation == "rounded" or bool((difference <= _unit(x, a.dtype) + _unit(y, b.dtype)).all())
            )
    within = within and (relation != "different" or all(finite))
    return Nearness(relation, rounding, within, largest, math.sqrt(square), math.sqrt(apart), (finite[0], finite[1]))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Equal, or one the other in a narrower type."""
    return a.shape == b.shape and _relation(a.reshape(-1), b.reshape(-1))[0] != "different"


def products(vectors: Sequence[Tensor]) -> list[float]:
    """What least squares needs of A, B, C of one shape: |B - A|^2, (B - A)(C - A), |C - A|^2 and |A|^2, in float64."""
    sums = [0.0] * 4
    for a, b, c in _pieces(*(vector.reshape(-1) for vector in vectors)):
        b, c = b.sub_(a), c.sub_(a)
        for i, (x, y) in enumerate(((b, b), (b, c), (c, c), (a, a))):
            sums[i] += x.dot(y).item()
    return sums


def rounding_error(norm: float, *dtypes: torch.dtype) -> float:
    """Norm that rounding to these types leaves, on average, on numbers of this norm.

    The error of one number is uniform within half a unit of the last place, so its root mean square is that unit /
    sqrt(12), and a unit is at most eps times the number.
    """
    eps = math.hypot(*(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point))
    return eps * norm / math.sqrt(12)


def rank(a: Tensor, b: Tensor) -> int:
    """The numerical rank of B - A as a matrix [out, in * kernel]: the singular values that rounding does not explain.

    A random m x n matrix whose numbers have the root mean square s has singular values up to s (sqrt(m) + sqrt(n)) (Bai
    and Yin 1993).
    """
    difference = b.double().sub_(a.double()).flatten(1)
    m, n = difference.shape
    error = rounding_error(torch.linalg.vector_norm(a, dtype=torch.float64).item(), a.dtype, b.dtype) / math.sqrt(m * n)
    if max(m, n) > 2 * min(m, n):  # the singular values of R in A = QR are A's, and R is small
        difference = torch.linalg.qr(difference if m > n else difference.T, mode="r").R
    values = torch.linalg.svdvals(difference)
    floor = max(SINGULAR_NOISE * error * (math.sqrt(m) + math.sqrt(n)), SINGULAR_SHARE * values[0].item())
    return int((values > floor).sum())


def _pieces(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Runs of vectors of one length, as new float64 tensors."""
    for at in range(0, len(vectors[0]), CHUNK):
        yield tuple(vector[at : at + CHUNK].to(torch.float64, copy=True) for vector in vectors)


def _relation(a: Tensor, b: Tensor) -> tuple[Relation, Rounding | None]:
    if a.dtype == b.dtype:
        if _bits(a).equal(_bits(b)):
            return "equal", None
        return _rounded_within(a, b) if a.is_floating_point() else ("different", None)
    if not (a.is_floating_point() and b.is_floating_point()):
        same = all(x.equal(y) for x, y in _pieces(a, b))
        whole: Literal["a", "b"] = "a" if b.is_floating_point() else "b"
        dtype = (a if whole == "a" else b).dtype
        return ("rounded", Rounding(_name(dtype), whole, True)) if same else ("different", None)
    by: Literal["a", "b"] = "a" if _eps(a.dtype) > _eps(b.dtype) else "b"
    narrow, wide = (a, b) if by == "a" else (b, a)
    rounding = Rounding(_name(narrow.dtype), by, lossless=all(x.equal(y) for x, y in _pieces(a, b)))
    if rounding.lossless or _bits(wide.to(narrow.dtype)).equal(_bits(narrow)):
        return "rounded", rounding
    if {a.dtype, b.dtype} == set(SHORT) and all(
        bool(((x - y).abs() <= (_unit(x, a.dtype) + _unit(y, b.dtype)) / 2).all()) for x, y in _pieces(a, b)
    ):
        return "rounded", rounding  # both of wider numbers, each off by at most half a unit of its last place
    return "different", None


def _rounded_within(a: Tensor, b: Tensor) -> tuple[Relation, Rounding | None]:
    """Is one the other after a journey through a narrower type?"""
    for dtype in SHORT:
        if _eps(dtype) > _eps(a.dtype):
            if _becomes(a, b, dtype):
                return "rounded", Rounding(_name(dtype), "b", lossless=False)
            if _becomes(b, a, dtype):
                return "rounded", Rounding(_name(dtype), "a", lossless=False)
    return "different", None


def _becomes(wide: Tensor, narrow: Tensor, dtype: torch.dtype) -> bool:
    """Does rounding to this type make one tensor the other? The first numbers say no most of the time."""
    return all(_bits(wide[:n].to(dtype).to(wide.dtype)).equal(_bits(narrow[:n])) for n in (GLANCE, len(wide)))


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """At least the unit of the last place of these numbers in a type; below its normal numbers units stop shrinking."""
    return x.abs() * _eps(dtype) + torch.finfo(dtype).smallest_normal * _eps(dtype)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_BITS[x.dtype.itemsize])


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
