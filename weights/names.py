"""Other people's names for the parameters that `ldm` names: the original code and its fine-tunes, diffusers, OpenCLIP."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldm.config import UNetConfig, VAEConfig
from ldm.unet import UNet
from ldm.vae import VAE

_TOWER = re.compile(r"(cond_stage_model\.transformer\.)((?:embeddings|encoder|final_layer_norm)\.)")


def canonical(key: str) -> str:
    """The original spelling of a key.

    Files saved with old or very new versions of transformers lack `text_model.` in the names of the text tower.
    """
    return _TOWER.sub(r"\1text_model.\2", key, count=1) if key.startswith("cond_stage_model.") else key


def ema(key: str) -> str:
    """Where the original's LitEma keeps the moving average of `key`, which must begin with `model.`.

    It is stored under the name inside `self.model` without any dots, so this can be computed but not inverted.
    """
    return "model_ema." + key.removeprefix("model.").replace(".", "")


# --- diffusers and OpenCLIP -----------------------------------------------------------------------------------------

_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
           "skip_connection": "conv_shortcut"}  # fmt: skip


def diffusers_unet(config: UNetConfig) -> dict[str, str]:
    """{our parameter name: diffusers'} for every parameter of the UNet; shapes are the same."""
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "out.0": "conv_norm_out", "out.2": "conv_out",
             "input_blocks.0.0": "conv_in", "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
             "label_emb": "class_embedding"}  # fmt: skip

    def block(ours: str, theirs: str, i: int) -> None:
        names.update({f"{ours}.0.{inner}": f"{theirs}.resnets.{i}.{name}" for inner, name in _RESNET.items()})
        names[f"{ours}.1"] = f"{theirs}.attentions.{i}"

    n = 1
    for level, depths in enumerate(config.down_depth):
        for i in range(len(depths)):
            block(f"input_blocks.{n}", f"down_blocks.{level}", i)
            n += 1
        names[f"input_blocks.{n}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        n += level < len(config.down_depth) - 1
    block("middle_block", "mid_block", 0)
    names.update({f"middle_block.2.{inner}": f"mid_block.resnets.1.{name}" for inner, name in _RESNET.items()})
    n = 0
    for up, depths in enumerate(config.up_depth):
        for i, depth in enumerate(depths):
            block(f"output_blocks.{n}", f"up_blocks.{up}", i)
            names[f"output_blocks.{n}.{2 if depth else 1}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
            n += 1
    with torch.device("meta"):
        return _renamed(UNet(config).state_dict(), names)


def diffusers_vae(config: VAEConfig) -> dict[str, str]:
    """{our parameter name: diffusers'} for every parameter of the VAE. Its attention's 1x1 convolutions are matrices there."""
    names = {}
    for part, levels in (("encoder", "down"), ("decoder", "up")):
        names |= {f"{part}.norm_out": f"{part}.conv_norm_out", f"{part}.mid.block_1": f"{part}.mid_block.resnets.0",
                  f"{part}.mid.block_2": f"{part}.mid_block.resnets.1", f"{part}.mid.attn_1.norm": f"{part}.mid_block.attentions.0.group_norm",
                  f"{part}.mid.attn_1.proj_out": f"{part}.mid_block.attentions.0.to_out.0"}  # fmt: skip
        names |= {f"{part}.mid.attn_1.{x}": f"{part}.mid_block.attentions.0.to_{x}" for x in "qkv"}
        for i in range(len(config.channel_mult)):
            theirs = f"{part}.{levels}_blocks.{i if part == 'encoder' else len(config.channel_mult) - 1 - i}"
            names[f"{part}.{levels}.{i}.{levels}sample"] = f"{theirs}.{levels}samplers.0"
            for j in range(config.num_res_blocks + (part == "decoder")):
                names |= {f"{part}.{levels}.{i}.block.{j}": f"{theirs}.resnets.{j}", f"{part}.{levels}.{i}.block.{j}.nin_shortcut": f"{theirs}.resnets.{j}.conv_shortcut"}
    with torch.device("meta"):
        return _renamed(VAE(config).state_dict(), names)


def _renamed(keys: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Every key with its longest prefix that is in `names` replaced; a key with none keeps its name."""

    def rename(key: str) -> str:
        parts = key.split(".")
        for n in range(len(parts), 0, -1):
            if (prefix := ".".join(parts[:n])) in names:
                return ".".join([names[prefix], *parts[n:]])
        return key

    return {key: rename(key) for key in keys}


def from_openclip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text tower of OpenCLIP under the names of `CLIPText`: q, k and v are thirds of one matrix there, and the projection is transposed.

    `logit_scale`, which no conditioning reads, is left out.
    """
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names = {"positional_embedding": "text_model.embeddings.position_embedding.weight", "ln_final": "text_model.final_layer_norm",
             "token_embedding": "text_model.embeddings.token_embedding"}  # fmt: skip
    layers = {key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")}
    names |= {f"transformer.resblocks.{i}.{a}": f"text_model.encoder.layers.{i}.{b}" for i in layers for a, b in inner.items()}
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if ".attn.in_proj_" in key:
            layer, kind = key.split(".")[2], key.rsplit("_", 1)[1]
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                out[f"text_model.encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] = third
        elif key == "text_projection":
            out["text_projection.weight"] = tensor.T
        elif key != "logit_scale":
            out[_renamed([key], names)[key]] = tensor
    return out
