"""A `ModelConfig` -> the JSON configs and tokenizer files that a diffusers folder has beside its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

from ldm.conditioning import tokenizer
from ldm.config import DepthConfig, ModelConfig, TextConfig, UNetConfig, VAEConfig, VisionConfig
from ldm.errors import ArgumentError

STEMS = dict.fromkeys(("unet", "vae"), "diffusion_pytorch_model")  # of the file of weights; "model" for all others
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # OpenAI's pictures
_SIZE_WIDTH = 256  # of an embedded size number: SDXL's `addition_time_embed_dim`


def towers(config: ModelConfig) -> tuple[str, ...]:
    """The folder of each text tower. The refiner has only what is SDXL's second."""
    return (
        ("text_encoder_2",)
        if is_xl(config) and len(config.text) == 1
        else ("text_encoder", "text_encoder_2")[: len(config.text)]
    )


def is_xl(config: ModelConfig) -> bool:
    """Does the UNet take a conditioning vector, as SDXL's does?"""
    return config.unet.vector_dim is not None


def as_in_folders(config: ModelConfig) -> ModelConfig:
    """The config of the same model in a diffusers folder: SD 2's text tower ends with the last block that is read.

    diffusers reads the last block there and puts the final LayerNorm behind it; of SDXL it skips the last block itself.
    """
    if is_xl(config):
        return config
    return replace(
        config,
        text=tuple(replace(text, layers=text.layers - text.skip, skip=0, projection=None) for text in config.text),
    )


def folder_files(config: ModelConfig, only: Container[str] | None = None) -> dict[str, str]:
    """{path in the folder: text} for a model of this config.

    only  these networks alone, by their folders: no more than their config.json
    Raises ArgumentError for a network that diffusers' configs cannot describe.
    """
    config = as_in_folders(config)
    networks: dict[str, Callable[[], dict[str, Any]]] = {
        "unet": partial(unet_json, config),
        "vae": partial(vae_json, config),
        **{name: partial(text_json, config, i) for i, name in enumerate(towers(config))},
    }
    if config.vision is not None:
        networks["image_encoder"] = partial(vision_json, config.vision)
    if config.depth is not None:
        networks["depth_estimator"] = partial(depth_json, config.depth)
    asked = [name for name in networks if only is None or name in only]
    files: dict[str, Any] = {f"{name}/config.json": networks[name]() for name in asked}
    if only is None:
        files |= {
            "model_index.json": _index(config),
            "scheduler/scheduler_config.json": _scheduler(config),
            **_beside(config),
        }
    return {
        path: content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
        for path, content in files.items()
    }


def _beside(config: ModelConfig) -> dict[str, Any]:
    """What pipelines need that is no network: tokenizers, and how pictures are prepared for networks."""
    files: dict[str, Any] = {}
    for name, text in zip(towers(config), config.text, strict=True):
        files |= {
            f"{name.replace('text_encoder', 'tokenizer')}/{file}": data for file, data in _tokenizer(text).items()
        }
    if config.vision is not None:
        files["feature_extractor/preprocessor_config.json"] = _clip_processor(config.vision)
    if config.depth is not None:
        files["feature_extractor/preprocessor_config.json"] = _depth_processor(config.depth)
    if "low_res" in config.concat:
        files["low_res_scheduler/scheduler_config.json"] = {
            "_class_name": "DDPMScheduler", **_betas(config), "clip_sample": True, "prediction_type": "epsilon",
            "variance_type": "fixed_small",
        }  # fmt: skip
    return files


