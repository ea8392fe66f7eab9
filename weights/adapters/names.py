"""How LoRA files spell the modules of a model: tables made from its config, and looked up whole, because underscores cannot be parsed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

from ldm.changes.lora import Shape
from ldm.config import ModelConfig
from ldm.networks.clip import CLIPText
from ldm.networks.unet import UNet
from weights.names import blank
from weights.names.diffusers import diffusers_unet

SUFFIXES: dict[str, str] = {  # end of a key -> what the tensor is; before it stands the spelling of the module
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",  # kohya
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers 0.18 to 0.21
    ".down.weight": "down", ".up.weight": "up",  # diffusers before: the spelling ends in _lora or lora_linear_layer
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # peft
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",  # the same with the adapter's name left in
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude", ".lora_magnitude_vector.default.weight": "magnitude",
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
    theirs = {_module(ours): _module(name) for ours, name in diffusers_unet(config.unet).items()}
    for module, name in theirs.items():
        table |= dict.fromkeys(_of_unet(module, name), f"unet.{module}")
    for tower in range(len(config.text)):
        prefix = f"text.{tower}."
        for module in {_module(key.removeprefix(prefix)) for key in shapes(config) if key.startswith(prefix)}:
            table |= dict.fromkeys(_of_text(module, tower, len(config.text)), prefix + module)
    return MappingProxyType(table)


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
    yield from (
        f"{prefix}_{_joined(module)}" for prefix in (f"lora_te{tower + 1}", *(["lora_te"] if towers == 1 else []))
    )
    component = "text_encoder." if tower == 0 else f"text_encoder_{tower + 1}."
    prefixes = (component, *_peft(component), *(["base_model.model."] if towers == 1 else []))
    for name in dict.fromkeys(
        (module, module.removeprefix("text_model."))
    ):  # transformers 5 has no text_model. in its names
        yield from (f"{prefix}{name}" for prefix in prefixes)
        yield f"{component}{name}.lora_linear_layer"
        attention, _, leaf = name.partition(".self_attn.")
        if leaf:
            old = f"to_{leaf.removesuffix('_proj')}_lora"
            yield from (f"{component}{attention}.self_attn.{old}", f"{component}{name}.{old}")


def _peft(component: str) -> tuple[str, str]:
    """`base_model.model.` is put before the component's name when a pipeline is saved, and after it when each network is."""
    return f"base_model.model.{component}", f"{component}base_model.model."


def _joined(name: str) -> str:
    return name.replace(".", "_")
