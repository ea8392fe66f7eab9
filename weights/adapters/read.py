"""A LoRA file of any trainer -> the changes that it makes to our parameters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.changes.lora import Change, Changes, Decomposed, Full, Generalised, Hadamard, Kronecker, LowRank, require_fit
from ldm.config import FAMILIES, ModelConfig, UNetConfig
from ldm.errors import AmbiguousCheckpoint, ArgumentError, FileError
from weights.adapters import names as lora_names
from weights.checkpoint import described, open_any
from weights.files.opened import Weights, open_file
from weights.names.detect import require_family

Dialect = Literal["kohya", "diffusers", "peft"]
ALPHA_KEY = "ldm.lora.alpha_dtype"  # in the metadata: the type of the alpha tensors of the kohya file that this one was made from
TOWERS = ("text_encoder", "text_encoder_2")
_SMALLEST = UNetConfig(
    model_channels=32,
    channel_mult=(1,),
    num_res_blocks=1,
    down_depth=((0,),),
    up_depth=((0, 0),),
    mid_depth=None,
    cross_only=(False,),
)
_DIFFUSERS, _PEFT = "pytorch_lora_weights", "adapter_model"


@dataclass(frozen=True)
class Source:
    """A LoRA that was read."""

    changes: Changes
    config: ModelConfig  # of the models that it is for
    dialect: Dialect
    metadata: Mapping[str, str]
    alpha_dtype: torch.dtype | None  # of its alpha tensors, where it has them and all are of one type


def read_lora(path: str | PathLike[str], model_config: ModelConfig | str | None = None) -> Source:
    """All changes of a LoRA, by our names.

    path          a file that `load_lora` reads; a folder with pytorch_lora_weights.safetensors or adapter_model.safetensors in it; or one
                  with a folder of peft's for each network: unet/, text_encoder/, text_encoder_2/
    model_config  the family, or a model's config; None: the family whose targets it has
    Raises FileError as `load_lora` does, and AmbiguousCheckpoint for targets that several families have.
    """
    path = Path(path)
    files = _files(path)
    if isinstance(model_config, str):
        require_family(model_config)
        model_config = FAMILIES[model_config]
    config = family_of(path, files) if model_config is None else model_config
    found: dict[str, Change] = {}
    metadata: dict[str, str] = {}
    keys: set[str] = set()
    dtypes: set[torch.dtype] = set()
    for network, file in files.items():
        found |= _load(network, file, config)
        with open_file(file) as opened:
            metadata |= opened.metadata
            keys |= set(opened)
            dtypes |= {spec.dtype for key, spec in opened.specs.items() if key.endswith(".alpha")}
    if ALPHA_KEY in metadata:
        dtypes = {
            dtype
            for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            if str(dtype) == metadata[ALPHA_KEY]
        }
    alpha_dtype = dtypes.pop() if len(dtypes) == 1 else None
    return Source(Changes(found, path.name), config, _dialect(path, files, keys), metadata, alpha_dtype)


def family_of(path: Path, files: Mapping[str, Path]) -> ModelConfig:
    """The family that has all targets of a LoRA, in its shapes. Families of one kind (sd1 and sd1-inpainting) share their targets: it is the first."""
    found = {name: _fault(files, FAMILIES[name]) for name in KIN}
    fitting, faults = (
        [name for name, fault in found.items() if fault is None],
        [fault for fault in found.values() if fault is not None],
    )
    if len(fitting) == 1:
        return FAMILIES[fitting[0]]
    if fitting:
        raise AmbiguousCheckpoint(
            f"has targets that {', '.join(fitting)} have alike; say which with --family (model_config=)", path=path
        )
    if len({str(fault) for fault in faults}) == 1:  # not the family is at fault
        raise faults[0]
    raise FileError(
        "has targets of no one family at its published sizes; name its model with --family or --ckpt (model_config=)",
        path=path,
    )


def _fault(files: Mapping[str, Path], config: ModelConfig) -> FileError | None:
    """Why a LoRA is none for this family; None: it is one."""
    try:
        for network, file in files.items():
            _load(network, file, config)
    except FileError as fault:
        return fault
    return None


def config_of(path: str | PathLike[str]) -> ModelConfig:
    """The config of the model in a file or folder, of which only the header is read."""
    with open_any(path) as file:
        return described(file).config


def _files(path: Path) -> dict[str, Path]:
    """{network: its file}; one file of all networks is under ""."""
    if not path.is_dir():
        return {"": path}
    networks = {
        name: path / name / f"{_PEFT}{end}"
        for name in ("unet", *TOWERS)
        for end in (".bin", ".safetensors")
        if (path / name / f"{_PEFT}{end}").is_file()
    }
    if networks:
        return networks
    there = [
        path / f"{stem}{end}"
        for stem in (_DIFFUSERS, _PEFT)
        for end in (".safetensors", ".bin")
        if (path / f"{stem}{end}").is_file()
    ]
    if not there:
        raise FileError(
            f"is a directory without a LoRA ({_DIFFUSERS}.safetensors, {_PEFT}.safetensors or folders of peft); name its file",
            path=path,
        )
    return {"": there[0]}


def _load(network: str, file: Path, config: ModelConfig) -> dict[str, Change]:
    """The changes in one file, by our names. In a folder of peft's, of one network, names do not say which
    network they are of; a tower's names no part of the UNet, whose table would take a second to make."""
    if network not in TOWERS:
        return dict(load_lora(file, config))
    i = TOWERS.index(network)
    if i >= len(config.text):
        raise FileError(
            f"is for text tower {i + 1}, a model of family {config.name} has {len(config.text)}; name its family",
            path=file,
        )
    alone = load_lora(
        file, config if len(config.text) == 1 else replace(config, text=(config.text[i],), unet=_SMALLEST)
    )
    return {name.replace("text.0.", f"text.{i}.", 1): change for name, change in alone.items()}


