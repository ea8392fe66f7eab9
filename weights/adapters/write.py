"""Changes of a model -> a LoRA file as kohya's scripts, diffusers or peft spell it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor

from ldm.changes.lora import (
    Change,
    Changes,
    Decomposed,
    Full,
    Generalised,
    Hadamard,
    Kronecker,
    LowRank,
    Shape,
    rank,
    require_fit,
)
from ldm.config import ModelConfig
from ldm.disk import replacing, replacing_directory, require_writable, write_all
from ldm.errors import ArgumentError, FileError
from weights.adapters import names as lora_names
from weights.adapters.read import ALPHA_KEY, TOWERS, Dialect
from weights.checkpoint import require_dtype
from weights.files.write import OnWrite, Pending, cast, pending, write
from weights.names.diffusers import diffusers_unet


def require_dialect(to: str) -> None:
    """Refuse what is no dialect."""
    if to not in get_args(Dialect):
        raise ArgumentError(f"to {str(to)[:20]!r}: there are {', '.join(get_args(Dialect))}", key="to")


def network_facts(changes: Mapping[str, Change]) -> dict[str, str]:
    """What kohya's scripts note of a network: its rank and alpha, or "Dynamic" where they differ."""
    inner = [change.inner if isinstance(change, Decomposed) else change for change in changes.values()]
    pairs = [(rank(change), getattr(change, "alpha", None)) for change in inner if rank(change) is not None]
    ranks, alphas = Counter(r for r, _ in pairs), Counter(r if alpha is None else alpha for r, alpha in pairs)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(next(iter(ranks))) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(float(next(iter(alphas)) or 0)) if len(alphas) == 1 else "Dynamic",
    }


ADAPTER = "lora_adapter_metadata"  # where diffusers keeps peft's settings, each after the name of its network
UNTRUE = (
    ADAPTER,
    ALPHA_KEY,
    "modelspec.hash_sha256",
    "sshs_model_hash",
    "sshs_legacy_hash",
)  # metadata that say something of the file they were in
TITLES = {
    LowRank: "a LoCon with a core",
    Hadamard: "a LoHa",
    Kronecker: "a LoKr",
    Generalised: "a GLoRA",
    Full: "a full difference",
    Decomposed: "a DoRA",
}


Tensors = dict[str, Pending]


def write_lora(
    changes: Mapping[str, Change], path: str | PathLike[str], to: Dialect, config: ModelConfig, metadata: Mapping[str, str], *,
    source: Path, dtype: torch.dtype | None = None, alpha_dtype: torch.dtype | None = None, more: Mapping[str, Pending] | None = None,
    overwrite: bool = False, on_write: OnWrite | None = None,
) -> Path:  # fmt: skip
    """Write a LoRA: a file of kohya's or diffusers' names, or with peft's a folder for each network.

    changes      by our names of parameters
    source       the file that they are from, for errors
    dtype        of the factors; None: as they are. alpha keeps its value exactly, whatever its type
    alpha_dtype  of the alpha tensors, where it holds them exactly; peft and diffusers keep alpha as text
    more         tensors under their names in the file, for kohya
    Raises FileError, with the first module, for what the dialect has no way to say; OutputError.
    """
    metadata = {key: value for key, value in metadata.items() if key not in UNTRUE}
    if to == "kohya":
        tensors = kohya(changes, config, dtype, alpha_dtype) | dict(more or {})
        return write(tensors, path, {"format": "pt", **metadata}, overwrite=overwrite, on_write=on_write)
    if alpha_dtype is not None:
        metadata[ALPHA_KEY] = str(alpha_dtype)
    require_held(changes, to, config, source)
    networks = by_network(changes, config)
    if to == "diffusers":
        tensors = {
            f"{name}.{key}": tensor
            for name, held in networks.items()
            for key, tensor in peft_tensors(held, dtype).items()
        }
        said = {f"{name}.{key}": value for name, held in networks.items() for key, value in settings(held).items()}
        metadata[ADAPTER] = json.dumps(said, indent=2, sort_keys=True)
        return write(tensors, path, {"format": "pt", **metadata}, overwrite=overwrite, on_write=on_write)
    with replacing_directory(path, overwrite) as folder:
        for name, held in networks.items():
            (folder / name).mkdir()
            bare = (
                "text_model." if name == TOWERS[0] else ""
            )  # transformers 5 has dropped it from CLIPTextModel, not from the second tower's class; peft maps no names
            tensors = {
                f"base_model.model.{key.removeprefix(bare)}": tensor
                for key, tensor in peft_tensors(held, dtype).items()
            }
            write(tensors, folder / name / "adapter_model.safetensors", {"format": "pt", **metadata}, on_write=on_write)
            text = json.dumps(
                {
                    "peft_type": "LORA",
                    "task_type": None,
                    "base_model_name_or_path": None,
                    "bias": "none",
                    **settings(held),
                },
                indent=2,
                sort_keys=True,
            )
            with replacing(folder / name / "adapter_config.json", False) as descriptor:
                write_all(descriptor, text.encode())
    return Path(path)


