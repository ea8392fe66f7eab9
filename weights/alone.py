"""One network that was published alone: a VAE, a safety checker, a vision tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ldm.config import VAEConfig, VisionConfig
from ldm.networks.safety import SafetyChecker
from ldm.networks.vae import VAE
from ldm.networks.vision import CLIPVision
from weights.checkpoint import Parameters, require_dtype
from weights.files.folders import COMPONENTS, Folder, add_component
from weights.files.opened import Tensors, open_file
from weights.folder.read import component, read_vae_config, read_vision_config
from weights.models import fill
from weights.names import blank
from weights.names import places as names
from weights.names.detect import lookup
from weights.names.diffusers import in_diffusers_vae
from weights.names.instead import instead
from weights.names.layout import ALONE, Layout, Part
from weights.names.metadata import CONFIG_KEY, from_json
from weights.names.sizes import UNET, Shapes, read_vision, visible

VISUAL = "cond_stage_model.model.visual."  # where the published image-variations checkpoints have their vision tower
SAFETY = Layout((Part("", "", names.hugging_face_vision),), ALONE)
IN_MODEL = Layout(
    (Part("", VISUAL, names.openai_vision),),
    ((r"(?!cond_stage_model\.model\.visual\.).+", "not of the vision tower, which alone was asked for"),),
)
IN_CLIP = Layout(
    (Part("", "", names.hugging_face_vision),),
    (*ALONE, (r"text_model\..+|text_projection\.weight|logit_scale", "text half of CLIP, or its temperature")),
)
Network = TypeVar("Network", bound=nn.Module)


def vae_alone(file: Tensors, config: VAEConfig) -> Parameters:
    """The VAE that was published alone, by its original names or those of diffusers. Raises FileError for no VAE."""
    network = partial(blank.shapes, VAE, config)
    for prefix in () if f"{UNET}input_blocks.0.0.weight" in file else ("", "first_stage_model."):
        if f"{prefix}encoder.down.0.block.0.conv1.weight" in file:
            return Parameters(file=file, layout=Layout((Part("", prefix, names.vae),), ALONE), network=network)
        if f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in file:
            layout = Layout((Part("", prefix, in_diffusers_vae(config)),), ALONE)
            return Parameters(file=file, layout=layout, network=network)
    raise file.error(instead({key: file.shape(key) for key in file}, "vae"))


def load_vae(
    path: str | PathLike[str],
    config: VAEConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VAE:
    """A VAE that was published alone, ready for inference.

    path    .safetensors or .ckpt with bare names, under `first_stage_model.` or with diffusers' names; or the folder of
            a VAE of diffusers
    config  that of the model it is for. Files do not tell the scale of their latents; a folder does, and must agree
    Raises FileError for other sizes than the config's, or for what is no VAE.
    """
    require_dtype(dtype)
    with _open(path, "vae") as file:
        layout = vae_alone(file, config).layout
        if isinstance(file, Folder) and (file.path / "config.json").exists():
            stored = read_vae_config(component(file.path, "", "AutoencoderKL"), config)
            if stored != config:
                odd = f"other sizes ({stored.channels}, {stored.channel_mult})"
                if replace(stored, scale=config.scale) == config:
                    odd = f"another scale ({stored.scale})"
                raise file.error(f"is a VAE of {odd}, not for this model; use its own")
        return _filled(lambda: VAE(config), file, layout, device, dtype)


def load_safety(
    path: str | PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SafetyChecker:
    """The safety checker, ready for inference.

    path  .safetensors or .bin, or its diffusers folder. A file alone must have the published sizes: shapes do not show
          heads
    Raises FileError for other sizes, or for what is no safety checker.
    """
    require_dtype(dtype)
    with _open(path, "safety_checker") as file:
        shapes = {key: file.shape(key) for key in file}
        if "special_care_embeds" not in shapes:
            raise file.error(instead(shapes, "safety checker"))
        there = read_vision(lambda name: lookup(SAFETY, shapes, "")(_inside(name)))
        config = VisionConfig()
        if isinstance(file, Folder):
            config = read_vision_config(component(file.path, "", ("StableDiffusionSafetyChecker", "SafetyChecker")))
        if there != visible(config):
            what = "is a safety checker of other sizes than the published one's, or than its config.json says"
            raise file.error(f"{what}; shapes do not show heads")
        return _filled(lambda: SafetyChecker(config), file, SAFETY, device, dtype)


def _inside(name: str) -> str:
    return f"vision_model.{name}" if name.startswith("vision_model.") else name


def load_vision(
    path: str | PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CLIPVision:
    """A CLIP vision tower with its projection, ready for inference: what `ldm.changes.surgery.swap_conditioner` takes.

    path  an image-variations model, as one file or a diffusers folder; or a CLIP of Hugging Face, or its vision half,
          as a folder or a file. A file alone must have the sizes of ViT-L/14, or be one of ours, which says its sizes:
          shapes do not show heads
    Raises FileError for other sizes, or for what holds no such tower.
    """
    require_dtype(dtype)
    with _open(path, "image_encoder") as file:
        shapes = {key: file.shape(key) for key in file}
        layout = _layout(shapes, file)
        there, config = read_vision(lookup(layout, shapes, "")), _config(file)
        if there is None:
            what = "holds no whole vision tower: tensors are missing, such as visual_projection.weight"
            raise file.error(f"{what}; use a CLIP with its projection")
        if there != visible(config):
            what = "holds a vision tower of other sizes than ViT-L/14's, or than its config says"
            raise file.error(f"{what}; give its folder, with the config.json that tells its heads")
        return _filled(lambda: CLIPVision(config), file, layout, device, dtype)


def _layout(shapes: Shapes, file: Tensors) -> Layout:
    if VISUAL + "proj" in shapes:
        return IN_MODEL
    if any(
        name in shapes
        for name in ("vision_model.embeddings.patch_embedding.weight", "embeddings.patch_embedding.weight")
    ):
        return IN_CLIP
    what = f"holds no CLIP vision tower, it begins with {next(iter(shapes))[:40]}"
    raise file.error(f"{what}; use an image-variations model, or a CLIP of Hugging Face")


def _config(file: Tensors) -> VisionConfig:
    """Of a folder what its config.json says, of a file of ours what its metadata say, and otherwise ViT-L/14."""
    if isinstance(file, Folder):
        return read_vision_config(component(file.path, "", "CLIP"))
    described = file.metadata.get(CONFIG_KEY)
    return (described and from_json(described).vision) or VisionConfig()


def _open(path: str | PathLike[str], name: str) -> Tensors:
    """The file; or the folder of one component, or that component of a model's folder."""
    path = Path(path)
    if not path.is_dir():
        return open_file(path)
    inside = path / name if (path / name).is_dir() else path
    folder = Folder(inside)
    try:
        add_component(folder, inside, COMPONENTS.get(name, ("model", "pytorch_model")), "")
    except BaseException:
        folder.close()
        raise
    return folder


def _filled(
    make: Callable[[], Network], file: Tensors, layout: Layout, device: torch.device | str, dtype: torch.dtype
) -> Network:
    """The network that `make` builds, with the tensors of a file."""
    network = blank.built(make)
    fill(network, file, layout, torch.device(device), dtype)
    return network