def _dialect(path: Path, files: Mapping[str, Path], keys: set[str]) -> Dialect:
    if "" not in files or files[""].stem == _PEFT:
        return "peft"
    kohya = all(key.startswith("lora_") or "." not in key for key in keys)
    return "kohya" if kohya else "diffusers"


KIN = (
    "sd1",
    "sd2-base",
    "x4-upscaler",
    "ssd-1b",
    "sdxl-base",
    "sdxl-refiner",
)  # one of each kind; what fits two is the smaller's
MAX_SETTINGS = 1_000_000  # bytes of an adapter_config.json


Spelled = dict[tuple[str, str], Change]  # (a module as the file spells it, weight or bias) -> its change


def load_lora(path: str | PathLike[str], model_config: ModelConfig, *, allow_unmatched: bool = False) -> Changes:
    """What a LoRA changes in a model of this config; `ldm.lora.merge` applies it, and `.report()` says "192 of 192 modules".

    path             .safetensors, .ckpt or .pt, with names of kohya (diffusers' or the original's path), diffusers or peft
    allow_unmatched  leave out what this model has no place for, instead of refusing the file
    Alpha is the file's tensor; else, for peft's names, that in `lora_adapter_metadata` or in the adapter_config.json beside
    adapter_model.*; else the rank. Factors that need no conversion are mapped from the file.
    Raises FileError for a file that holds no LoRA, lacks part of one, has shapes that do not fit or is of another family.
    """
    with open_file(path) as file:
        spelled, strays = spelled_changes(file)
        found, unmatched = _resolve(file, spelled, strays, model_config, allow_unmatched)
        file.source.require_unchanged()
    return Changes(found, file.source.path.name, unmatched)


# --- names -> parameters --------------------------------------------------------------------------------------------


