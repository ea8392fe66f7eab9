"""The names and shapes of published files, and seeded tensors of every family under those names, narrow or wide."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.models.seeded import GOLDEN, weight
from ldm.config import FAMILIES, DepthConfig, ModelConfig

MANIFESTS = GOLDEN / "manifests"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32}
PREFIXES = {"unet.": "model.diffusion_model.", "vae.": "first_stage_model.", "text.0.": "cond_stage_model.transformer."}


def manifest(name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Key -> shape and dtype of every tensor in a published file."""
    tensors = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))["tensors"]
    return {key: (tuple(entry["shape"]), DTYPES[entry["dtype"]]) for key, entry in tensors.items()}


def original_name(name: str) -> str:
    """The published name of one of our SD 1 parameters."""
    (ours,) = (prefix for prefix in PREFIXES if name.startswith(prefix))
    return PREFIXES[ours] + name.removeprefix(ours)


def seeded(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """A value for every key, which the key alone determines."""
    made: dict[str, Tensor] = {}
    for key, (shape, dtype) in shapes.items():
        if key.endswith("position_ids"):
            made[key] = torch.arange(shape[-1]).expand(shape).clone().to(dtype)
        else:
            made[key] = (weight(key, shape) if dtype.is_floating_point else torch.full(shape, 470_000)).to(dtype)
    return made


# -- every published file, narrow --------------------------------------------------------------------------------------

_SHOWN = {  # the family that the shapes of a file show (not eps or v): its manifests
    "sd1": "sd1 sd1-full sd1-pruned-fp16 sd1-pruned-fp16-posids16",
    "sd1-inpainting": "sd1-inpainting", "sd2-inpainting": "sd2-inpainting", "sdxl-inpainting": "sdxl-inpainting",
    "sd-image-variations": "sd-image-variations sd-image-variations-notext",
    "sd2-base": "sd2-base sd2-v sd2-sgm", "sd2-depth": "sd2-depth", "x4-upscaler": "x4-upscaler",
    "sdxl-base": "sdxl-base sdxl-base-0.9 sdxl-base-posids16",
    "sdxl-refiner": "sdxl-refiner sdxl-refiner-0.9",
    "ssd-1b": "ssd-1b ssd-1b-hfscript",
    None: "sd21-unclip-h vae-standalone",  # recognised, and refused
}  # fmt: skip
FILES = {name: family for family, names in _SHOWN.items() for name in names.split()}  # manifest -> family
VOCAB = 512  # tokens of the narrow towers
UNIT = {"x4-upscaler": 8, "sdxl-refiner": 12}  # by what the widths of a UNet are divided, to begin at 32; else by 10
NARROW_DEPTH = replace(DepthConfig(), stem=32, width=48, mlp=192, features=16)


def tiny(family: str) -> ModelConfig:
    """The family with all its layers and names, each network 4 to 16 times as narrow."""
    full = FAMILIES[family]
    vector = full.unet.vector_dim and full.unet.vector_dim // 16
    unet = replace(full.unet, model_channels=32, context_dim=full.unet.context_dim // 16, vector_dim=vector)
    unet = replace(unet, head_dim=16) if unet.head_dim else unet
    text = tuple(
        replace(t, vocab=VOCAB, width=t.width // 16, mlp=t.mlp // 16, projection=t.projection and t.projection // 16)
        for t in full.text
    )
    vision = full.vision and replace(full.vision, width=64, mlp=256, projection=48)
    depth = full.depth and NARROW_DEPTH
    return replace(full, unet=unet, vae=replace(full.vae, channels=32), text=text, vision=vision, depth=depth, size=64)


def narrow(key: str, shape: tuple[int, ...], unit: int) -> tuple[int, ...]:
    """The shape of this published tensor in a `tiny` model, under its name in a single file or in `folder/name`."""
    if key.startswith(("model.diffusion_model.", "model_ema.diffusion_model", "unet/")):
        return _narrow_unet(key, shape, unit)
    if key.startswith(("first_stage_model.", "vae/")):
        return tuple(n // 4 if n >= 64 else n for n in shape)
    if key.startswith("depth_model."):
        if "backbone" in key:
            return tuple(n // 2 if n >= 64 else n for n in shape)
        if "patch_embed.proj.weight" in key or re.search(r"layer[12]_rn", key):
            return (shape[0] // 16, shape[1] // 2, *shape[2:])
        return tuple(n // 16 if n % 16 == 0 and n >= 128 else n for n in shape)
    if key.startswith(("cond_stage_model.", "conditioner.", "text_encoder", "image_encoder/")):
        return tuple(VOCAB if n == 49408 else n // 16 if n >= 768 else n for n in shape)
    return shape


def _narrow_unet(key: str, shape: tuple[int, ...], unit: int) -> tuple[int, ...]:
    narrowed = [n // unit if n >= 256 and n != 1000 else n for n in shape]
    to_context = re.search(r"attn2\.?to_[kv]", key) or (re.search(r"attn1\.?to_[kv]", key) and shape[0] != shape[1])
    if to_context or re.search(r"(label_emb\.?0\.?0\.?|add_embedding\.linear_1\.)weight$", key):
        narrowed[1] = shape[1] // 16
    return tuple(narrowed)


def narrow_manifest(name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The same as `manifest`, as narrow as `tiny`."""
    unit = UNIT.get(FILES[name] or "", 10)
    return {key: (narrow(key, shape, unit), dtype) for key, (shape, dtype) in manifest(name).items()}


def narrowed(name: str) -> dict[str, Tensor]:
    """Seeded tensors with the names and dtypes of a published file, as narrow as `tiny`. Callers share the tensors."""
    return dict(_narrowed(name))


@lru_cache(maxsize=8)  # the tests of one family follow each other
def _narrowed(name: str) -> dict[str, Tensor]:
    return seeded(narrow_manifest(name))


# -- what a file means, written independently of `weights` -------------------------------------------------------------

MEANING = {"model.diffusion_model.": "unet.", "first_stage_model.": "vae.", "depth_model.model.": "depth."}
UNREAD = ("depth.pretrained.model.head.", "vae.loss.")


def meaning(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a single file that a network reads, under our names, which for CLIP are Hugging Face's."""
    parts = [(ours, inside(state, theirs)) for theirs, ours in MEANING.items()]
    out = {f"{ours}{key}": value for ours, part in parts for key, value in part.items()}
    out = {key: value for key, value in out.items() if not key.startswith(UNREAD)}
    if visual := inside(state, "cond_stage_model.model.visual."):
        return out | {f"vision.{key}": value for key, value in from_openai_vision(visual).items()}
    i = 0
    for prefix in ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1."):
        for tower in (inside(state, f"{prefix}transformer."), from_openclip(inside(state, f"{prefix}model."))):
            out |= {f"text.{i}.{key}": value for key, value in tower.items() if "position_ids" not in key}
            i += bool(tower)
    return out


def inside(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What lies under a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _from_blocks(state: Mapping[str, Tensor], table: Mapping[str, str], model: str) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", key)
        layer, rest = f"{model}.encoder.layers.{match[1]}." if match else "", match[2] if match else ""
        if rest.startswith("attn.in_proj_"):
            parts = zip("qkv", value.chunk(3), strict=True)
            out |= {f"{layer}self_attn.{part}_proj.{rest[13:]}": value for part, value in parts}
        elif match:
            for theirs, ours in (("ln_", "layer_norm"), ("attn.", "self_attn."), ("c_fc", "fc1"), ("c_proj", "fc2")):
                rest = rest.replace(theirs, ours)
            out[layer + rest] = value
        elif key in table:
            out[f"{model}.{table[key]}"] = value
    return out


OPENCLIP = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
}  # fmt: skip
OPENAI_VISION = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "class_embedding": "embeddings.class_embedding", "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight", "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight", "ln_post.bias": "post_layernorm.bias",
}  # fmt: skip


def from_openclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower of OpenCLIP under Hugging Face's names, without `logit_scale`."""
    out = _from_blocks(state, OPENCLIP, "text_model")
    for key, value in state.items():
        if key.startswith("text_projection"):
            out["text_projection.weight"] = value.T if key == "text_projection" else value
    return out


def from_openai_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower of OpenAI's CLIP under Hugging Face's names."""
    return _from_blocks(state, OPENAI_VISION, "vision_model") | {"visual_projection.weight": state["proj"].T}
