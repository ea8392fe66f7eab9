"""Tensors of two or three models -> one: weighted sum, added difference, spherical interpolation; all in float32."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Method = Literal["weighted", "add-difference", "slerp"]
METHODS: tuple[Method, ...] = ("weighted", "add-difference", "slerp")
PARALLEL = 1e-3  # radians between two tensors, or from opposite ones, below which `slerp` is `weighted`; see there
CHUNK = 2**20  # numbers multiplied in float64 at once


def weighted(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) a + alpha b, float32, computed as a + alpha (b - a) so that what is the same in both stays the same bit by bit. Uses up `a`."""
    return a.lerp_(b, alpha)


def added(a: Tensor, b: Tensor, c: Tensor, alpha: float) -> Tensor:
    """a + alpha (b - c), float32; where b and c are equal, a bit by bit. Uses up `b`."""
    same = b == c
    return torch.where(same, a, a + b.sub_(c).mul_(alpha))


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation (Shoemake 1985, section 3.3) between two tensors taken as vectors, each with its own length. Uses up both.

    sin((1 - alpha) w) / sin(w) a + sin(alpha w) / sin(w) b, w being the angle between them. `weighted` where a length is 0, where w is below
    PARALLEL, since there the factors differ by less than half a unit in the last place of float32 (they deviate by at most 0.065 w^2), and
    where w is as near to pi, since there the formula names no plane to turn in.
    """
    angle = _angle(a, b)
    if angle is None or not PARALLEL <= angle <= math.pi - PARALLEL:
        return weighted(a, b, alpha)
    return a.mul_(math.sin((1 - alpha) * angle) / math.sin(angle)).add_(b.mul_(math.sin(alpha * angle) / math.sin(angle)))


def _angle(a: Tensor, b: Tensor) -> float | None:
    """In radians; None where a length is 0 or not finite."""
    lengths = math.sqrt(_dot(a, a)) * math.sqrt(_dot(b, b))
    if lengths == 0 or not math.isfinite(lengths):
        return None
    return math.acos(max(-1.0, min(1.0, _dot(a, b) / lengths)))


def _dot(x: Tensor, y: Tensor) -> float:
    """The scalar product, summed in float64 a piece at a time: no second copy of a large tensor."""
    return math.fsum((p.double() @ q.double()).item() for p, q in zip(x.flatten().split(CHUNK), y.flatten().split(CHUNK), strict=True))
