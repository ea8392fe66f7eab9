"""Changes -> the tensors and metadata that kohya's scripts and LyCORIS store for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.changes.lora import Change, Decomposed, Full, Generalised, Hadamard, Kronecker, LowRank, Shape, plain, rank
from ldm.config import ModelConfig
from weights.adapters import names as lora_names
from weights.files.write import Pending, cast, pending


def kohya_names(config: ModelConfig) -> dict[str, str]:
    """{our module: how kohya's scripts spell it}: by diffusers' path, or the original's for SDXL's UNet."""
    original, several = config.unet.vector_dim is not None, len(config.text) > 1
    prefixes = {tower: f"lora_te{i + 1 if several else ''}_" for i, tower in enumerate(lora_names.TOWERS)}
    prefixes["unet"] = "lora_unet_"
    spelled = {}
    for module, (network, name) in lora_names.components(config).items():
        path = module.removeprefix("unet.") if network == "unet" and original else name
        spelled[module] = prefixes[network] + path.replace(".", "_")
    return spelled


def kohya_tensors(
    changes: Mapping[str, Change],
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    alpha_dtype: torch.dtype | None = None,
) -> dict[str, Pending]:
    """{key: tensor} for every kind of change; the types as in `write_lora`."""
    names, shapes = kohya_names(config), lora_names.shapes(config)
    tensors: dict[str, Pending] = {}
    for parameter, change in changes.items():
        module, _, leaf = parameter.rpartition(".")
        if isinstance(change, Full) and (leaf == "bias" or len(shapes[parameter]) == 1):
            tensors[difference_key(parameter, names, shapes)] = pending(change.diff.contiguous(), dtype)
            continue
        parts = _parts(change, shapes[parameter])
        tensors |= {f"{names[module]}.{part}": pending(tensor.contiguous(), dtype) for part, tensor in parts.items()}
        if (alpha := alpha_of(change)) is not None:
            first = next(iter(parts.values())).dtype
            tensors[f"{names[module]}.alpha"] = pending(_exactly(alpha, alpha_dtype or cast(first, dtype)))
    return tensors


def difference_key(parameter: str, names: Mapping[str, str], shapes: Mapping[str, Shape]) -> str:
    """The key of a full difference of this parameter; LyCORIS has other ones for norms."""
    module, _, leaf = parameter.rpartition(".")
    norm = len(shapes.get(f"{module}.weight", ())) == 1
    end = {"weight": ("diff", "w_norm"), "bias": ("diff_b", "b_norm")}[leaf][norm]
    return f"{names[module]}.{end}"


def network_facts(changes: Mapping[str, Change]) -> dict[str, str]:
    """The metadata in which kohya's scripts note the rank and alpha of a network, or "Dynamic" where they differ."""
    inner = [plain(change) for change in changes.values()]
    pairs = [(r, getattr(change, "alpha", None)) for change in inner if (r := rank(change)) is not None]
    ranks, alphas = Counter(r for r, _ in pairs), Counter(r if alpha is None else alpha for r, alpha in pairs)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(float(next(iter(alphas)) or 0)) if len(alphas) == 1 else "Dynamic",
    }


def alpha_of(change: Change) -> float | None:
    """alpha, also where it is the rank; None for a change without one."""
    inner = plain(change)
    if isinstance(inner, Full):
        return None
    r = rank(inner)
    return inner.alpha if inner.alpha is not None or r is None else float(r)


def as_layers(change: LowRank, shape: Shape) -> tuple[Tensor, Tensor]:
    """down [r, in(, k, k)] and up [out, r(, 1, 1)] for a weight of this shape: the same numbers."""
    r = change.down.shape[0]
    return change.down.reshape(r, *shape[1:]), change.up.reshape(shape[0], r, *(1 for _ in shape[2:]))


def _exactly(alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha as a tensor of this type, or of the narrowest wider one that holds it exactly."""
    made = (torch.tensor(alpha, dtype=wide) for wide in (dtype, torch.float32, torch.float64))
    return next(tensor for tensor in made if tensor.item() == alpha)


def _parts(change: Change, shape: Shape) -> dict[str, Tensor]:
    """{end of the key: tensor} of one weight's change without alpha. Factors of kernels are kernels too."""
    if isinstance(change, LowRank):
        if change.mid is not None:
            return {"lora_down.weight": change.down, "lora_up.weight": change.up, "lora_mid.weight": change.mid}
        down, up = as_layers(change, shape)
        return {"lora_down.weight": down, "lora_up.weight": up}
    if isinstance(change, Hadamard):
        factors = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
        return {f"hada_{name}": factor for name in factors if (factor := getattr(change, name)) is not None}
    if isinstance(change, Kronecker):
        parts = {} if change.t2 is None else {"lokr_t2": change.t2}
        for name, whole in (("lokr_w1", change.w1), ("lokr_w2", change.w2)):
            parts |= {name: whole} if isinstance(whole, Tensor) else {f"{name}_a": whole[0], f"{name}_b": whole[1]}
        return parts
    if isinstance(change, Generalised):
        return {f"{name}.weight": getattr(change, name) for name in ("a1", "a2", "b1", "b2")}
    if isinstance(change, Decomposed):
        scale = change.magnitude.reshape(*change.magnitude.shape, *(1 for _ in shape[2:]))
        return {**_parts(change.inner, shape), "dora_scale": scale}
    return {"diff": change.diff.reshape(shape)}
