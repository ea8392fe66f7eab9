"""The names that transformers, and so the `depth_estimator/` of a diffusers folder, has for the parameters of the depth network."""

from __future__ import annotations

from ldm.config import DepthConfig
from ldm.dpt import DPT
from weights.blank import shapes

_QKV = ("query", "key", "value")
_VIT = {"cls_token": "cls_token", "pos_embed": "position_embeddings", "patch_embed.proj": "projection",
        "patch_embed.backbone.stem.conv": "backbone.bit.embedder.convolution", "patch_embed.backbone.stem.norm": "backbone.bit.embedder.norm"}  # fmt: skip
_BLOCK = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.qkv": "attention.attention", "attn.proj": "attention.output.dense",
          "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}  # fmt: skip
_FUSION = {"out_conv": "projection", **{f"resConfUnit{i}.conv{j}": f"residual_layer{i}.convolution{j}" for i in (1, 2) for j in (1, 2)}}


def dpt_names(config: DepthConfig) -> dict[str, tuple[str, ...]]:
    """{our parameter name: transformers'} for every parameter of the depth network; shapes are the same.

    Three names where q, k and v are matrices of their own there: ours is their rows, stacked in this order.
    """
    names = {f"pretrained.model.{ours}": f"dpt.embeddings.{theirs}" for ours, theirs in _VIT.items()} | {"pretrained.model.norm": "dpt.layernorm"}
    for i, blocks in enumerate(config.blocks):
        for j in range(blocks):
            ours, theirs = f"pretrained.model.patch_embed.backbone.stages.{i}.blocks.{j}", f"dpt.embeddings.backbone.bit.encoder.stages.{i}.layers.{j}"
            names |= {f"{ours}.{inner}": f"{theirs}.{inner}" for inner in ("downsample.conv", "downsample.norm", *(f"{kind}{n}" for kind in ("conv", "norm") for n in (1, 2, 3)))}
    for i in range(config.layers):
        names |= {f"pretrained.model.blocks.{i}.{ours}": f"dpt.encoder.layer.{i}.{theirs}" for ours, theirs in _BLOCK.items()}
    for i in (3, 4):  # counted from 0 there, with nothing at the ResNet's two maps
        ours, theirs = f"pretrained.act_postprocess{i}", "neck.reassemble_stage"
        names |= {f"{ours}.0.project.0": f"{theirs}.readout_projects.{i - 1}.0", f"{ours}.3": f"{theirs}.layers.{i - 1}.projection", f"{ours}.4": f"{theirs}.layers.{i - 1}.resize"}
    for i in (1, 2, 3, 4):  # their fusion counts from the coarsest
        names[f"scratch.layer{i}_rn"] = f"neck.convs.{i - 1}"
        names |= {f"scratch.refinenet{i}.{ours}": f"neck.fusion_stage.layers.{4 - i}.{theirs}" for ours, theirs in _FUSION.items()}
    names |= {f"scratch.output_conv.{i}": f"head.head.{i}" for i in (0, 2, 4)}

    def renamed(key: str) -> tuple[str, ...]:
        if key in names:
            return (names[key],)
        module, _, kind = key.rpartition(".")
        return tuple(f"{names[module]}.{part}.{kind}" for part in _QKV) if module.endswith(".qkv") else (f"{names[module]}.{kind}",)

    return {key: renamed(key) for key in shapes(DPT, config)}
