"""A VAE that comes alone, in a conversion: between its original names and the folder that diffusers keeps it in."""

from __future__ import annotations

import json

import torch

from ldm.config import FAMILIES, ModelConfig, VAEConfig
from ldm.errors import ArgumentError
from ldm.networks.vae import VAE
from weights.files.folders import Folder
from weights.files.opened import Weights
from weights.folder.read import component, read_vae_config
from weights.folder.write import STEMS, vae_alone_json
from weights.models import vae_layout
from weights.names import diffusers as diffusers_names
from weights.names.blank import shapes
from weights.names.layout import ALONE, LEFTOVERS, Layout, Part
from weights.plan import plan
from weights.tools.moves import copied, renamed
from weights.tools.routes import KEPT, Route


def is_vae(file: Weights) -> bool:
    """Does the file have an encoder and a decoder, under any known names?"""
    return any(
        all(f"{prefix}{half}.conv_in.weight" in file for half in ("encoder", "decoder"))
        for prefix in ("", "first_stage_model.")
    )


def vae_to_folder(file: Weights, config: ModelConfig | str | None, dtype: torch.dtype | None) -> Route:
    """The folder of one VAE. `config` names the family whose scale its latents have, which no file tells. Raises ArgumentError without it."""
    if config is None:
        raise ArgumentError(
            "config: a VAE's file does not tell the scale of its latents; name the family it is for: config='sd1', 'sdxl-base', ...",
            key="config",
        )
    family = FAMILIES[config] if isinstance(config, str) else config
    source = vae_layout({key: file.shape(key) for key in file}, family.vae, file)
    target = Layout((Part("", "", diffusers_names.in_diffusers_vae(family.vae)),), ())
    text = json.dumps(vae_alone_json(family.vae, family.size), indent=2) + "\n"
    made = _renamed(file, family.vae, source, target, dtype)
    left = {key: copied(file, key, done=KEPT) for key in made.dropped}
    return Route(
        {f"{STEMS['vae']}.safetensors": made.files[""], **({LEFTOVERS: left} if left else {})},
        {},
        {"config.json": text},
    )


def vae_to_file(folder: Folder, dtype: torch.dtype | None) -> Route:
    """The original names, bare as VAEs are published alone, with what the folder keeps of the file put back."""
    config = read_vae_config(component(folder.path, "", "AutoencoderKL"), VAEConfig())
    source = Layout((Part("", "", diffusers_names.in_diffusers_vae(config)),), ALONE)
    made = _renamed(folder, config, source, Layout((Part("", ""),), ()), dtype)
    back = {
        key: copied(folder, key, done=f"put back from {LEFTOVERS}")
        for key in made.dropped
        if key.startswith(f"{LEFTOVERS}/")
    }
    moves = {**made.files[""], **{key.partition("/")[2]: move for key, move in back.items()}}
    return Route({"": moves}, {key: why for key, why in made.dropped.items() if key not in back})


def _renamed(
    file: Weights | Folder, config: VAEConfig, source: Layout, target: Layout, dtype: torch.dtype | None
) -> Route:
    wanted = shapes(VAE, config)
    made = plan(source, wanted, {key: file.shape(key) for key in file}, file.error)
    return Route({"": renamed(file, made.sources, wanted, target, dtype)}, made.ignored)