def _resolve(
    file: Weights, spelled: Spelled, strays: list[str], config: ModelConfig, allow_unmatched: bool
) -> tuple[dict[str, Change], tuple[str, ...]]:
    """The changes by our names, and what has none. Raises FileError as `load_lora` says."""
    table, shapes = lora_names.spellings(config), lora_names.shapes(config)
    found: dict[str, Change] = {}
    unmatched, misfits = [*strays], []
    for (spelling, leaf), change in spelled.items():
        parameter = f"{table.get(spelling)}.{leaf}"
        if parameter not in shapes:
            unmatched.append(spelling if leaf == "weight" or spelling not in table else f"{spelling}.{leaf}")
            continue
        if parameter in found:
            raise file.error(f"changes {parameter} twice, under two names; which is right cannot be known", spelling)
        found[parameter] = change
        if fault := _misfit(change, shapes[parameter]):
            misfits.append((spelling, fault))
    unmatched = list(dict.fromkeys(unmatched))
    if misfits or not found or not allow_unmatched:
        fits = len(found) - len(misfits)
        _require_family(file, spelled, fits, config)
        if misfits:
            spelling, fault = misfits[0]
            raise file.error(
                f"{_short(spelling)}: {fault}{f' (and {len(misfits) - 1} more)' if len(misfits) > 1 else ''}", spelling
            )
        if unmatched:
            of = len(unmatched) + Changes(found).modules
            remedy = "allow_unmatched leaves them out" if found else "use a LoRA for it"
            names = ", ".join(map(_short, unmatched[:2]))
            raise file.error(
                f"{len(unmatched)} of {of} modules are not in a model of family {config.name} ({names}); {remedy}",
                unmatched[0],
            )
        _require_whole(file, spelled, found, config)
    return found, tuple(unmatched)


def _require_family(file: Weights, spelled: Spelled, fits: int, config: ModelConfig) -> None:
    """Refuse what fits a model of another family better."""
    if fits == len(spelled):
        return
    elsewhere = {name: fitting(spelled, FAMILIES[name]) for name in KIN}
    best = max(elsewhere, key=lambda name: elsewhere[name])
    if elsewhere[best] > fits:
        of = f"of {len(spelled)} weights fit"
        raise file.error(
            f"is a LoRA for {best} ({elsewhere[best]} {of}), the model is {config.name} ({fits} {of}); use one made for {config.name}"
        )


def _require_whole(file: Weights, spelled: Spelled, found: Iterable[str], config: ModelConfig) -> None:
    """Refuse what fits, but is complete only in a family that has fewer blocks: SSD-1B's modules are a part of SDXL's, of the same shapes."""
    changed = {name.rpartition(".")[0] for name in found if name.startswith("unet.")}
    kinds = {_kind(module) for module in changed}

    def whole(family: ModelConfig) -> bool:
        modules = set(lora_names.spellings(family).values())
        return {module for module in modules if module.startswith("unet.") and _kind(module) in kinds} == changed

    if not changed or whole(config):
        return
    for name in KIN:
        if whole(FAMILIES[name]) and fitting(spelled, FAMILIES[name]) == len(spelled):
            raise file.error(
                f"is a LoRA for {name}: it changes exactly the blocks of that; the model is {config.name}; use one made for {config.name}"
            )


def fitting(spelled: Spelled, config: ModelConfig) -> int:
    """How many of the changes have a place of the right shape in a model of this config."""
    table, shapes = lora_names.spellings(config), lora_names.shapes(config)
    places = [(shapes.get(f"{table.get(spelling)}.{leaf}"), change) for (spelling, leaf), change in spelled.items()]
    return sum(shape is not None and _misfit(change, shape) is None for shape, change in places)


def _misfit(change: Change, shape: tuple[int, ...]) -> str | None:
    try:
        require_fit(change, shape)
    except ArgumentError as fault:
        return str(fault)
    return None


def _kind(module: str) -> str:
    """What a module is, without its place: attn1.to_q, proj_in, ..."""
    return re.sub(r"^.*\.\d+\.(?=\D)", "", module)


def _short(name: str, limit: int = 60) -> str:
    return name if len(name) <= limit else "..." + name[3 - limit :]


# --- tensors -> changes ---------------------------------------------------------------------------------------------


def spelled_changes(file: Weights) -> tuple[Spelled, list[str]]:
    """Every change in the file by its spelling, and the keys that are part of none."""
    modules: dict[str, dict[str, str]] = {}  # spelling -> what the tensor is -> key
    strays = []
    for key in file:
        parts = lora_names.split(key)
        if parts is None:
            strays.append(key)
        elif parts[1] in modules.setdefault(parts[0], {}):
            raise file.error(f"has {_short(parts[0])} {parts[1]} under two names; which is right cannot be known", key)
        else:
            modules[parts[0]][parts[1]] = key
    if not modules:
        raise file.error(f"is no LoRA{_instead(file)}", strays[0])
    scalings = _scalings(file)
    spelled: Spelled = {}
    for spelling, keys in modules.items():
        spelled |= {(spelling, leaf): change for leaf, change in _changes(file, spelling, keys, scalings).items()}
    return spelled, strays


