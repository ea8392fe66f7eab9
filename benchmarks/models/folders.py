"""diffusers folders of every family, narrow or at full size, written to disk with the published names."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.models.published import (
    MANIFESTS,
    NARROW_DEPTH,
    UNIT,
    VOCAB,
    inside,
    manifest,
    meaning,
    narrow,
    narrowed,
    tiny,
)
from ldm.config import FAMILIES, DepthConfig, ModelConfig
from weights.names.diffusers import diffusers_unet, diffusers_vae, dpt_names

OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
STATISTIC = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2 = {"vae": "sd2-base/vae", "text_encoder": "sd2-base/text_encoder"}
_SDXL = {name: f"sdxl-base/{name}" for name in ("vae", "text_encoder", "text_encoder_2")}
# family -> its components: the manifest of each
FOLDERS: dict[str, dict[str, str]] = {
    "sd1": {name: f"sd1/{name}" for name in ("unet", "vae", "text_encoder")},
    "sd1-inpainting": {
        "unet": "sd1-inpainting/unet",
        "vae": "sd1/vae-legacy-names",
        "text_encoder": "sd1/text_encoder",
    },
    "sd-image-variations": {name: f"sd-image-variations/{name}" for name in ("unet", "vae", "image_encoder")},
    **{name: {"unet": f"{name}/unet", **_SD2} for name in ("sd2-base", "sd2-v", "sd2-inpainting")},
    "sd2-depth": {"unet": "sd2-depth/unet", **_SD2, "depth_estimator": ""},
    "x4-upscaler": {name: f"x4-upscaler/{name}" for name in ("unet", "vae", "text_encoder")},
    **{name: {"unet": f"{name}/unet", **_SDXL} for name in ("sdxl-base", "sdxl-inpainting")},
    "sdxl-refiner": {
        "unet": "sdxl-refiner/unet",
        "vae": "sdxl-base/vae",
        "text_encoder_2": "sdxl-refiner/text_encoder_2",
    },
    "ssd-1b": {name: f"ssd-1b/{name}" for name in ("unet", "vae", "text_encoder", "text_encoder_2")},
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def single(family: str) -> dict[str, Tensor]:
    """The narrow single file of a family, in float32, whose statistic is that of what it predicts."""
    state = {key: value.float() if value.is_floating_point() else value for key, value in narrowed(family).items()}
    if STATISTIC in state:
        size = 0.2 if FAMILIES[family].prediction == "v" else 0.02
        state[STATISTIC] = size * torch.tensor([1.0, -1.0] * (len(state[STATISTIC]) // 2))
    return state


def components(family: str, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a narrow single file under diffusers' names, by folder."""
    ours = meaning(state)
    return {name: component(family, name, ours) for name in FOLDERS[family]}


def component(family: str, name: str, ours: Mapping[str, Tensor], *, wide: bool = False) -> dict[str, Tensor]:
    """One component under diffusers' names, from a model's tensors; `wide`: at its published size."""
    config = FAMILIES[family] if wide else tiny(family)
    tensors = _named(family, name, config, ours)
    if FOLDERS[family][name]:
        listed = listed_shapes(family, name, wide=wide)
        tensors |= {key: torch.arange(shape[-1])[None] for key, shape in listed.items() if key.endswith("position_ids")}
        assert {key: tuple(value.shape) for key, value in tensors.items()} == listed, name  # those of the manifest
    return {key: value.contiguous().clone() for key, value in tensors.items()}


