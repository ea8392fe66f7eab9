"""The names of diffusers, and of transformers for the depth network, for our parameters; what sizes they show."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ldm.config import DepthConfig, UNetConfig, VAEConfig
from ldm.networks.dpt import DPT
from ldm.networks.unet import UNet
from ldm.networks.vae import VAE
from weights.names.blank import shapes
from weights.names.places import How, Place, Places
from weights.names.sizes import NO_NETWORK, Shapes, count, unet_of, vae_of

_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
           "out_layers.3": "conv2",
           "skip_connection": "conv_shortcut"}  # fmt: skip
# Of the VAE, in the first folders.
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def in_diffusers_unet(config: UNetConfig) -> Places:
    """Where diffusers puts the UNet's parameters."""
    modules = _unet_modules(config)
    return lambda name: (Place(_renamed(name, modules)),)


def in_diffusers_vae(config: VAEConfig) -> Places:
    """Where diffusers puts the VAE's parameters, under the names of the day and under its first ones."""
    modules = _vae_modules(config)

    def places(name: str) -> tuple[Place, ...]:
        theirs = _renamed(name, modules)
        match = re.fullmatch(r"(.+\.attentions\.0\.)(to_[qkv]|to_out\.0)(\.weight|\.bias)", theirs)
        if match is None:
            return (Place(theirs),)
        how: How = "kernel" if match[3] == ".weight" else "whole"
        return Place(theirs, how), Place(match[1] + _OLD_ATTENTION[match[2]] + match[3], how)

    return places


def in_transformers_dpt(config: DepthConfig) -> Places:
    """Where transformers puts the depth network's parameters: q, k and v of each attention in matrices of their own."""
    table = dpt_names(config)
    return lambda name: (Place(table[name][0], more=table[name][1:]),)


def diffusers_unet(config: UNetConfig) -> dict[str, str]:
    """{our parameter name: diffusers'} for every parameter of the UNet; shapes are the same."""
    modules = _unet_modules(config)
    return {key: _renamed(key, modules) for key in shapes(UNet, config)}


def _unet_modules(config: UNetConfig) -> dict[str, str]:
    """{our module: diffusers'} of every module of the UNet that has another name there."""
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
             "out.0": "conv_norm_out", "out.2": "conv_out",
             "input_blocks.0.0": "conv_in", "label_emb.0.0": "add_embedding.linear_1",
             "label_emb.0.2": "add_embedding.linear_2",
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
    return names


def diffusers_vae(config: VAEConfig) -> dict[str, str]:
    """{our parameter name: diffusers'} of the VAE. The 1x1 convolutions of its attention are matrices there."""
    modules = _vae_modules(config)
    return {key: _renamed(key, modules) for key in shapes(VAE, config)}


def _vae_modules(config: VAEConfig) -> dict[str, str]:
    names: dict[str, str] = {}
    for part, levels in (("encoder", "down"), ("decoder", "up")):
        names |= {f"{part}.norm_out": f"{part}.conv_norm_out", f"{part}.mid.block_1": f"{part}.mid_block.resnets.0",
                  f"{part}.mid.block_2": f"{part}.mid_block.resnets.1",
                  f"{part}.mid.attn_1.norm": f"{part}.mid_block.attentions.0.group_norm",
                  f"{part}.mid.attn_1.proj_out": f"{part}.mid_block.attentions.0.to_out.0"}  # fmt: skip
        names |= {f"{part}.mid.attn_1.{x}": f"{part}.mid_block.attentions.0.to_{x}" for x in "qkv"}
        for i in range(len(config.channel_mult)):
            theirs = f"{part}.{levels}_blocks.{i if part == 'encoder' else len(config.channel_mult) - 1 - i}"
            names[f"{part}.{levels}.{i}.{levels}sample"] = f"{theirs}.{levels}samplers.0"
            for j in range(config.num_res_blocks + (part == "decoder")):
                names[f"{part}.{levels}.{i}.block.{j}"] = f"{theirs}.resnets.{j}"
                names[f"{part}.{levels}.{i}.block.{j}.nin_shortcut"] = f"{theirs}.resnets.{j}.conv_shortcut"
    return names