def _instead(file: Weights) -> str:
    if any(
        key.startswith(("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner."))
        for key in file
    ):
        return " but a model or a part of one; load it as the model"
    if any(key.startswith(("string_to_param", "emb_params", "clip_l", "clip_g")) for key in file) or (
        len(file) == 1 and "." not in next(iter(file))
    ):
        return " but a textual-inversion embedding"
    return f": it begins with {_short(next(iter(file)), 40)}; use a file of kohya, diffusers, peft or LyCORIS"


def _changes(
    file: Weights, spelling: str, keys: Mapping[str, str], scalings: Mapping[str, _Scaling]
) -> dict[str, Change]:
    """{"weight": ..., "bias": ...}: what one module's tensors say."""
    used: set[str] = set()

    def tensor(part: str) -> Tensor:
        if part not in keys:
            raise file.error(
                f"{_short(spelling)} has no {part} beside its {', '.join(sorted(keys))}; download it again", spelling
            )
        used.add(part)
        spec = file.specs[keys[part]]
        if not spec.dtype.is_floating_point:
            raise file.error(f"{_short(keys[part])} holds {spec.dtype} numbers, not floating-point ones", keys[part])
        return file[keys[part]]

    def optional(part: str) -> Tensor | None:
        return tensor(part) if part in keys else None

    made: dict[str, Change] = {}
    biases = keys.keys() & {"diff_b", "b_norm"}
    if biases:
        made["bias"] = Full(tensor(min(biases)))
    if keys.keys() - {"alpha", "diff_b", "b_norm"} or not biases:
        made["weight"] = _weight(keys.keys(), tensor, optional, _alpha(file, spelling, keys, tensor, scalings))
    if unused := keys.keys() - used - {"alpha"}:
        raise file.error(
            f"{_short(spelling)} has parts of two kinds of LoRA ({', '.join(sorted(keys)[:6])}), {min(unused)} is in the way",
            keys[min(unused)],
        )
    return made


def _weight(
    has: Set[str], tensor: Callable[[str], Tensor], optional: Callable[[str], Tensor | None], alpha: float | None
) -> Change:
    """The change that the parts in `has` make up: the first kind of which there is one."""
    families = {part.partition("_")[0] if part.startswith(("hada_", "lokr_")) else part for part in has}
    change: Any
    if "hada" in families:
        t1 = tensor("hada_t1") if has & {"hada_t1", "hada_t2"} else None
        change = Hadamard(
            *(tensor(f"hada_{part}") for part in ("w1_a", "w1_b", "w2_a", "w2_b")),
            alpha,
            t1,
            None if t1 is None else tensor("hada_t2"),
        )
    elif "lokr" in families:
        one, two = (
            (tensor(f"lokr_{w}_a"), tensor(f"lokr_{w}_b")) if f"lokr_{w}_a" in has else tensor(f"lokr_{w}")
            for w in ("w1", "w2")
        )
        change = Kronecker(one, two, alpha, optional("lokr_t2"))
    elif families & {"a1", "a2", "b1", "b2"}:
        a1, a2, b1, b2 = (tensor(part) for part in ("a1", "a2", "b1", "b2"))
        if _joins(a2, a1, b2, b1) and (
            a1.shape[0] < a1.shape[1] or not _joins(a1, a2, b1, b2)
        ):  # older files of LyCORIS number the factors of a pair the other way round
            a1, a2, b1, b2 = a2, a1, b2, b1
        change = Generalised(a1, a2, b1, b2, alpha)
    elif families & {"diff", "w_norm"}:
        change = Full(tensor("diff" if "diff" in has else "w_norm"))
    else:
        change = LowRank(tensor("down"), tensor("up"), alpha, optional("mid"))
    if "magnitude" in has:  # peft: one per output, laid out [out] for matrices and [1, out, 1, 1] for kernels
        return Decomposed(change, tensor("magnitude").reshape(-1, 1))
    if "dora_scale" in has:
        scale = tensor("dora_scale")
        return Decomposed(
            change,
            scale.reshape(-1, 1)
            if scale.ndim < 2
            else scale.flatten(1)
            if scale.shape[0] > 1
            else scale.reshape(1, -1),
        )
    return change


