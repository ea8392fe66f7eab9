"""The same seeded weights on both sides: our model, its tensors in diffusers' networks, and a folder that both read."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.models.published import original_name
from benchmarks.models.seeded import weight
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.model import LatentDiffusion
from ldm.targets import replacing_directory
from weights.files.write import Pending, write
from weights.folder.write import STEMS, folder_files, towers
from weights.names.blank import built, shapes
from weights.names.diffusers import diffusers_unet, diffusers_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel


def require(extra: str, *modules: str) -> None:
    """Exit with status 2, saying in one line what to install, unless all these modules are there."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        needed = f"{', '.join(missing)} not installed, which this comparison needs"
        print(f"{needed}: pip install '.[{extra}]'", file=sys.stderr)
        raise SystemExit(2)


def seeded_model(config: ModelConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LatentDiffusion:
    """A model of the SD 1 layout with the seeded weight of every published key; no weight is held twice."""
    model = built(lambda: LatentDiffusion(config))
    state = {name: weight(original_name(name), p.shape).to(device, dtype) for name, p in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def write_folder(config: ModelConfig, path: Path, dtype: torch.dtype) -> None:
    """A diffusers folder of seeded weights, of which one is in memory at a time, for us and for diffusers' pipelines.

    config  with its text towers as folders have them (`weights.folder.write.as_in_folders`)
    """
    folders = {"unet.": "unet", "vae.": "vae", **{f"text.{i}.": name for i, name in enumerate(towers(config))}}
    unet, vae = diffusers_unet(config.unet), diffusers_vae(config.vae)
    parts: dict[str, dict[str, Pending]] = {}
    for name, shape in shapes(LatentDiffusion, config).items():
        prefix = next(prefix for prefix in folders if name.startswith(prefix))
        part, rest = folders[prefix], name.removeprefix(prefix)
        key = unet[rest] if part == "unet" else vae[rest] if part == "vae" else rest
        linear = part == "vae" and ".attentions." in key  # a 1x1 convolution here, a linear layer there
        parts.setdefault(part, {})[key] = seeded(name, dtype, shape[:2] if linear else shape)
    with replacing_directory(path, overwrite=False) as folder:
        for file, text in folder_files(config).items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
        for part, tensors in parts.items():
            write(tensors, folder / part / f"{STEMS.get(part, 'model')}.safetensors", {"format": "pt"})


def seeded(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Pending:
    """A tensor to be written: the seeded values of this name, or zeros if it holds integers."""
    if not dtype.is_floating_point:
        return Pending(dtype, shape, lambda: torch.zeros(shape, dtype=dtype))
    return Pending(dtype, shape, lambda: weight(name, shape))


@dataclass(frozen=True)
class Peer:
    """The counterparts of one model's networks."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel


def peer(model: LatentDiffusion) -> Peer:
    """The peers' networks for this model. They share every tensor with it, so that the weights are surely the same."""
    with torch.device("meta"):
        unet, vae, text = _unet(model.config.unet), _vae(model.config.vae), _text(model.config.text[0])
    theirs = diffusers_unet(model.config.unet)
    _adopt(unet, {theirs[name]: tensor for name, tensor in model.unet.state_dict().items()})
    theirs = diffusers_vae(model.config.vae)
    state = {theirs[name]: tensor for name, tensor in model.vae.state_dict().items()}
    matrices = {name for name, p in vae.named_parameters() if p.ndim == 2}  # 1x1 convolutions here, linear layers there
    _adopt(vae, {name: tensor.flatten(1) if name in matrices else tensor for name, tensor in state.items()})
    state = model.text[0].state_dict()
    if not any(name.startswith("text_model.") for name, _ in text.named_parameters()):  # as transformers 5 has it
        state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    _adopt(text, state)
    return Peer(unet, vae, text)


def _adopt(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Make these tensors the parameters of a network that was built on the meta device."""
    network.load_state_dict(state, strict=True, assign=True)
    device = next(iter(state.values())).device
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            assert name == "position_ids", name  # the only buffer in these classes, in no file
            setattr(module, name, torch.arange(buffer.shape[-1], device=device)[None])
    network.eval().requires_grad_(False)


def _unet(config: UNetConfig) -> UNet2DConditionModel:
    """Their UNet of SD 1's kind: one transformer block or none after each ResBlock, a fixed number of heads."""
    from diffusers import UNet2DConditionModel

    down = tuple("CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in config.down_depth)
    up = tuple("CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in config.up_depth)
    widths = tuple(config.model_channels * m for m in config.channel_mult)
    return UNet2DConditionModel(
        in_channels=config.in_channels, out_channels=config.out_channels, block_out_channels=widths,
        layers_per_block=config.num_res_blocks, down_block_types=down, up_block_types=up,
        cross_attention_dim=config.context_dim,
        attention_head_dim=config.heads,  # a number of heads all the same, whatever its name says
    )  # fmt: skip


def _vae(config: VAEConfig) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    widths, levels = tuple(config.channels * m for m in config.channel_mult), len(config.channel_mult)
    return AutoencoderKL(
        block_out_channels=widths, layers_per_block=config.num_res_blocks, latent_channels=config.z_channels,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        scaling_factor=config.scale,
    )  # fmt: skip


def _text(config: TextConfig) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    same = {"vocab_size": config.vocab, "max_position_embeddings": config.length, "hidden_size": config.width}
    same |= {"num_hidden_layers": config.layers, "num_attention_heads": config.heads, "intermediate_size": config.mlp}
    ids = {"bos_token_id": 49406, "eos_token_id": 49407}
    return CLIPTextModel(CLIPTextConfig(**same, **ids, hidden_act=config.activation, attn_implementation="sdpa"))
