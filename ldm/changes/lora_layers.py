"""Low-rank changes of a model while they are learnt: in the layers themselves, and taken out again without a trace."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.changes.lora import Change, Changes, Decomposed, LowRank, plain, require_fit
from ldm.config import ModelConfig
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.networks.attention import TokenProjection

USUAL = "|".join((  # what kohya's scripts train
    r"\.transformer_blocks\.", r"\.proj_(in|out)$",  # the UNet's transformers, and what leads into and out of them
    r"\.(in_layers\.2|out_layers\.3|skip_connection|op|conv)$",  # with conv_rank: convolutions of the blocks between
    r"\.self_attn\.", r"\.mlp\.",  # the text towers' blocks
))  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """Which layers of a model learn a low-rank change, and of which rank."""

    rank: int = 16  # of matrices, SD 1's 1x1 projections among them
    alpha: float | None = None  # the change is alpha / rank times the product: it scales the steps too; None: the rank
    conv_rank: int = 0  # of convolutions; 0: they stay
    conv_alpha: float | None = None  # None: conv_rank
    dora: bool = False  # lengths of the weights' rows learn apart from their directions
    targets: str = ""  # regular expression to find in modules' names, as unet.middle_block.1.proj_in; empty: USUAL
    unet: bool = True  # look for them in the UNet
    text: bool = False  # and in the text towers

    def __post_init__(self) -> None:
        for name, rank, least in (("rank", self.rank, 1), ("conv_rank", self.conv_rank, 0)):
            if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < least:
                raise ArgumentError(f"{name}: {rank!r}; give a whole number from {least}", key=name)
        for name, alpha in (("alpha", self.alpha), ("conv_alpha", self.conv_alpha)):
            number = isinstance(alpha, Real) and not isinstance(alpha, bool)
            if alpha is not None and not (number and 0 < alpha < math.inf):
                raise ArgumentError(f"{name}: {alpha!r}; give a positive number, or None for the rank", key=name)
        try:
            re.compile(self.targets)
        except re.error as fault:
            what = f"targets: {self.targets[:80]!r} is no regular expression: {fault}"
            raise ArgumentError(what, key="targets") from None
        if not (self.unet or self.text):
            raise ArgumentError("neither the UNet nor the text towers are to learn: set unet or text", key="unet")


class Factors(nn.Module):
    """A layer's change: up @ down times alpha / r (Hu et al. 2021, section 4.1), float32. No state dict holds them."""

    def __init__(self, change: LowRank):
        super().__init__()
        self.down = nn.Parameter(change.down)  # [r, in(, k, k)]
        self.up = nn.Parameter(change.up)  # [out, r(, 1, 1)]
        self.alpha = float(len(change.down) if change.alpha is None else change.alpha)

    @property
    def scale(self) -> float:
        """What the product is multiplied by."""
        return self.alpha / len(self.down)

    def forward(self, layer: Adapted, x: Tensor) -> Tensor:
        down, up = self.down.to(layer.weight.dtype), self.up.to(layer.weight.dtype)
        return layer.run(x, layer.weight, layer.bias) + self.scale * layer.lift(layer.run(x, down, None), up)

    def change(self, held: Mapping[str, Tensor]) -> Change:
        """The factors among `held`, by their names here, as a change of a weight."""
        return LowRank(held["down"], held["up"], self.alpha)

    def _save_to_state_dict(self, *args: object) -> None: ...

    def _load_from_state_dict(self, *args: object) -> None: ...


class DecomposedFactors(Factors):
    """DoRA (Liu et al. 2024, eq. 5): the changed rows, scaled to magnitudes that learn too; a row of zeros stays zero.

    The lengths that they are divided by are constants to the gradient (section 4.3). One magnitude per output, as PEFT.
    """

    def __init__(self, change: LowRank, magnitude: Tensor):
        super().__init__(change)
        self.magnitude = nn.Parameter(magnitude)  # [out, 1]

    def forward(self, layer: Adapted, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = layer.weight.float()
            changed = weight + self.scale * (self.up.flatten(1) @ self.down.flatten(1)).view_as(weight)
            changed = changed * (self.magnitude / lengths(changed.detach())).view(-1, *(1 for _ in weight.shape[1:]))
        return layer.run(x, changed.to(layer.weight.dtype), layer.bias)

    def change(self, held: Mapping[str, Tensor]) -> Change:
        return Decomposed(LowRank(held["down"], held["up"], self.alpha), held["magnitude"])


def lengths(weight: Tensor) -> Tensor:
    """[out, 1] float32: the length of what reaches each output, never 0."""
    norms = torch.linalg.vector_norm(weight.float().flatten(1), dim=1, keepdim=True)
    return norms.clamp_min(torch.finfo(torch.float32).tiny)


class Adapted(nn.Module):
    """A layer that learns: the same object with the same parameters as before, of a class that calls its factors."""

    weight: Tensor
    bias: Any  # a Tensor, or None
    lora: Factors

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(self, x)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another weight."""
        return F.linear(x, weight.flatten(1), bias)

    def lift(self, h: Tensor, up: Tensor) -> Tensor:
        """From r channels to those of the layer's output."""
        return F.linear(h, up.flatten(1))


class AdaptedLinear(Adapted, nn.Linear):
    """The same of a matrix."""


class AdaptedProjection(Adapted, TokenProjection):
    """The same of SD 1's 1x1 convolutions of tokens, and of the matrices in their place."""


class AdaptedConv2d(Adapted, nn.Conv2d):
    """The same of a convolution: the first of the two factors has its kernel, stride and padding (LoCon)."""

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)

    def lift(self, h: Tensor, up: Tensor) -> Tensor:
        return F.conv2d(h, up)