def _joins(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> bool:
    """Whether these can be [in, r], [r, in], [out, r] and [r, in]. Where both orders can, a rank below the width decides."""
    return min(a1.ndim, a2.ndim, b1.ndim, b2.ndim) >= 2 and a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]


# --- alpha ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scaling:
    """What peft's settings say of alpha."""

    alpha: float  # of modules not in by_module
    by_module: Mapping[str, float] = field(default_factory=dict)  # end of a module's dotted name -> its alpha
    root: bool = False  # rank-stabilised: divided by the root of the rank


def _alpha(
    file: Weights,
    spelling: str,
    keys: Mapping[str, str],
    tensor: Callable[[str], Tensor],
    scalings: Mapping[str, _Scaling],
) -> float | None:
    if "alpha" in keys:
        value = tensor("alpha")
        if value.numel() != 1 or not math.isfinite(float(value.reshape(-1)[0].double())):
            raise file.error(
                f"{_short(keys['alpha'])} is no finite number but {list(value.shape)}; download it again", keys["alpha"]
            )
        return float(value.reshape(-1)[0].double())
    if ".lora_A." not in keys.get("down", ""):
        return None
    module = spelling.replace("base_model.model.", "")
    for component, scaling in scalings.items():
        if module.startswith(component):
            alpha = next(
                (alpha for end, alpha in scaling.by_module.items() if module == end or module.endswith(f".{end}")),
                scaling.alpha,
            )
            return alpha * math.sqrt((*file.shape(keys["down"]), 1)[0]) if scaling.root else alpha
    return None


def _scalings(file: Weights) -> dict[str, _Scaling]:
    """{"unet.": ..., "text_encoder.": ...} from the metadata of diffusers, or {"": ...} from peft's own adapter_config.json."""
    path = file.source.path
    if text := file.metadata.get("lora_adapter_metadata"):
        what = "its lora_adapter_metadata"
        settings = _settings(file.error, text, what)
        parts = {
            part: {key.removeprefix(part): settings[key] for key in settings if key.startswith(part)}
            for part in ("unet.", "text_encoder.", "text_encoder_2.", "")
        }
        return {part: _scaling(file.error, values, what) for part, values in parts.items() if "lora_alpha" in values}
    beside = path.with_name("adapter_config.json")
    if path.stem != "adapter_model" or not beside.is_file():
        return {}

    def error(what: str, key: str | None = None) -> FileError:
        return FileError(what, path=beside, key=key)

    try:
        if beside.stat().st_size > MAX_SETTINGS:
            raise error(f"has more than {MAX_SETTINGS} bytes, which no settings of a LoRA need")
        settings = _settings(error, beside.read_text(encoding="utf-8", errors="replace"), "it")
    except OSError as fault:
        raise error(f"cannot be read ({fault.strerror}), and alpha is in it") from None
    return {"": _scaling(error, settings, "it")}


def _settings(error: Callable[..., FileError], text: str, what: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise error(f"{what} is not a JSON object; download it again")
    return settings


def _scaling(error: Callable[..., FileError], settings: Mapping[str, Any], what: str) -> _Scaling:
    def number(value: Any) -> float:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise error(f"{what} has an alpha that is no finite number; download it again", "lora_alpha")
        return float(value)

    pattern = settings.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or any(not re.fullmatch(r"\w+(\.\w+)*", end) for end in pattern):
        raise error(
            f"{what} has an alpha_pattern that is not made of module names; this version reads no expressions there",
            "alpha_pattern",
        )
    return _Scaling(
        number(settings.get("lora_alpha")),
        {end: number(alpha) for end, alpha in pattern.items()},
        settings.get("use_rslora") is True,
    )
