"""How LoRA files spell the modules of a model: in whole names, since names with underscores cannot be parsed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Literal

from ldm.changes.lora import Shape
from ldm.config import ModelConfig
from ldm.networks.clip import CLIPText
from ldm.networks.unet import UNet
from weights.names import blank, places
from weights.names.diffusers import diffusers_unet

Dialect = Literal["kohya", "diffusers", "peft"]
TOWERS = ("text_encoder", "text_encoder_2")  # as diffusers and peft name them
# Metadata: the type of the alpha tensors of the kohya file that this one was made from.
ALPHA_KEY = "ldm.lora.alpha_dtype"
short = partial(places.short, limit=60)

SUFFIXES: dict[str, str] = {  # end of a key -> what the tensor is; before it stands the spelling of the module
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",  # kohya
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers 0.18 to 0.21
    ".down.weight": "down", ".up.weight": "up",  # diffusers before: the spelling ends in _lora or lora_linear_layer
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # peft
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",  # the same with the adapter's name left in
    **{f".lora_magnitude_vector{end}": "magnitude" for end in ("", ".weight", ".default.weight")},
    ".alpha": "alpha", ".dora_scale": "dora_scale",
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".{part}.weight": part for part in ("a1", "a2", "b1", "b2")},  # GLoRA
    ".diff": "diff", ".diff_b": "diff_b", ".w_norm": "w_norm", ".b_norm": "b_norm",
}  # fmt: skip


def split(key: str) -> tuple[str, str] | None:
    """(spelling of the module, what the tensor is); None for a key that no kind of LoRA has."""
    suffix = max((end for end in SUFFIXES if key.endswith(end)), key=len, default=None)
    return None if suffix is None else (key.removesuffix(suffix), SUFFIXES[suffix])


@lru_cache(maxsize=16)  # several LoRAs of one model are looked up in the same tables
def shapes(config: ModelConfig) -> Mapping[str, Shape]:
    """{our name: shape} of every parameter that a LoRA can change: those of the UNet and of the text towers."""
    networks = {
        "unet": blank.shapes(UNet, config.unet),
        **{f"text.{i}": blank.shapes(CLIPText, text) for i, text in enumerate(config.text)},
    }
    return MappingProxyType(
        {f"{name}.{key}": shape for name, network in networks.items() for key, shape in network.items()}
    )


@lru_cache(maxsize=16)
def spellings(config: ModelConfig) -> Mapping[str, str]:
    """{spelling of a module: our name of it} for every way in which files name it."""
    table: dict[str, str] = {}
    for module, (network, name) in components(config).items():
        if network == "unet":
            table |= dict.fromkeys(_of_unet(module.removeprefix("unet."), name), module)
        else:
            table |= dict.fromkeys(_of_text(name, TOWERS.index(network), len(config.text)), module)
    return MappingProxyType(table)


@lru_cache(maxsize=16)
def components(config: ModelConfig) -> Mapping[str, tuple[str, str]]:
    """{our module: (unet or text_encoder(_2), the module's name in diffusers or transformers)}."""
    found = {f"unet.{_module(ours)}": ("unet", _module(name)) for ours, name in diffusers_unet(config.unet).items()}
    for key in shapes(config):
        network, _, rest = _module(key).partition(".")
        if network == "text":
            tower, _, name = rest.partition(".")
            found[_module(key)] = TOWERS[int(tower)], name
    return MappingProxyType(found)


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _of_unet(module: str, diffusers: str) -> Iterator[str]:
    yield from (f"lora_unet_{_joined(name)}" for name in (diffusers, module))  # kohya, both paths
    yield from (f"{prefix}{diffusers}" for prefix in ("unet.", *_peft("unet."), "base_model.model.", ""))
    attention, _, leaf = diffusers.partition(".to_")
    if leaf:  # ....attn1.to_out.0 -> ....attn1.processor.to_out_lora; without unet. in the first files
        processor = f"{attention}.processor.to_{leaf.removesuffix('.0')}_lora"
        yield from (f"unet.{processor}", processor)


def _of_text(module: str, tower: int, towers: int) -> Iterator[str]:
    """A model of one tower may be spelled with or without a number; the towers of SDXL are told apart by it."""
    alone = towers == 1
    yield from (f"{prefix}_{_joined(module)}" for prefix in (f"lora_te{tower + 1}", *(["lora_te"] if alone else [])))
    component = f"{TOWERS[tower]}."
    prefixes = (component, *_peft(component), *(["base_model.model."] if alone else []))
    for name in dict.fromkeys((module, module.removeprefix("text_model."))):  # transformers 5 leaves text_model. out
        yield from (f"{prefix}{name}" for prefix in prefixes)
        yield f"{component}{name}.lora_linear_layer"
        attention, _, leaf = name.partition(".self_attn.")
        if leaf:
            old = f"to_{leaf.removesuffix('_proj')}_lora"
            yield from (f"{component}{attention}.self_attn.{old}", f"{component}{name}.{old}")


def _peft(component: str) -> tuple[str, str]:
    """A saved pipeline has `base_model.model.` before the component's name, a saved network has it after the name."""
    return f"base_model.model.{component}", f"{component}base_model.model."


def _joined(name: str) -> str:
    return name.replace(".", "_")