Trainable = nn.Linear | TokenProjection | nn.Conv2d
ADAPTED: dict[type, type] = {nn.Linear: AdaptedLinear, TokenProjection: AdaptedProjection, nn.Conv2d: AdaptedConv2d}
UNADAPTED = {adapted: unadapted for unadapted, adapted in ADAPTED.items()}


def attach(model: LatentDiffusion, spec: Spec, seed: int = 0) -> dict[str, nn.Parameter]:
    """Give layers of `model`, in place, factors that learn a low-rank change; `up` begins as 0, so nothing changes yet.

    seed  of `down`, uniform within 1 / sqrt(fan-in) (Hu et al. 2021: their code); draws depend on the layer's name
    Returns the factors by name (unet.middle_block.1.proj_in.lora.down, .up, with DoRA .magnitude): float32, on their
    layer's device, parameters of the model that require gradients. The model's own parameters, their names and its
    state dict stay as they were, and are not frozen here. Raises ArgumentError for a model that has factors or is
    offloaded, and for targets that name no layer of a network that is to learn.
    """
    changes: dict[str, Change] = {}
    for name, layer in _targets(model, spec).items():
        kernel = isinstance(layer, nn.Conv2d)
        r, alpha = (spec.conv_rank, spec.conv_alpha) if kernel else (spec.rank, spec.alpha)
        out, *rest = layer.weight.shape
        bound = 1 / math.sqrt(math.prod(rest))
        digest = blake2b(f"{seed}/{name}".encode(), digest_size=4).digest()  # torch's CPU generator uses 32 bits
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        down = torch.empty(r, *rest).uniform_(-bound, bound, generator=generator)
        change = LowRank(down, torch.zeros(out, r, *(1 for _ in rest[1:])), alpha)
        changes[f"{name}.weight"] = Decomposed(change, lengths(layer.weight.detach())) if spec.dora else change
    return load_into(model, Changes(changes))


def load_into(model: LatentDiffusion, changes: Changes) -> dict[str, nn.Parameter]:
    """Give layers of `model`, in place, these factors to go on learning from; returns the same as `attach`.

    Raises ArgumentError, before anything is changed, for a change of another kind than `attach` makes (plain low-rank
    ones, and DoRA's with a magnitude per output), for a parameter that is no weight of a linear layer or convolution of
    this model, and for another shape.
    """
    if adapted := _adapted(model):
        raise ArgumentError(f"this model has low-rank factors already ({next(iter(adapted))}); detach(model) first")
    if model.runs_on is not None:
        raise ArgumentError("this model is offloaded, and its layers cannot be changed meanwhile: undo that first")
    layers = _layers(model)
    made: dict[str, Factors] = {}
    for parameter, change in changes.items():
        name, _, leaf = parameter.rpartition(".")
        if name not in layers or leaf != "weight":
            what = f"{changes.name}: {parameter} is no weight of a linear layer or convolution here"
            raise ArgumentError(f"{what}; it can be merged, not trained", key=parameter)
        try:
            made[name] = _factors(change, layers[name].weight)
        except ArgumentError as fault:
            raise ArgumentError(f"{changes.name}: {parameter}: {fault}", key=parameter) from None
    parameters: dict[str, nn.Parameter] = {}
    for name, factors in made.items():
        layers[name].__class__ = ADAPTED[type(layers[name])]
        layers[name].lora = factors
        parameters.update(factors.named_parameters(prefix=f"{name}.lora"))
    return parameters


def detach(model: LatentDiffusion) -> None:
    """Take the factors out: layers are as they were. Raises ArgumentError for a model without factors."""
    for layer in _require_adapted(model).values():
        del layer.lora
        layer.__class__ = UNADAPTED[type(layer)]


