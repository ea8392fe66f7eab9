"""Other people's names for the parameters that `ldm` names: the original code and its fine-tunes, OpenCLIP, OpenAI's CLIP, diffusers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ldm.config import DepthConfig, UNetConfig, VAEConfig
from ldm.unet import UNet
from ldm.vae import VAE
from weights.blank import shapes
from weights.names_depth import dpt_names
from weights.places import How, Place

Places = Callable[[str], tuple[Place, ...]]  # our name inside a network -> where it may lie, under each known spelling


def ema(key: str) -> str:
    """Where the original's LitEma keeps the moving average of `key`, which must begin with `model.`.

    It is stored under the name inside `self.model` without any dots, so this can be computed but not inverted.
    """
    return "model_ema." + key.removeprefix("model.").replace(".", "")


# --- the original code ----------------------------------------------------------------------------------------------


def same(name: str) -> tuple[Place, ...]:
    """Networks whose published names are ours."""
    return (Place(name),)


def vae(name: str) -> tuple[Place, ...]:
    """The VAE. Some converters have stored its attention's 1x1 convolutions as matrices."""
    return (Place(name, "kernel" if re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) else "whole"),)


def hugging_face(name: str) -> tuple[Place, ...]:
    """A text tower of transformers, some old and very new versions of which leave `text_model.` out."""
    bare = name.removeprefix("text_model.")
    return (Place(name),) if bare == name else (Place(name), Place(bare))


def hugging_face_vision(name: str) -> tuple[Place, ...]:
    """A vision tower of transformers, with `vision_model.` or without."""
    bare = name.removeprefix("vision_model.")
    return (Place(name),) if bare == name else (Place(name), Place(bare))


def doubled_vision(name: str) -> tuple[Place, ...]:
    """The safety checker. Its vision tower's prefix is doubled in the published file; newer versions of transformers write it once."""
    bare = name.removeprefix("vision_model.")
    return (Place(name),) if bare == name else (Place(name), Place(bare))


_BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_TEXT = {"text_model.embeddings.token_embedding.weight": "token_embedding.weight", "text_model.embeddings.position_embedding.weight": "positional_embedding",
         "text_model.final_layer_norm.weight": "ln_final.weight", "text_model.final_layer_norm.bias": "ln_final.bias"}  # fmt: skip
_VISION = {"vision_model.embeddings.class_embedding": "class_embedding", "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
           "vision_model.embeddings.position_embedding.weight": "positional_embedding", "vision_model.pre_layrnorm.weight": "ln_pre.weight",
           "vision_model.pre_layrnorm.bias": "ln_pre.bias", "vision_model.post_layernorm.weight": "ln_post.weight",
           "vision_model.post_layernorm.bias": "ln_post.bias"}  # fmt: skip


def openclip(name: str) -> tuple[Place, ...]:
    """A text tower of OpenCLIP.

    `text_projection` is a parameter there, x @ w. Files made by way of transformers hold the matrix of a Linear layer instead, which is
    its transpose, under two spellings.
    """
    if name == "text_projection.weight":
        return Place("text_projection", "transposed"), Place("text_projection.weight"), Place("text_projection.weight.weight")
    return (Place(_TEXT[name]),) if name in _TEXT else (_block(name, "text_model"),)


def openai_vision(name: str) -> tuple[Place, ...]:
    """The vision tower of OpenAI's CLIP."""
    if name == "visual_projection.weight":
        return (Place("proj", "transposed"),)
    return (Place(_VISION[name]),) if name in _VISION else (_block(name, "vision_model"),)


def _block(name: str, model: str) -> Place:
    match = re.fullmatch(rf"{model}\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None:
        raise KeyError(name)
    layer, inner, kind = match.groups()
    theirs = f"transformer.resblocks.{layer}"
    for how in ("q", "k", "v"):
        if inner == f"self_attn.{how}_proj":
            return Place(f"{theirs}.attn.in_proj_{kind}", how)
    return Place(f"{theirs}.{_BLOCK[inner]}.{kind}")


# --- diffusers ------------------------------------------------------------------------------------------------------

_RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
           "skip_connection": "conv_shortcut"}  # fmt: skip
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # of the VAE, in the first folders


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
    return names


def diffusers_vae(config: VAEConfig) -> dict[str, str]:
    """{our parameter name: diffusers'} for every parameter of the VAE. Its attention's 1x1 convolutions are matrices there."""
    modules = _vae_modules(config)
    return {key: _renamed(key, modules) for key in shapes(VAE, config)}


def _vae_modules(config: VAEConfig) -> dict[str, str]:
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
    return names


def _renamed(key: str, modules: Mapping[str, str]) -> str:
    """A key with its longest prefix that is in `modules` replaced; with none it keeps its name."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:n])) in modules:
            return ".".join([modules[prefix], *parts[n:]])
    return key
