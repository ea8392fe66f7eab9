"""Seeded checkpoints, written to disk in the layouts in which models were published."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import pathlib
import re
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ldm.config import FAMILIES, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.model import LatentDiffusion
from tests.made.seeded import weight

MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32}

TINY = ModelConfig(  # every kind of layer that SD 1 has, 2.5 million parameters
    "sd1",
    unet=UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, context_dim=64, heads=4,
        down_depth=((1,), (0,)), up_depth=((0, 0), (1, 1)), cross_only=(False, False),
    ),
    vae=VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1),
    text=(TextConfig(vocab=1000, width=64, layers=3, heads=4, mlp=256),),
)  # fmt: skip

PREFIXES = {"unet.": "model.diffusion_model.", "vae.": "first_stage_model.", "text.0.": "cond_stage_model.transformer."}
POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


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


def checkpoint(
    config: ModelConfig = TINY,
    *,
    dtype: torch.dtype = torch.float32,
    position_ids: Literal["I64", "F16", "F32", "wrong"] | None = "I64",
    buffers: bool = True,
    text_model: bool = True,
    ema: Literal["leftover", "full"] | None = "leftover",
) -> dict[str, Tensor]:
    """An SD 1 checkpoint of this size, as published files have it or with the damage that is seen in the wild."""
    with torch.device("meta"):
        names = {
            original_name(name): tuple(tensor.shape) for name, tensor in LatentDiffusion(config).state_dict().items()
        }
    state = seeded({key: (shape, dtype) for key, shape in names.items()})
    if position_ids:
        ids = torch.arange(config.text[0].length)[None]
        state[POSITION_IDS] = ids.flip(1) if position_ids == "wrong" else ids.to(DTYPES[position_ids])
    if buffers:
        betas = [(key, entry) for key, entry in manifest("sd1").items() if "." not in key]
        state = {**seeded(dict(betas)), **state}
    if ema:
        state["model_ema.decay"], state["model_ema.num_updates"] = (
            torch.tensor(0.9999),
            torch.tensor(470_000, dtype=torch.int32),
        )
    if ema == "full":
        state |= {
            ema_name(key): weight("ema " + key, shape).to(dtype)
            for key, shape in names.items()
            if key.startswith("model.")
        }
    if not text_model:
        state = {key.replace(".text_model.", "."): value for key, value in state.items()}
    return state


def ema_name(key: str) -> str:
    """Where the original code keeps the moving average of `key`."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


@contextlib.contextmanager
def pretended(*names: str) -> Iterator[list[type]]:
    """Classes that pickle as if they came from these packages, installed or not."""
    before = dict(sys.modules)
    classes = []
    try:
        for module, _, name in (full.rpartition(".") for full in names):
            parts = module.split(".")
            for i in range(1, len(parts) + 1):
                parent = ".".join(parts[:i])
                if parent not in sys.modules or i == len(parts):
                    sys.modules[parent] = types.ModuleType(parent)
            classes.append(type(name, (), {"__module__": module}))
            setattr(sys.modules[module], name, classes[-1])
        yield classes
    finally:
        sys.modules.clear()
        sys.modules.update(before)


class _Scalar:
    """A number that pickles as a numpy scalar does, under numpy's name of the day."""

    def __init__(self, function: type, value: float):
        self.function, self.value = function, value

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (np.dtype("float64"), struct.pack("<d", self.value))