def changes(model: LatentDiffusion, ema: Mapping[str, Tensor] | None = None) -> Changes:
    """The changes learnt so far, as a copy for `ldm.changes.lora.merge` (after `detach`) and for the writers of files.

    ema  values in place of the parameters', by the names that `attach` returned: averages, or the whole of sharded ones
    Raises ArgumentError for a model without factors, and for an `ema` that lacks one of them.
    """
    found: dict[str, Change] = {}
    for name, layer in _require_adapted(model).items():
        held: dict[str, Tensor] = {}
        for leaf, parameter in layer.lora.named_parameters():
            key = f"{name}.lora.{leaf}"
            if ema is not None and key not in ema:
                raise ArgumentError(f"ema: it has no {key}; give all that attach returned", key=key)
            held[leaf] = (parameter if ema is None else ema[key]).detach().clone()
        found[f"{name}.weight"] = layer.lora.change(held)
    return Changes(found)


def _factors(change: Change, weight: Tensor) -> Factors:
    """New parameters on the weight's device. Raises ArgumentError for a change that cannot be learnt here."""
    require_fit(change, tuple(weight.shape))
    inner = plain(change)
    if not isinstance(inner, LowRank) or inner.mid is not None:
        raise ArgumentError("only plain low-rank factors and DoRA's can be trained; merge it instead")
    r = len(inner.down)

    def own(factor: Tensor, *shape: int) -> Tensor:
        return factor.detach().to(weight.device, torch.float32, copy=True).reshape(shape)

    ones = [1 for _ in weight.shape[2:]]
    factors = LowRank(own(inner.down, r, *weight.shape[1:]), own(inner.up, weight.shape[0], r, *ones), inner.alpha)
    if not isinstance(change, Decomposed):
        return Factors(factors)
    if change.magnitude.shape[1] != 1:
        what = "it is a DoRA with a magnitude per input, and only one per output can be trained; merge it instead"
        raise ArgumentError(what)
    return DecomposedFactors(factors, own(change.magnitude, len(weight), 1))


def _layers(model: LatentDiffusion) -> dict[str, Trainable]:
    """The layers that can have factors, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Trainable) and type(module) in ADAPTED and name.startswith(("unet.", "text."))
    }


def _adapted(model: LatentDiffusion) -> dict[str, Adapted]:
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, Adapted) and type(module) in UNADAPTED}


def _require_adapted(model: LatentDiffusion) -> dict[str, Adapted]:
    adapted = _adapted(model)
    if not adapted:
        raise ArgumentError("this model has no low-rank factors; attach(model, spec) makes them")
    return adapted


def _targets(model: LatentDiffusion, spec: Spec) -> dict[str, Trainable]:
    """The layers that `spec` names, some in each network that is to learn."""
    layers = {name: layer for name, layer in _layers(model).items() if not name.startswith(_unheard(model.config))}
    found: dict[str, Trainable] = {}
    for network, learns in (("unet", spec.unet), ("text", spec.text)):
        if not learns:
            continue
        own = {name: layer for name, layer in layers.items() if name.startswith(f"{network}.")}
        if not own:
            what = f"{network}: a model of family {model.config.name} has no text towers; set text to false"
            raise ArgumentError(what, key=network)
        named = {name: layer for name, layer in own.items() if re.search(spec.targets or USUAL, name)}
        hit = {name: layer for name, layer in named.items() if spec.conv_rank or not isinstance(layer, nn.Conv2d)}
        if not hit:
            where = f"no layer of {network}; try {' or '.join(_nearest(spec.targets, own))}"
            where = "convolutions alone; set conv_rank" if named else where
            raise ArgumentError(f"targets: {(spec.targets or USUAL)[:40]!r} is in the name of {where}", key="targets")
        found |= hit
    return found


def _unheard(config: ModelConfig) -> tuple[str, ...]:
    """The beginnings of names of layers in text towers whose output the UNet is not given: they would learn nothing."""
    names: list[str] = []
    for i, tower in enumerate(config.text):
        if i != config.pooled_tower:
            skipped = range(tower.layers - tower.skip, tower.layers)
            names += [f"text.{i}.text_projection", *(f"text.{i}.text_model.encoder.layers.{k}." for k in skipped)]
    return tuple(names)


def _nearest(wanted: str, names: Iterable[str]) -> list[str]:
    """The two pieces of names, of as many dotted parts as the wanted one, that are most like it."""
    n = wanted.count(".") + 1
    pieces = {
        ".".join(parts[i : i + n]) for parts in (name.split(".") for name in names) for i in range(len(parts) - n + 1)
    }
    return difflib.get_close_matches(wanted, sorted(pieces), n=2, cutoff=0)
