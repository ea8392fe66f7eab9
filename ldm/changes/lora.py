"""Low-rank changes of weights: what each kind is, and how it is merged into a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion

Shape = tuple[int, ...]


# r is the rank, k k the kernel of a convolution; a matrix has none. Each changes a weight by alpha / r times a product
# of its factors; alpha None stands for r.


@dataclass(frozen=True, eq=False)
class LowRank:
    """LoRA (Hu et al. 2021, section 4.1): up @ down; with `mid` LoCon's convolution in CP form (Yeh et al. 2023)."""

    down: Tensor  # [r, in] or [r, in, k, k]; with mid [r, in, 1, 1]
    up: Tensor  # [out, r] or [out, r, 1, 1]
    alpha: float | None = None
    mid: Tensor | None = None  # [r, r, k, k]


@dataclass(frozen=True, eq=False)
class Hadamard:
    """LoHa (Hyeon-Woo et al. 2022, prop. 2): (w1_a @ w1_b) * (w2_a @ w2_b), with t1 and t2 Tucker products."""

    w1_a: Tensor  # [out, r]; with t1 [r, out]
    w1_b: Tensor  # [r, in * k * k]; with t1 [r, in]
    w2_a: Tensor
    w2_b: Tensor
    alpha: float | None = None
    t1: Tensor | None = None  # [r, r, k, k]
    t2: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Kronecker:
    """LoKr (LyCORIS, Yeh et al. 2023): kron(w1, w2), each whole or a pair of factors, without which alpha is unused."""

    w1: Tensor | tuple[Tensor, Tensor]  # [a, b], or [a, r] and [r, b]
    # [out/a, in/b(, k, k)], or [out/a, r] and [r, in/b * k * k]; with t2 [r, out/a] and [r, in/b]
    w2: Tensor | tuple[Tensor, Tensor]
    alpha: float | None = None
    t2: Tensor | None = None  # [r, r, k, k]


@dataclass(frozen=True, eq=False)
class Generalised:
    """GLoRA (Chavan et al. 2023): W a1 @ a2 + b1 @ b2, so that part of the change follows the weight."""

    a1: Tensor  # [in, r]
    a2: Tensor  # [r, in]
    b1: Tensor  # [out, r]
    b2: Tensor  # [r, in] or [r, in, k, k]
    alpha: float | None = None


@dataclass(frozen=True, eq=False)
class Full:
    """A difference of the weight's own shape: the change of layers trained without factors, such as norms."""

    diff: Tensor


Plain = LowRank | Hadamard | Kronecker | Generalised | Full


@dataclass(frozen=True, eq=False)
class Decomposed:
    """DoRA (Liu et al. 2024, eq. 5): W + `inner`, its columns scaled to the lengths that were trained."""

    inner: Plain
    magnitude: Tensor  # lengths of the weights of inputs, [1, in] (LyCORIS, as the paper), or outputs, [out, 1] (PEFT)


Change = Plain | Decomposed


@dataclass(frozen=True, eq=False)
class Changes(Mapping[str, Change]):
    """What one LoRA does to a model: {name of a parameter in `LatentDiffusion`: its change}."""

    by_parameter: Mapping[str, Change]
    name: str = "LoRA"  # for reports
    unmatched: tuple[str, ...] = ()  # modules that it names and the model does not have

    def __getitem__(self, parameter: str) -> Change:
        return self.by_parameter[parameter]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_parameter)

    def __len__(self) -> int:
        return len(self.by_parameter)

    @property
    def modules(self) -> int:
        """How many modules of the model are changed: a layer's weight and bias count once."""
        return len({parameter.rpartition(".")[0] for parameter in self.by_parameter})

    def report(self) -> str:
        """One line: "192 of 192 modules", and the first of those that were not used."""
        line = f"{self.modules} of {self.modules + len(self.unmatched)} modules"
        if self.unmatched:
            line += f"; not used: {', '.join(self.unmatched[:3])}{', ...' if len(self.unmatched) > 3 else ''}"
        return line


def plain(change: Change) -> Plain:
    """The change without the magnitudes of a DoRA."""
    return change.inner if isinstance(change, Decomposed) else change


def require_fit(change: Change, shape: Shape) -> None:
    """Raise ArgumentError, with both shapes, unless the factors fit together and change a weight of `shape`."""
    if isinstance(change, Decomposed):
        require_fit(change.inner, shape)
        if len(shape) < 2 or tuple(change.magnitude.shape) not in ((1, shape[1]), (shape[0], 1)):
            what = f"its magnitudes are {list(change.magnitude.shape)}, the weight is {list(shape)}"
            raise ArgumentError(f"{what}: they need one per input or per output")
        return
    made = _made(change, shape)
    if rank(change) == 0:
        raise ArgumentError(f"its rank is 0, so it cannot change a weight of {list(shape)}")
    if _trimmed(made) != _trimmed(shape) and made != (shape[0], math.prod(shape[1:])):
        raise ArgumentError(f"it changes a weight of {list(made)}, the model's is {list(shape)}")