# --- kohya ----------------------------------------------------------------------------------------------------------


def kohya_names(config: ModelConfig) -> dict[str, str]:
    """{our module: how kohya's scripts spell it}: the original's path for the SDXL kind, whose UNet they took from there, else diffusers'."""
    original, several = config.unet.vector_dim is not None, len(config.text) > 1
    prefixes = {"unet": "lora_unet_"} | {name: f"lora_te{i + 1 if several else ''}_" for i, name in enumerate(TOWERS)}
    spelled = {}
    for module, (network, name) in components(config).items():
        path = module.removeprefix("unet.") if network == "unet" and original else name
        spelled[module] = prefixes[network] + path.replace(".", "_")
    return spelled


def kohya(
    changes: Mapping[str, Change],
    config: ModelConfig,
    dtype: torch.dtype | None = None,
    alpha_dtype: torch.dtype | None = None,
) -> Tensors:
    """Every kind of change, as kohya's scripts and LyCORIS store it."""
    names, shapes = kohya_names(config), lora_names.shapes(config)
    tensors: Tensors = {}
    for parameter, change in changes.items():
        module, _, leaf = parameter.rpartition(".")
        if leaf == "bias":
            assert isinstance(change, Full)  # nothing else is read of a bias
            tensors[f"{names[module]}.{'b_norm' if _is_norm(module, shapes) else 'diff_b'}"] = pending(
                change.diff, dtype
            )
            continue
        parts = (
            {"w_norm": change.diff}
            if isinstance(change, Full) and _is_norm(module, shapes)
            else _parts(change, shapes[parameter])
        )
        tensors |= {f"{names[module]}.{part}": pending(tensor.contiguous(), dtype) for part, tensor in parts.items()}
        if (alpha := _alpha(change)) is not None:
            first = next(iter(parts.values())).dtype
            tensors[f"{names[module]}.alpha"] = pending(exactly(alpha, alpha_dtype or cast(first, dtype)))
    return tensors


def difference_key(parameter: str, names: Mapping[str, str], shapes: Mapping[str, Shape]) -> str:
    """Under which key kohya's dialect has a full difference of this parameter; LyCORIS calls those of norms otherwise."""
    module, _, leaf = parameter.rpartition(".")
    norm = _is_norm(module, shapes)
    return f"{names[module]}.{('w_norm' if norm else 'diff') if leaf == 'weight' else 'b_norm' if norm else 'diff_b'}"