@contextlib.contextmanager
def lightning(state: Mapping[str, Tensor], numpy: str = "numpy.core") -> Iterator[dict[str, Any]]:
    """What PyTorch Lightning would save beside the weights: callbacks by class, numpy scalars, configs, optimiser states."""
    names = (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "omegaconf.dictconfig.DictConfig",
        f"{numpy}.multiarray.scalar",
    )
    with pretended(*names) as (callback, config, scalar):
        settings = config()
        settings.__dict__.update(_content={"base_learning_rate": 1e-4}, _parent=None)
        yield {
            "epoch": 3,
            "global_step": 470_000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": OrderedDict(state),
            "callbacks": {
                callback: {
                    "monitor": "val/loss_simple_ema",
                    "best_model_score": _Scalar(scalar, 0.1416),
                    "best_model_path": pathlib.PurePosixPath("logs/last.ckpt"),
                    "current_score": torch.tensor(0.15),
                }
            },
            "optimizer_states": [
                {"state": {0: {"step": 7, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
            ],
            "lr_schedulers": [],
            "hparams": argparse.Namespace(scale_lr=True),
            "config": settings,
        }


def save_zip(contents: Any, path: Path, **options: Any) -> Path:
    """A `.ckpt` as torch writes it since 1.6."""
    torch.save(contents, path, **options)
    return path


def save_stream(contents: Any, path: Path, **options: Any) -> Path:
    """A `.ckpt` as torch wrote it before 1.6."""
    torch.save(contents, path, _use_new_zipfile_serialization=False, **options)
    return path


def save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """A `.safetensors` file."""
    safetensors.torch.save_file(dict(state), path, metadata=dict(metadata) if metadata else None)
    return path


def zip_of(files: Mapping[str, bytes], top: str = "archive/") -> bytes:
    """A zip with these stored files, to build what torch would not write."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(top + name), data)
    return buffer.getvalue()


def safetensors_of(header: Any, data: bytes = b"", *, raw: bytes | None = None) -> bytes:
    """A safetensors file with this header, true or not."""
    text = raw if raw is not None else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# -- pickles that torch would not write --------------------------------------------------------------------------------------


class Name:
    """A global name in a pickle."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """A name called with arguments."""

    def __init__(self, name: Name, *arguments: Any):
        self.name, self.arguments = name, arguments


class Persistent:
    """A persistent id."""

    def __init__(self, *identity: Any):
        self.identity = identity


def pickled(value: Any) -> bytes:
    """A pickle of protocol 2, without memo, of plain values and the three classes above."""
    return b"\x80\x02" + _encoded(value) + b"."


def _encoded(value: Any) -> bytes:
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return _encoded(value.name) + _encoded(value.arguments) + b"R"
    if isinstance(value, Persistent):
        return _encoded(value.identity) + b"Q"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return b"\x8b" + struct.pack("<i", size) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_encoded, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_encoded, value)) + b"e"
    return b"}(" + b"".join(_encoded(key) + _encoded(item) for key, item in value.items()) + b"u"


FLOAT = Name("torch", "FloatStorage")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
HOOKS = Call(Name("collections", "OrderedDict"))


def storage(key: str = "0", numel: Any = 6, kind: Any = FLOAT) -> Persistent:
    """A reference to a storage."""
    return Persistent("storage", kind, key, "cpu", numel)


def tensor(
    where: Any = None, offset: Any = 0, shape: Any = (2, 3), stride: Any = (3, 1), hooks: Any = HOOKS, *rest: Any
) -> Call:
    """A description of a tensor."""
    return Call(REBUILD, where if where is not None else storage(), offset, shape, stride, False, hooks, *rest)


def ckpt_of(data: bytes | Any, records: Mapping[str, bytes] | None = None, **more: bytes) -> bytes:
    """A zip checkpoint with this pickle (or a pickle of this value) and these storages; six float32 zeros are the default."""
    data = data if isinstance(data, bytes) else pickled(data)
    records = {"data/0": bytes(24)} if records is None else records
    return zip_of({"data.pkl": data, "version": b"3\n", **records, **more})


# -- every published file, narrow ---------------------------------------------------------------------------------------------

FILES: dict[str, str | None] = {  # manifest -> the family that its shapes show (not eps or v); None: recognised, and refused
    "sd1": "sd1", "sd1-full": "sd1", "sd1-pruned-fp16": "sd1", "sd1-pruned-fp16-posids16": "sd1", "sd1-inpainting": "sd1-inpainting",
    "sd-image-variations": "sd-image-variations", "sd-image-variations-notext": "sd-image-variations",
    "sd2-base": "sd2-base", "sd2-v": "sd2-base", "sd2-sgm": "sd2-base", "sd2-inpainting": "sd2-inpainting", "sd2-depth": "sd2-depth", "x4-upscaler": "x4-upscaler",
    "sdxl-base": "sdxl-base", "sdxl-base-0.9": "sdxl-base", "sdxl-base-posids16": "sdxl-base", "sdxl-inpainting": "sdxl-inpainting",
    "sdxl-refiner": "sdxl-refiner", "sdxl-refiner-0.9": "sdxl-refiner", "ssd-1b": "ssd-1b", "ssd-1b-hfscript": "ssd-1b",
    "sd21-unclip-h": None, "vae-standalone": None,
}  # fmt: skip
VOCAB = 512  # tokens of the narrow towers
UNIT = {
    "x4-upscaler": 8,
    "sdxl-refiner": 12,
}  # what the widths of a UNet are divided by to begin at 32; 10 for the others


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
    depth = full.depth and replace(full.depth, stem=32, width=48, mlp=192, features=16)
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


def narrowed(name: str) -> dict[str, Tensor]:
    """Seeded tensors with the names, kinds and dtypes of a published file, as narrow as `tiny`. A dictionary of the caller's, of tensors that are shared."""
    return dict(_narrowed(name))


@lru_cache(maxsize=8)  # the tests of one family follow each other
def _narrowed(name: str) -> dict[str, Tensor]:
    unit = UNIT.get(FILES[name] or "", 10)
    return seeded({key: (narrow(key, shape, unit), dtype) for key, (shape, dtype) in manifest(name).items()})


# -- what a file means, written independently of `weights` ---------------------------------------------------------------------------


def meaning(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a single file under the names of `LatentDiffusion`, which are Hugging Face's for CLIP; what no network reads is left out."""
    out: dict[str, Tensor] = {}
    for theirs, ours in {
        "model.diffusion_model.": "unet.",
        "first_stage_model.": "vae.",
        "depth_model.model.": "depth.",
    }.items():
        out |= {ours + key.removeprefix(theirs): value for key, value in state.items() if key.startswith(theirs)}
    out = {
        key: value for key, value in out.items() if not key.startswith(("depth.pretrained.model.head.", "vae.loss."))
    }
    visual = inside(state, "cond_stage_model.model.visual.")
    if visual:
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
            rows = len(value) // 3
            out |= {
                f"{layer}self_attn.{part}_proj.{rest[13:]}": value[i * rows : (i + 1) * rows]
                for i, part in enumerate("qkv")
            }
        elif match:
            for theirs, ours in (("ln_", "layer_norm"), ("attn.", "self_attn."), ("c_fc", "fc1"), ("c_proj", "fc2")):
                rest = rest.replace(theirs, ours)
            out[layer + rest] = value
        elif key in table:
            out[f"{model}.{table[key]}"] = value
    return out


def from_openclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower of OpenCLIP under Hugging Face's names, without `logit_scale`."""
    table = {"positional_embedding": "embeddings.position_embedding.weight", "token_embedding.weight": "embeddings.token_embedding.weight",
             "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias"}  # fmt: skip
    out = _from_blocks(state, table, "text_model")
    for key, value in state.items():
        if key.startswith("text_projection"):
            out["text_projection.weight"] = value.T if key == "text_projection" else value
    return out


def from_openai_vision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower of OpenAI's CLIP under Hugging Face's names."""
    table = {"positional_embedding": "embeddings.position_embedding.weight", "class_embedding": "embeddings.class_embedding",
             "conv1.weight": "embeddings.patch_embedding.weight", "ln_pre.weight": "pre_layrnorm.weight", "ln_pre.bias": "pre_layrnorm.bias",
             "ln_post.weight": "post_layernorm.weight", "ln_post.bias": "post_layernorm.bias"}  # fmt: skip
    return _from_blocks(state, table, "vision_model") | {"visual_projection.weight": state["proj"].T}