def _renamed(key: str, modules: Mapping[str, str]) -> str:
    """A key with its longest prefix that is in `modules` replaced; with none it keeps its name."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:n])) in modules:
            return ".".join([modules[prefix], *parts[n:]])
    return key


_QKV = ("query", "key", "value")
_VIT = {"cls_token": "cls_token", "pos_embed": "position_embeddings", "patch_embed.proj": "projection",
        "patch_embed.backbone.stem.conv": "backbone.bit.embedder.convolution",
        "patch_embed.backbone.stem.norm": "backbone.bit.embedder.norm"}  # fmt: skip
_BLOCK = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.qkv": "attention.attention",
          "attn.proj": "attention.output.dense",
          "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
_BOTTLENECK = ("downsample.conv", "downsample.norm", *(f"{kind}{n}" for kind in ("conv", "norm") for n in (1, 2, 3)))
_FUSION = {
    "out_conv": "projection",
    **{f"resConfUnit{i}.conv{j}": f"residual_layer{i}.convolution{j}" for i in (1, 2) for j in (1, 2)},
}


def dpt_names(config: DepthConfig) -> dict[str, tuple[str, ...]]:
    """{our parameter name: transformers'} for every parameter of the depth network; shapes are the same.

    Three names where q, k and v are matrices of their own there: ours is their rows, stacked in this order.
    """
    names = {f"pretrained.model.{ours}": f"dpt.embeddings.{theirs}" for ours, theirs in _VIT.items()}
    names["pretrained.model.norm"] = "dpt.layernorm"
    for i, blocks in enumerate(config.blocks):
        for j in range(blocks):
            ours = f"pretrained.model.patch_embed.backbone.stages.{i}.blocks.{j}"
            theirs = f"dpt.embeddings.backbone.bit.encoder.stages.{i}.layers.{j}"
            names |= {f"{ours}.{inner}": f"{theirs}.{inner}" for inner in _BOTTLENECK}
    for i in range(config.layers):
        names |= {
            f"pretrained.model.blocks.{i}.{ours}": f"dpt.encoder.layer.{i}.{theirs}" for ours, theirs in _BLOCK.items()
        }
    for i in (3, 4):  # counted from 0 there, with nothing at the ResNet's two maps
        ours, theirs = f"pretrained.act_postprocess{i}", "neck.reassemble_stage"
        names[f"{ours}.0.project.0"] = f"{theirs}.readout_projects.{i - 1}.0"
        names |= {f"{ours}.{n}": f"{theirs}.layers.{i - 1}.{name}" for n, name in ((3, "projection"), (4, "resize"))}
    for i in (1, 2, 3, 4):  # their fusion counts from the coarsest
        names[f"scratch.layer{i}_rn"] = f"neck.convs.{i - 1}"
        names |= {
            f"scratch.refinenet{i}.{ours}": f"neck.fusion_stage.layers.{4 - i}.{theirs}"
            for ours, theirs in _FUSION.items()
        }
    names |= {f"scratch.output_conv.{i}": f"head.head.{i}" for i in (0, 2, 4)}

    def renamed(key: str) -> tuple[str, ...]:
        if key in names:
            return (names[key],)
        module, _, kind = key.rpartition(".")
        return (
            tuple(f"{names[module]}.{part}.{kind}" for part in _QKV)
            if module.endswith(".qkv")
            else (f"{names[module]}.{kind}",)
        )

    return {key: renamed(key) for key in shapes(DPT, config)}


def read_diffusers_unet(shapes: Shapes, prefix: str) -> UNetConfig | None:
    """The visible sizes of the UNet under `prefix` with diffusers' names; None when its tensors do not make one."""

    def depth(block: str, i: int) -> int:
        return count(shapes, f"{prefix}{block}.attentions.{i}.transformer_blocks.{{}}.norm1.weight")

    try:
        levels = range(count(shapes, f"{prefix}down_blocks.{{}}.resnets.0.conv1.weight"))
        blocks = range(count(shapes, f"{prefix}down_blocks.0.resnets.{{}}.conv1.weight"))
        key = "attentions.0.transformer_blocks.0.attn1.to_k.weight"
        return unet_of(
            shapes, prefix, ends=("conv_in.weight", "conv_out.weight"),
            given=("add_embedding.linear_1.weight", "class_embedding.weight"),
            widths=[shapes[f"{prefix}down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels],
            keys=[shapes.get(f"{prefix}down_blocks.{level}.{key}") for level in levels],
            down=[[depth(f"down_blocks.{level}", i) for i in blocks] for level in levels],
            up=[[depth(f"up_blocks.{level}", i) for i in range(len(blocks) + 1)] for level in levels],
            mid=depth("mid_block", 0),
        )  # fmt: skip
    except NO_NETWORK:
        return None


def read_diffusers_vae(shapes: Shapes, prefix: str) -> VAEConfig | None:
    """The visible sizes of the VAE under `prefix` with diffusers' names; None when its tensors do not make one."""
    return vae_of(shapes, prefix, "encoder.down_blocks.{}.resnets.{}.conv1.weight")
