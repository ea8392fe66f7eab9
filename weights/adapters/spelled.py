"""The tensors of a LoRA file -> changes of modules, under the names that the file gives the modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ldm.changes.lora import Change, Decomposed, Full, Generalised, Hadamard, Kronecker, LowRank, Plain
from weights.adapters import names as lora_names
from weights.adapters.names import short
from weights.adapters.peft import Scaling, scalings
from weights.files.opened import Tensors

Spelled = dict[tuple[str, str], Change]  # (a module as the file spells it, weight or bias) -> its change


def by_spelling(file: Tensors) -> tuple[Spelled, list[str]]:
    """Every change in the file by its spelling, and the keys that are part of none. Raises FileError for no LoRA."""
    modules: dict[str, _Module] = {}
    strays = []
    for key in file:
        spelling, part = lora_names.split(key) or (key, None)
        if part is None:
            strays.append(key)
            continue
        module = modules.setdefault(spelling, _Module(file, spelling))
        if part in module.keys:
            raise file.error(f"has {short(spelling)} {part} under two names; which is right cannot be known", key)
        module.keys[part] = key
    if not modules:
        raise file.error(f"is no LoRA{_instead(file)}", strays[0])
    settings = scalings(file)
    spelled: Spelled = {}
    for spelling, module in modules.items():
        spelled |= {(spelling, leaf): change for leaf, change in module.changes(settings).items()}
    return spelled, strays


def _instead(file: Tensors) -> str:
    models = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")
    words = ("string_to_param", "emb_params", "clip_l", "clip_g")
    first = next(iter(file))
    if any(key.startswith(models) for key in file):
        return " but a model or a part of one; load it as the model"
    if any(key.startswith(words) for key in file) or (len(file) == 1 and "." not in first):
        return " but a textual-inversion embedding; use it with --embedding"
    return f": it begins with {short(first, limit=40)}; use a file of kohya, diffusers, peft or LyCORIS"


@dataclass
class _Module:
    """The tensors of one module, which are read when asked for."""

    file: Tensors
    spelling: str
    keys: dict[str, str] = field(default_factory=dict)  # what the tensor is -> its key
    used: set[str] = field(default_factory=set)  # those that were read

    def tensor(self, part: str) -> Tensor:
        if part not in self.keys:
            beside = ", ".join(sorted(self.keys))
            raise self.file.damaged(f"{short(self.spelling)} has no {part} beside its {beside}", self.spelling)
        self.used.add(part)
        key = self.keys[part]
        if not (dtype := self.file.specs[key].dtype).is_floating_point:
            raise self.file.error(f"{short(key)} holds {dtype} numbers, not floating-point ones", key)
        return self.file[key]

    def optional(self, part: str) -> Tensor | None:
        return self.tensor(part) if part in self.keys else None

    def changes(self, settings: Mapping[str, Scaling]) -> dict[str, Change]:
        """{"weight": ..., "bias": ...}, of which one may be missing."""
        has = self.keys.keys()
        made: dict[str, Change] = {}
        biases = has & {"diff_b", "b_norm"}
        if biases:
            made["bias"] = Full(self.tensor(min(biases)))
        if has - {"alpha", "diff_b", "b_norm"} or not biases:
            made["weight"] = self._decomposed(self._plain(self._alpha(settings)))
        if unused := has - self.used - {"alpha"}:
            parts = ", ".join(sorted(has)[:6])
            what = f"{short(self.spelling)} has parts of two kinds of LoRA ({parts}), {min(unused)} is in the way"
            raise self.file.error(what, self.keys[min(unused)])
        return made

    def _plain(self, alpha: float | None) -> Plain:
        """The change that the parts make up: the first kind that has one of its parts, which must have all of them."""
        has = self.keys.keys()
        if any(part.startswith("hada_") for part in has):
            t1, t2 = (self.tensor(t) if has & {"hada_t1", "hada_t2"} else None for t in ("hada_t1", "hada_t2"))
            w1_a, w1_b, w2_a, w2_b = (self.tensor(f"hada_{w}") for w in ("w1_a", "w1_b", "w2_a", "w2_b"))
            return Hadamard(w1_a, w1_b, w2_a, w2_b, alpha, t1, t2)
        if any(part.startswith("lokr_") for part in has):
            w1, w2 = (self._whole_or_pair(f"lokr_{w}") for w in ("w1", "w2"))
            return Kronecker(w1, w2, alpha, self.optional("lokr_t2"))
        if has & {"a1", "a2", "b1", "b2"}:
            a1, a2, b1, b2 = (self.tensor(part) for part in ("a1", "a2", "b1", "b2"))
            # Older files of LyCORIS number the factors of a pair the other way round.
            if _joins(a2, a1, b2, b1) and (a1.shape[0] < a1.shape[1] or not _joins(a1, a2, b1, b2)):
                a1, a2, b1, b2 = a2, a1, b2, b1
            return Generalised(a1, a2, b1, b2, alpha)
        if has & {"diff", "w_norm"}:
            return Full(self.tensor("diff" if "diff" in has else "w_norm"))
        return LowRank(self.tensor("down"), self.tensor("up"), alpha, self.optional("mid"))

    def _whole_or_pair(self, part: str) -> Tensor | tuple[Tensor, Tensor]:
        return (self.tensor(f"{part}_a"), self.tensor(f"{part}_b")) if f"{part}_a" in self.keys else self.tensor(part)

    def _decomposed(self, change: Plain) -> Change:
        if "magnitude" in self.keys:  # peft: one per output, laid out [out] for matrices and [1, out, 1, 1] for kernels
            return Decomposed(change, self.tensor("magnitude").reshape(-1, 1))
        if (scale := self.optional("dora_scale")) is None:
            return change
        if scale.ndim < 2:
            return Decomposed(change, scale.reshape(-1, 1))
        return Decomposed(change, scale.flatten(1) if scale.shape[0] > 1 else scale.reshape(1, -1))

    def _alpha(self, settings: Mapping[str, Scaling]) -> float | None:
        """The file's tensor; for peft's names else what its settings say; None: the rank."""
        if "alpha" in self.keys:
            value, key = self.tensor("alpha"), self.keys["alpha"]
            if value.numel() != 1 or not math.isfinite(alpha := float(value.reshape(-1)[0].double())):
                raise self.file.damaged(f"{short(key)} is no finite number but {list(value.shape)}", key)
            return alpha
        if ".lora_A." not in self.keys.get("down", ""):
            return None
        name = self.spelling.replace("base_model.model.", "")
        scaling = next((settings[network] for network in settings if name.startswith(network)), None)
        return None if scaling is None else scaling.alpha_of(name, (*self.file.shape(self.keys["down"]), 1)[0])


def _joins(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> bool:
    """Can these be [in, r], [r, in], [out, r] and [r, in]? Where both orders can, a rank below the width decides."""
    return min(a1.ndim, a2.ndim, b1.ndim, b2.ndim) >= 2 and a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]