def _named(family: str, name: str, config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if name == "unet":
        return {theirs: ours[f"unet.{name}"] for name, theirs in diffusers_unet(config.unet).items()}
    if name == "vae":
        return _vae(FOLDERS[family]["vae"].endswith("legacy-names"), config, ours)
    if name == "image_encoder":
        return inside(ours, "vision.")
    if config.depth is not None and name == "depth_estimator":
        chunks = [(names, ours[f"depth.{mine}"].chunk(len(names))) for mine, names in dpt_names(config.depth).items()]
        return {key: part for names, parts in chunks for key, part in zip(names, parts, strict=True)}
    tower = inside(ours, f"text.{len(config.text) - 1 if name == 'text_encoder_2' else 0}.")
    if config.unet.vector_dim is None and config.unet.linear_proj:  # SD 2 and the upscaler leave the last layer out
        return {key: value for key, value in tower.items() if ".layers.23." not in key and "projection" not in key}
    return tower


def _vae(legacy: bool, config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, theirs in diffusers_vae(config.vae).items():
        value = ours[f"vae.{name}"]
        for new, first in OLD_VAE.items() if legacy else ():
            theirs = theirs.replace(f".attentions.0.{new}.", f".attentions.0.{first}.")
        found[theirs] = value[:, :, 0, 0] if ".attentions.0." in theirs and value.ndim == 4 else value
    return found


def listed_shapes(family: str, name: str, *, wide: bool = False) -> dict[str, tuple[int, ...]]:
    """The published names of a component, and its shapes, as narrow as `tiny` unless `wide`."""
    unit = UNIT.get(family, 10)
    found = manifest(f"diffusers/{FOLDERS[family][name]}")
    return {key: shape if wide else narrow(f"{name}/{key}", shape, unit) for key, (shape, _) in found.items()}


# Fields of config.json.
NARROWED = [
    "cross_attention_dim",
    "projection_class_embeddings_input_dim",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
]


def config_json(family: str, name: str, *, wide: bool = False) -> dict[str, Any]:
    """The published config.json of a component, as narrow as `tiny` unless `wide`."""
    if name == "depth_estimator":
        return _depth_json(NARROW_DEPTH)
    file = MANIFESTS / f"diffusers/{FOLDERS[family][name]}.json.gz"
    config = json.loads(gzip.decompress(file.read_bytes()))["config"]
    config |= {"_class_name": {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[name]} if name in STEMS else {}
    if wide:
        return config
    unit = {"unet": UNIT.get(family, 10), "vae": 4}.get(name, 16)
    if "block_out_channels" in config:
        config["block_out_channels"] = [width // unit for width in config["block_out_channels"]]
    for field in NARROWED:
        if field in config and (name != "text_encoder" or field != "projection_dim"):
            config[field] //= 16
    if "vocab_size" in config:
        config["vocab_size"] = VOCAB
    if name == "unet" and isinstance(config["attention_head_dim"], list):
        config["attention_head_dim"] = [width // 16 for width in config["block_out_channels"]]
    return config


def _depth_json(depth: DepthConfig) -> dict[str, Any]:
    return {
        "architectures": ["DPTForDepthEstimation"], "is_hybrid": True, "readout_type": "project",
        "hidden_size": depth.width, "intermediate_size": depth.mlp, "num_hidden_layers": depth.layers,
        "num_attention_heads": depth.heads, "image_size": depth.image, "fusion_hidden_size": depth.features,
        "backbone_out_indices": [0, 1, *depth.hooks],
        "backbone_config": {"depths": [*depth.blocks], "embedding_size": depth.stem, "layer_type": "bottleneck"},
    }  # fmt: skip


def write_folder(
    path: Path, family: str, parts: Mapping[str, Mapping[str, Tensor]], *, variant: str = "", kind: str = "safetensors"
) -> Path:
    """A narrow folder as diffusers writes it."""
    path.mkdir()
    for name, tensors in parts.items():
        write_component(path / name, tensors, config_json(family, name), variant=variant, kind=kind)
    write_index(path, family, parts)
    return path


def write_component(
    path: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    variant: str = "",
    kind: str = "safetensors",
) -> None:
    """One folder of weights with its config.json."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    stem = STEMS.get(path.name, "model" if kind == "safetensors" else "pytorch_model")
    (save_file if kind == "safetensors" else torch.save)(dict(tensors), path / f"{stem}{variant}.{kind}")


def write_index(path: Path, family: str, parts: Iterable[str]) -> None:
    """model_index.json and the scheduler."""
    named = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "PNDMScheduler"]}
    index = {**named, "safety_checker": [None, None], "text_encoder": [None, None]}
    (path / "model_index.json").write_text(json.dumps(index | {name: ["diffusers", "SomeClass"] for name in parts}))
    full = FAMILIES[family]
    scheduler = {
        "_class_name": "PNDMScheduler", "beta_start": full.schedule.start, "beta_end": full.schedule.end,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[full.prediction],
    }  # fmt: skip
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


def folder_config(family: str, *, wide: bool = False) -> ModelConfig:
    """What the folder of a family should be recognised as."""
    config = FAMILIES[family] if wide else replace(tiny(family), size=FAMILIES[family].size)
    if family.startswith(("sd2", "x4")):
        text = tuple(replace(tower, layers=23, skip=0, projection=None) for tower in config.text)
        return replace(config, text=text)
    return config