def delta(change: Change, weight: Tensor) -> Tensor:
    """What `change` at scale 1 adds to `weight`: float32, of its shape and on its device.

    Raises ArgumentError when the factors do not fit (`require_fit`).
    """
    require_fit(change, tuple(weight.shape))
    return _delta(change, weight.float())


def _delta(change: Change, weight: Tensor) -> Tensor:
    def to32(factor: Tensor) -> Tensor:
        return factor.to(weight.device, torch.float32)

    if isinstance(change, LowRank):
        down, up = to32(change.down), to32(change.up).flatten(1)
        if change.mid is None:
            product = up @ down.flatten(1)
        else:
            product = torch.einsum("m n ..., o m, n i -> o i ...", to32(change.mid), up, down.flatten(1))
        return _strength(change) * product.reshape(weight.shape)
    if isinstance(change, Hadamard):
        one = _pair(to32(change.w1_a), to32(change.w1_b), None if change.t1 is None else to32(change.t1))
        two = _pair(to32(change.w2_a), to32(change.w2_b), None if change.t2 is None else to32(change.t2))
        return _strength(change) * (one * two).reshape(weight.shape)
    if isinstance(change, Kronecker):
        w1, w2 = (
            to32(whole) if isinstance(whole, Tensor) else _pair(to32(whole[0]), to32(whole[1]), core)
            for whole, core in ((change.w1, None), (change.w2, None if change.t2 is None else to32(change.t2)))
        )
        return _strength(change) * torch.kron(w1, w2.flatten(1)).reshape(weight.shape)
    if isinstance(change, Generalised):
        a1, a2, b1, b2 = (to32(factor).flatten(1) for factor in (change.a1, change.a2, change.b1, change.b2))
        followed = torch.einsum("o i ..., i r, r j -> o j ...", weight, a1, a2)
        return _strength(change) * (followed + (b1 @ b2).reshape(weight.shape))
    if isinstance(change, Full):
        return to32(change.diff).reshape(weight.shape)
    changed = weight + _delta(change.inner, weight)
    magnitude = to32(change.magnitude)
    axis = 1 if magnitude.shape[0] == 1 and magnitude.shape[1] == weight.shape[1] else 0
    lengths = torch.linalg.vector_norm(changed, dim=[i for i in range(weight.ndim) if i != axis], keepdim=True)
    directions = changed / lengths.clamp_min(torch.finfo(torch.float32).tiny)  # a column of zeros stays zero
    return directions * magnitude.reshape(magnitude.shape + (1,) * (weight.ndim - 2)) - weight