def unet_json(config: ModelConfig) -> dict[str, Any]:
    """unet/config.json."""
    unet = config.unet
    widths = [unet.model_channels * m for m in unet.channel_mult]
    heads = unet.heads or [width // (unet.head_dim or 1) for width in widths]  # diffusers calls it attention_head_dim
    described: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "center_input_sample": False, "downsample_padding": 1,
        "dropout": 0.0, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_scale_factor": 1, "norm_eps": 1e-5,
        "norm_num_groups": 32, "resnet_time_scale_shift": "default", "upcast_attention": False,
        "in_channels": unet.in_channels, "out_channels": unet.out_channels, "block_out_channels": widths,
        "layers_per_block": unet.num_res_blocks, "cross_attention_dim": unet.context_dim,
        "use_linear_projection": unet.linear_proj, "sample_size": config.size // config.vae.factor,
        "attention_head_dim": heads,
        "down_block_types": ["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in unet.down_depth],
        "up_block_types": ["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in unet.up_depth],
        "mid_block_type": "UNetMidBlock2D" if unet.mid_depth is None else "UNetMidBlock2DCrossAttn",
        "only_cross_attention": list(unet.cross_only) if any(unet.cross_only) else False, **_depths(unet),
    }  # fmt: skip
    if unet.vector_dim is not None:
        described |= {"addition_embed_type": "text_time", "addition_time_embed_dim": _SIZE_WIDTH,
                      "projection_class_embeddings_input_dim": unet.vector_dim}  # fmt: skip
    if unet.noise_levels is not None:
        described["num_class_embeds"] = unet.noise_levels
    return described


def _depths(unet: UNetConfig) -> dict[str, Any]:
    """Transformer blocks by level, one number if its blocks have as many. The middle has what the last level says."""
    if any(0 in depths and any(depths) for depths in (*unet.down_depth, *unet.up_depth)):
        what = "a UNet level with and without attention in its blocks has no place in a diffusers config"
        raise ArgumentError(f"{what}; write a single file", key="unet")
    down, up = ([_alike(depths) for depths in side] for side in (unet.down_depth, unet.up_depth))
    if unet.mid_depth is not None:
        if down[-1] not in (None, unet.mid_depth):
            what = f"{unet.mid_depth} transformer blocks in its middle and {down[-1]} at its last level"
            raise ArgumentError(
                f"a UNet with {what} has no place in a diffusers config; write a single file", key="unet"
            )
        down[-1] = unet.mid_depth
    each = [depth or 1 for depth in down]
    back = [depth if any(depths) else None for depth, depths in zip(down[::-1], unet.up_depth, strict=True)]
    if up != back:
        return {
            "transformer_layers_per_block": each,
            "reverse_transformer_layers_per_block": [depth or 1 for depth in up],
        }
    known = [depth for depth in down if depth is not None]
    return {"transformer_layers_per_block": known[0] if all(depth == known[0] for depth in known) else each}


def _alike(depths: tuple[int, ...]) -> int | list[int] | None:
    """None for a level without attention."""
    return None if not any(depths) else depths[0] if len(set(depths)) == 1 else list(depths)


def vae_json(config: ModelConfig) -> dict[str, Any]:
    """vae/config.json."""
    return vae_alone_json(config.vae, config.size) | ({"force_upcast": True} if is_xl(config) else {})


def vae_alone_json(vae: VAEConfig, size: int) -> dict[str, Any]:
    """The same of a VAE for pictures of about `size` pixels."""
    levels = len(vae.channel_mult)
    return {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "norm_num_groups": 32, "in_channels": 3, "out_channels": 3,
        "latent_channels": vae.z_channels, "block_out_channels": [vae.channels * m for m in vae.channel_mult],
        "layers_per_block": vae.num_res_blocks, "sample_size": size,
        "down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": vae.scale,
    }  # fmt: skip


def text_json(config: ModelConfig, i: int) -> dict[str, Any]:
    """config.json of text tower i."""
    text, projected = config.text[i], i == config.pooled_tower
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model", "attention_dropout": 0.0, "bos_token_id": tokenizer.START,
        "eos_token_id": tokenizer.END, "pad_token_id": text.pad, "hidden_act": text.activation,
        "hidden_size": text.width, "intermediate_size": text.mlp, "layer_norm_eps": 1e-5,
        "max_position_embeddings": text.length, "num_attention_heads": text.heads, "num_hidden_layers": text.layers,
        "projection_dim": text.projection or text.width, "vocab_size": text.vocab,
    }  # fmt: skip


def vision_json(vision: VisionConfig) -> dict[str, Any]:
    """image_encoder/config.json."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", "attention_dropout": 0.0,
        "hidden_act": vision.activation, "hidden_size": vision.width, "image_size": vision.image,
        "intermediate_size": vision.mlp, "layer_norm_eps": 1e-5, "num_attention_heads": vision.heads, "num_channels": 3,
        "num_hidden_layers": vision.layers, "patch_size": vision.patch, "projection_dim": vision.projection,
    }  # fmt: skip


def depth_json(depth: DepthConfig) -> dict[str, Any]:
    """depth_estimator/config.json. transformers' own default for `layer_norm_eps` is 1e-12; the original's is 1e-6."""
    widths = [depth.stem * m for m in (4, 8, 16)]
    cells = depth.image // depth.patch
    return {
        "architectures": ["DPTForDepthEstimation"], "model_type": "dpt", "is_hybrid": True, "hidden_size": depth.width,
        "num_hidden_layers": depth.layers, "num_attention_heads": depth.heads, "intermediate_size": depth.mlp,
        "image_size": depth.image, "patch_size": depth.patch, "num_channels": 3,
        "backbone_out_indices": [0, 1, *depth.hooks], "neck_hidden_sizes": [*widths[:2], depth.width, depth.width],
        "neck_ignore_stages": [0, 1], "backbone_featmap_shape": [1, widths[2], cells, cells],
        "fusion_hidden_size": depth.features, "readout_type": "project", "layer_norm_eps": 1e-6, "qkv_bias": True,
        "use_batch_norm_in_fusion_residual": False, "add_projection": False,
        "backbone_config": {
            "model_type": "bit", "embedding_size": depth.stem, "hidden_sizes": widths, "depths": list(depth.blocks),
            "layer_type": "bottleneck", "out_features": ["stage1", "stage2", "stage3"], "global_padding": "same",
            "embedding_dynamic_padding": True, "num_groups": 32,
        },
    }  # fmt: skip


_ABSENT = {  # parts that a pipeline asks for and may do without
    "StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionInpaintPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionImageVariationPipeline": ("safety_checker",),
    "StableDiffusionUpscalePipeline": ("safety_checker", "feature_extractor", "watermarker"),
    "StableDiffusionXLPipeline": ("image_encoder", "feature_extractor"),
    "StableDiffusionXLInpaintPipeline": ("image_encoder", "feature_extractor"),
    "StableDiffusionXLImg2ImgPipeline": ("text_encoder", "tokenizer"),
}


def _index(config: ModelConfig) -> dict[str, Any]:
    """model_index.json: the class of the pipeline, and of each of its parts the library and class."""
    pipeline = _pipeline(config)
    index: dict[str, Any] = {name: [None, None] for name in _ABSENT.get(pipeline, ())}
    index |= {"_class_name": pipeline, "scheduler": ["diffusers", _scheduler(config)["_class_name"]],
              "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}  # fmt: skip
    for i, name in enumerate(towers(config)):
        index[name] = ["transformers", text_json(config, i)["architectures"][0]]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if config.vision is not None:
        index["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    if config.depth is not None:
        index["depth_estimator"] = ["transformers", "DPTForDepthEstimation"]
        index["feature_extractor"] = ["transformers", "DPTImageProcessor"]
    if "low_res" in config.concat:
        index |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"], "max_noise_level": 350}
    elif is_xl(config):
        index["force_zeros_for_empty_prompt"] = config.zero_empty
        index |= {} if pipeline == "StableDiffusionXLPipeline" else {"requires_aesthetics_score": len(config.text) == 1}
    elif "safety_checker" in index:
        index["requires_safety_checker"] = False
    return dict(sorted(index.items()))


def _pipeline(config: ModelConfig) -> str:
    if is_xl(config):
        kind = "Inpaint" if "mask" in config.concat else "" if len(config.text) > 1 else "Img2Img"
        return f"StableDiffusionXL{kind}Pipeline"
    if config.vision is not None:
        return "StableDiffusionImageVariationPipeline"
    kinds = {"mask": "Inpaint", "depth": "Depth2Img", "low_res": "Upscale"}
    return f"StableDiffusion{next((kinds[name] for name in config.concat if name in kinds), '')}Pipeline"


def _betas(config: ModelConfig) -> dict[str, Any]:
    return {"beta_start": config.schedule.start, "beta_end": config.schedule.end, "beta_schedule": "scaled_linear",
            "num_train_timesteps": config.schedule.steps}  # fmt: skip


def _scheduler(config: ModelConfig) -> dict[str, Any]:
    """The sampler of the published folder. Others are made from it too: DDIM would clip without `clip_sample`."""
    predicted = {"eps": "epsilon", "v": "v_prediction"}[config.prediction]
    common = {**_betas(config), "clip_sample": False, "prediction_type": predicted, "steps_offset": 1}
    if config.schedule.zero_snr:  # whose last step is pure noise: a sampler must begin there
        common |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if is_xl(config):
        return {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "timestep_spacing": "leading",
                "use_karras_sigmas": False, **common}  # fmt: skip
    if config.prediction == "v":
        return {"_class_name": "DDIMScheduler", **common, "set_alpha_to_one": False}
    return {"_class_name": "PNDMScheduler", **common, "set_alpha_to_one": False, "skip_prk_steps": True}


def _clip_processor(vision: VisionConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": vision.image},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": vision.image, "width": vision.image},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD, "do_convert_rgb": True,
    }  # fmt: skip


def _depth_processor(depth: DepthConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "DPTImageProcessor", "do_resize": True,
        "size": {"height": depth.image, "width": depth.image}, "resample": 3, "keep_aspect_ratio": False,
        "ensure_multiple_of": 1, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip


def _tokenizer(text: TextConfig) -> Mapping[str, Any]:
    """The files of transformers' CLIPTokenizer."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    pad = end if text.pad == tokenizer.END else "!"  # id 0
    words = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    settings = {
        "tokenizer_class": "CLIPTokenizer", **words, "add_prefix_space": False, "do_lower_case": True,
        "errors": "replace", "model_max_length": text.length,
    }  # fmt: skip
    return {**_encoding(start, end), "tokenizer_config.json": settings, "special_tokens_map.json": words}


@cache
def _encoding(start: str, end: str) -> Mapping[str, str]:
    names = {tokenizer.START: start, tokenizer.END: end}
    pieces = {names.get(i, piece): i for piece, i in tokenizer.vocabulary().items()}
    return {
        "vocab.json": json.dumps(pieces, ensure_ascii=False, separators=(",", ":")),
        "merges.txt": "#version: 0.2\n" + "".join(f"{one} {two}\n" for one, two in tokenizer.merges()),
    }