def exactly(alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha as a tensor of this type, or of the narrowest wider one that holds it exactly."""
    return next(
        made
        for made in (torch.tensor(alpha, dtype=wide) for wide in (dtype, torch.float32, torch.float64))
        if made.item() == alpha
    )


def _is_norm(module: str, shapes: Mapping[str, Shape]) -> bool:
    return len(shapes.get(f"{module}.weight", ())) == 1


def _parts(change: Change, shape: Shape) -> dict[str, Tensor]:
    """{end of the key: tensor} of one weight's change, alpha aside. Factors of kernels are kernels, as layers of their own would have them."""
    if isinstance(change, LowRank):
        if change.mid is not None:
            return {"lora_down.weight": change.down, "lora_up.weight": change.up, "lora_mid.weight": change.mid}
        down, up = as_layers(change, shape)
        return {"lora_down.weight": down, "lora_up.weight": up}
    if isinstance(change, Hadamard):
        cores = {} if change.t1 is None or change.t2 is None else {"hada_t1": change.t1, "hada_t2": change.t2}
        return {
            "hada_w1_a": change.w1_a,
            "hada_w1_b": change.w1_b,
            "hada_w2_a": change.w2_a,
            "hada_w2_b": change.w2_b,
            **cores,
        }
    if isinstance(change, Kronecker):
        parts = {} if change.t2 is None else {"lokr_t2": change.t2}
        for name, whole in (("lokr_w1", change.w1), ("lokr_w2", change.w2)):
            parts |= {name: whole} if isinstance(whole, Tensor) else {f"{name}_a": whole[0], f"{name}_b": whole[1]}
        return parts
    if isinstance(change, Generalised):
        return {f"{name}.weight": getattr(change, name) for name in ("a1", "a2", "b1", "b2")}
    if isinstance(change, Full):
        return {"diff": change.diff.reshape(shape)}
    scale = change.magnitude.reshape(*change.magnitude.shape, *(1 for _ in shape[2:]))
    return {**_parts(change.inner, shape), "dora_scale": scale}


def as_layers(change: LowRank, shape: Shape) -> tuple[Tensor, Tensor]:
    """down [r, in(, k, k)] and up [out, r(, 1, 1)] for a weight of this shape: the same numbers."""
    r = change.down.shape[0]
    return change.down.reshape(r, *shape[1:]), change.up.reshape(shape[0], r, *(1 for _ in shape[2:]))


def _alpha(change: Change) -> float | None:
    """alpha, said even where it is the rank; None where there is no such thing."""
    inner = change.inner if isinstance(change, Decomposed) else change
    if isinstance(inner, Full):
        return None
    r = rank(inner)
    return inner.alpha if inner.alpha is not None or r is None else float(r)


# --- diffusers and peft ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def components(config: ModelConfig) -> Mapping[str, tuple[str, str]]:
    """{our module: (unet or text_encoder(_2), the module's name in diffusers or transformers)}."""
    found = {f"unet.{_module(ours)}": ("unet", _module(theirs)) for ours, theirs in diffusers_unet(config.unet).items()}
    for key in lora_names.shapes(config):
        network, _, rest = _module(key).partition(".")
        if network == "text":
            tower, _, name = rest.partition(".")
            found[_module(key)] = TOWERS[int(tower)], name
    return MappingProxyType(found)


def require_held(changes: Mapping[str, Change], to: Dialect, config: ModelConfig, source: Path) -> None:
    """Raise FileError, with the first module, unless diffusers and peft have a way to say every change."""
    if to == "kohya":
        return
    decomposed: dict[str, tuple[bool, str]] = {}
    for parameter, change in changes.items():
        module, _, leaf = parameter.rpartition(".")
        if (what := unheld(change)) is not None:
            remedy = "use --as-lora RANK" if expressible(change) else "merge it instead"
            raise FileError(
                f"{_short(module)}{'.bias' if leaf == 'bias' else ''} is {what}, which {to} cannot hold; {remedy}",
                path=source,
                key=parameter,
            )
        if module.startswith("text.") and len(config.text) == 1 and config.unet.vector_dim is not None:
            raise FileError(
                f"{_short(module, 30)} is of the refiner's text tower, for which {to} has no settled name; keep kohya's",
                path=source,
                key=parameter,
            )
        network, dora = components(config)[module][0], isinstance(change, Decomposed)
        before = decomposed.setdefault(network, (dora, module))
        if before[0] != dora:
            one = module if dora else before[1]
            raise FileError(
                f"{_short(one)} is a DoRA, others beside it are not: {to} holds no mixture; merge it instead",
                path=source,
                key=parameter,
            )


def unheld(change: Change) -> str | None:
    """What this is, if it is nothing that diffusers and peft hold; None if they do."""
    if isinstance(change, Decomposed):
        if change.magnitude.shape[1] != 1:
            return "a DoRA with a magnitude per input"
        return unheld(change.inner) and f"a DoRA of {unheld(change.inner)}"
    if isinstance(change, LowRank) and change.mid is None:
        return None
    return TITLES[type(change)]


def expressible(change: Change) -> bool:
    """Is this a matrix that needs no weight to be known?"""
    return isinstance(change, (LowRank, Hadamard, Kronecker)) or (isinstance(change, Full) and change.diff.ndim > 1)


def by_network(changes: Mapping[str, Change], config: ModelConfig) -> dict[str, dict[str, tuple[Change, Shape]]]:
    """{unet or text_encoder(_2): {module as diffusers names it: its change, the shape of its weight}}."""
    networks: dict[str, dict[str, tuple[Change, Shape]]] = {}
    for parameter, change in changes.items():
        network, name = components(config)[_module(parameter)]
        networks.setdefault(network, {})[name] = change, lora_names.shapes(config)[parameter]
    return networks


def peft_tensors(held: Mapping[str, tuple[Change, Shape]], dtype: torch.dtype | None) -> Tensors:
    """Factors of one network as peft keys them, without what comes before the module's name."""
    tensors: Tensors = {}
    for name, (change, shape) in held.items():
        inner = change.inner if isinstance(change, Decomposed) else change
        assert isinstance(inner, LowRank)
        down, up = as_layers(inner, shape)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = (
            pending(down.contiguous(), dtype),
            pending(up.contiguous(), dtype),
        )
        if isinstance(change, Decomposed):  # [out] of a matrix, [1, out, 1, 1] of a kernel
            magnitude = change.magnitude.flatten()
            tensors[f"{name}.lora_magnitude_vector"] = pending(
                magnitude if len(shape) == 2 else magnitude.reshape(1, -1, *(1 for _ in shape[2:])), dtype
            )
    return tensors


def settings(held: Mapping[str, tuple[Change, Shape]]) -> dict[str, Any]:
    """peft's LoraConfig of one network: rank and alpha of most modules, and patterns for the others.

    peft takes a pattern for the end of a module's name, and no whole name here is the end of another. The names of text towers are written
    without `text_model.`, which transformers 5 has dropped from some: so they end the old names and the new.
    """
    ranks = {name.removeprefix("text_model."): rank(change) or 1 for name, (change, _) in held.items()}
    alphas = {name.removeprefix("text_model."): _number(_alpha(change) or 0.0) for name, (change, _) in held.items()}
    r, alpha = _most(ranks.values()), _most(alphas.values())
    return {
        "r": r, "lora_alpha": alpha, "rank_pattern": {name: one for name, one in ranks.items() if one != r},
        "alpha_pattern": {name: one for name, one in alphas.items() if one != alpha}, "target_modules": sorted(ranks),
        "use_dora": any(isinstance(change, Decomposed) for change, _ in held.values()), "use_rslora": False,
    }  # fmt: skip


def _most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _short(name: str, limit: int = 36) -> str:
    return name if len(name) <= limit else "..." + name[3 - limit :]


def save_lora(
    changes: Changes, path: str | PathLike[str], config: ModelConfig, to: Dialect = "kohya", *,
    metadata: Mapping[str, str] | None = None, dtype: torch.dtype | None = None, overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write a LoRA that `load_lora` and other programs read.

    changes  of `ldm.lora_layers.changes`, or any other
    config   of the model that they change
    to       "kohya": a file for kohya's scripts, A1111 and ComfyUI, that notes rank and alpha as they do; "diffusers": a file for
             `pipe.load_lora_weights`; "peft": a directory with a folder for each network
    dtype    of the factors; None: as they are. alpha keeps its value exactly
    All or nothing. Raises ArgumentError, also for changes that do not fit the config; FileError for one that the dialect has no way to
    say; OutputError, also where `path` exists and `overwrite` is false.
    """
    require_dialect(to)
    if dtype is not None:
        require_dtype(dtype)
    _require_fit(changes, config)
    require_writable(path, overwrite, directory=to == "peft")
    require_held(changes, to, config, Path(path))
    return write_lora(
        changes,
        path,
        to,
        config,
        network_facts(changes) | dict(metadata or {}),
        source=Path(path),
        dtype=dtype,
        overwrite=overwrite,
    )


def _require_fit(changes: Changes, config: ModelConfig) -> None:
    if not changes:
        raise ArgumentError(f"{changes.name}: there is no change to save")
    shapes = lora_names.shapes(config)
    for name, change in changes.items():
        if name not in shapes:
            raise ArgumentError(
                f"{changes.name}: a model of family {config.name} has no parameter {name}; give the config that was trained",
                key=name,
            )
        try:
            require_fit(change, shapes[name])
        except ArgumentError as fault:
            raise ArgumentError(f"{changes.name}: {name}: {fault}", key=name) from None