def _pair(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """a @ b; with a core [p, q, k, k] the Tucker product of a [p, out] and b [q, in]."""
    return a @ b.flatten(1) if core is None else torch.einsum("p q ..., p o, q i -> o i ...", core, a, b)


def rank(change: Change) -> int | None:
    """The rank by which alpha is divided; None where no factor has one."""
    if isinstance(change, LowRank):
        return change.down.shape[0]
    if isinstance(change, Hadamard):
        return change.w1_b.shape[0]
    if isinstance(change, Kronecker):
        pairs = [whole for whole in (change.w2, change.w1) if not isinstance(whole, Tensor)]
        return pairs[0][1].shape[0] if pairs else None
    if isinstance(change, Generalised):
        return change.a2.shape[0]
    return rank(change.inner) if isinstance(change, Decomposed) else None


def _strength(change: LowRank | Hadamard | Kronecker | Generalised) -> float:
    r = rank(change)
    return 1.0 if change.alpha is None or r is None else change.alpha / r


def _made(change: Change, weight: Shape) -> Shape:
    """The shape of what the factors make. Raises ArgumentError where they do not fit together."""
    if isinstance(change, Full):
        return tuple(change.diff.shape)
    if isinstance(change, LowRank):
        down, up = tuple(change.down.shape), tuple(change.up.shape)
        _require(len(down) >= 2 and len(up) >= 2 and math.prod(up[2:]) == 1, "down and up", down, up)
        if change.mid is None:
            _require(down[0] == up[1], "the ranks of down and up", down, up)
            return (up[0], *down[1:])
        mid = tuple(change.mid.shape)
        fits = math.prod(down[2:]) == 1 and len(mid) > 2 and mid[:2] == (up[1], down[0])
        _require(fits, "the ranks of mid, up and down", mid, up, down)
        return (up[0], down[1], *mid[2:])
    if isinstance(change, Hadamard):
        one, two = _made_pair(change.w1_a, change.w1_b, change.t1), _made_pair(change.w2_a, change.w2_b, change.t2)
        _require(one == two, "the two products", one, two)
        first, second = tuple(change.w1_b.shape), tuple(change.w2_b.shape)
        _require(first[0] == second[0], "the ranks of w1_b and w2_b", first, second)
        return one
    if isinstance(change, Kronecker):
        w1 = tuple(change.w1.shape) if isinstance(change.w1, Tensor) else _made_pair(*change.w1, None)
        w2 = tuple(change.w2.shape) if isinstance(change.w2, Tensor) else _made_pair(*change.w2, change.t2)
        _require(len(w1) == 2 and len(w2) >= 2, "w1 and w2", w1, w2)
        return (w1[0] * w2[0], w1[1] * w2[1], *w2[2:])
    assert isinstance(change, Generalised)
    a1, a2, b1, b2 = (tuple(factor.shape) for factor in (change.a1, change.a2, change.b1, change.b2))
    matrices = min(map(len, (a1, a2, b1, b2))) >= 2 and math.prod(a1[2:] + a2[2:] + b1[2:]) == 1
    _require(matrices, "a1, a2, b1, b2", a1, a2, b1, b2)
    _require(a1[1] == a2[0] and b1[1] == b2[0], "the ranks of a1, a2, b1, b2", a1, a2, b1, b2)
    _require(len(weight) >= 2 and a1[0] == a2[1] == weight[1], "a1, a2 and the weight", a1, a2, weight)
    return (b1[0], *b2[1:])


def _made_pair(a: Tensor, b: Tensor, core: Tensor | None) -> Shape:
    left, right = tuple(a.shape), tuple(b.shape)
    if core is None:
        fits = len(left) == 2 and len(right) >= 2 and left[1] == right[0]
        _require(fits, "the ranks of a pair of factors", left, right)
        return (left[0], math.prod(right[1:]))
    middle = tuple(core.shape)
    fits = len(left) == len(right) == 2 and len(middle) >= 2 and middle[:2] == (left[0], right[0])
    _require(fits, "the ranks of a Tucker core and its factors", middle, left, right)
    return (left[1], right[1], *middle[2:])


def _require(fits: bool, what: str, *shapes: Shape) -> None:
    if not fits:
        raise ArgumentError(f"{what} do not fit: {', '.join(str(list(shape)) for shape in shapes)}")


def _trimmed(shape: Shape) -> Shape:
    """A 1x1 convolution and a matrix are the same numbers: SD 1 and SD 2 differ in which they store."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


@dataclass(frozen=True)
class Merged:
    """What `merge` did."""

    parameters: tuple[str, ...]  # names of those that were replaced
    lines: tuple[str, ...]  # one per LoRA: "style.safetensors at 0.8: 192 of 192 modules"


@torch.no_grad()
def merge(model: LatentDiffusion, loras: Sequence[tuple[Changes, float]]) -> Merged:
    """Add each LoRA, times its scale, to the weights of `model`.

    Every change is computed from the model's weights as they are now, so the order of `loras` does not matter; the
    changes are summed in float32 and rounded to the weight's own type once. Changed parameters are new tensors: the old
    ones, which may be mapped from a file or shared with another model, keep their values. Scale 0 changes nothing, a
    negative one subtracts. Raises ArgumentError, before anything is replaced, for a scale that is not finite and for
    changes that do not fit the model.
    """
    parameters = dict(model.named_parameters())
    wanted: dict[str, list[tuple[Change, float]]] = {}
    for changes, scale in loras:
        if not isinstance(scale, Real) or isinstance(scale, bool) or not math.isfinite(scale):
            raise ArgumentError(f"{changes.name}: scale {scale!r} is no finite number", key="scale")
        for name, change in changes.items():
            if name not in parameters:
                what = f"{changes.name}: this model has no parameter {name}; use a LoRA made for its family"
                raise ArgumentError(what, key=name)
            try:
                require_fit(change, tuple(parameters[name].shape))
            except ArgumentError as fault:
                raise ArgumentError(f"{changes.name}: {name}: {fault}", key=name) from None
            if scale != 0:
                wanted.setdefault(name, []).append((change, float(scale)))
    for name, terms in wanted.items():
        (module, _, leaf), old = name.rpartition("."), parameters[name]
        weight = old.detach().float()
        total = sum((scale * _delta(change, weight) for change, scale in terms), torch.zeros_like(weight))
        changed = nn.Parameter((weight + total).to(old.dtype), requires_grad=old.requires_grad)
        setattr(model.get_submodule(module), leaf, changed)
    return Merged(tuple(wanted), tuple(f"{changes.name} at {scale:g}: {changes.report()}" for changes, scale in loras))


def apply(model: LatentDiffusion, changes: Changes, scale: float = 1.0) -> None:
    """`merge` of one LoRA."""
    merge(model, [(changes, scale)])
