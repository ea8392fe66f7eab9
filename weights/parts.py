"""Networks that come alone: a VAE, the safety checker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch

from ldm.config import VAEConfig, VisionConfig
from ldm.safety import SafetyChecker
from ldm.vae import VAE
from weights import names
from weights.blank import built
from weights.detect import not_a_model
from weights.fields import component
from weights.files import Weights, open_file
from weights.folder_config import read_vae_config, read_vision_config
from weights.folders import Folder, add_component
from weights.layout import ALONE, Layout, Part
from weights.load import fill, require_dtype
from weights.places import Shape
from weights.sizes import UNET, read_vision, visible


def load_vae(path: str | PathLike[str], config: VAEConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
    """A VAE that was published alone, ready for inference.

    path    .safetensors or .ckpt with bare names, under `first_stage_model.` or with diffusers' names; or a diffusers folder of one VAE
    config  that of the model it is for. Files do not tell the scale of their latents; a folder does, and must agree
    Raises FileError for other sizes than the config's, or for what is no VAE.
    """
    require_dtype(dtype)
    with _open(path, "vae") as file:
        shapes = {key: file.shape(key) for key in file}
        layout = vae_layout(shapes, config, file)
        if isinstance(file, Folder) and (file.path / "config.json").exists():
            told = read_vae_config(component(file.path, "", "AutoencoderKL"), config)
            if told != config:
                odd = f"another scale ({told.scale})" if replace(told, scale=config.scale) == config else f"other sizes ({told.channels}, {told.channel_mult})"
                raise file.error(f"is a VAE of {odd}, not for this model; use its own")
        vae = built(lambda: VAE(config))
        fill(vae, file, layout, torch.device(device), dtype)
    return vae


def load_safety(path: str | PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> SafetyChecker:
    """The safety checker, ready for inference.

    path  .safetensors or .bin, or its diffusers folder. A file alone must have the published sizes, since shapes do not show heads
    Raises FileError for other sizes, or for what is no safety checker.
    """
    require_dtype(dtype)
    with _open(path, "safety_checker") as file:
        shapes = {key: file.shape(key) for key in file}
        if "special_care_embeds" not in shapes:
            raise file.error(_other(shapes, "a safety checker"))
        layout = Layout((Part("", "", names.doubled_vision),), ALONE)
        there = read_vision(lambda name: next((shapes[p.key] for p in names.doubled_vision(_inside(name)) if p.key in shapes), None))
        config = VisionConfig()
        if isinstance(file, Folder):
            config = read_vision_config(component(file.path, "", ("StableDiffusionSafetyChecker", "SafetyChecker")))
        if there != visible(config):
            raise file.error("is a safety checker of other sizes than the published one's, or than its config.json says; shapes do not show heads")
        checker = built(lambda: SafetyChecker(config))
        fill(checker, file, layout, torch.device(device), dtype)
    return checker


def _inside(name: str) -> str:
    return f"vision_model.{name}" if name.startswith("vision_model.") else name


def _open(path: str | PathLike[str], name: str) -> Weights | Folder:
    """The file; or the folder of one component, or that component of a model's folder."""
    path = Path(path)
    if not path.is_dir():
        return open_file(path)
    inside = path / name if (path / name).is_dir() else path
    folder = Folder(inside)
    try:
        add_component(folder, inside, ("diffusion_pytorch_model",) * 2 if name == "vae" else ("model", "pytorch_model"), "")
    except BaseException:
        folder.close()
        raise
    return folder


def vae_layout(shapes: Mapping[str, Shape], config: VAEConfig, file: Weights | Folder) -> Layout:
    """Whose names the VAE has."""
    for prefix in () if f"{UNET}input_blocks.0.0.weight" in shapes else ("", "first_stage_model."):
        if f"{prefix}encoder.down.0.block.0.conv1.weight" in shapes:
            return Layout((Part("", prefix, names.vae),), ALONE)
        if f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in shapes:
            return Layout((Part("", prefix, names.in_diffusers_vae(config)),), ALONE)
    raise file.error(_other(shapes, "a VAE"))


def _other(shapes: Mapping[str, Shape], wanted: str) -> str:
    """What a file is instead of the network that is wanted."""
    if f"{UNET}input_blocks.0.0.weight" in shapes:
        return f"is a whole model, not {wanted}; give it as the model"
    what = not_a_model(shapes).split(", not a model")[0].split(";")[0]
    return f"begins with {next(iter(shapes))[:40]}: that is not {wanted}" if what.startswith("has no UNet") else f"{what}, not {wanted}"
