"""Which prefix holds which network in the published layouts, and which keys may be ignored, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import dataclass

from weights.names import places as names
from weights.names.places import Place, Places

# In a converted folder: what its networks have no place for of the original file.
LEFTOVERS = "original_only.safetensors"
# By prefix in `LatentDiffusion`.
WHAT = {"unet.": "UNet", "vae.": "VAE", "text.": "text tower", "vision.": "image encoder", "depth.": "depth network"}


@dataclass(frozen=True)
class Part:
    """A network: `ours` + name in `LatentDiffusion` lies at `theirs` + one of `places(name)` in the file."""

    ours: str
    theirs: str
    places: Places = names.same


@dataclass(frozen=True)
class Layout:
    """How one kind of published file is arranged."""

    parts: tuple[Part, ...]
    ignored: tuple[tuple[str, str], ...]  # pattern of a whole key, reason
    averaged: str | None = None  # prefix in the file of what the EMA covers; None: this kind of file has no EMA

    def places(self, ours: str) -> tuple[Place, ...]:
        """Where one of our parameters may lie; nowhere, if the file lacks its network."""
        for part in self.parts:
            if ours.startswith(part.ours):
                return tuple(place.under(part.theirs) for place in part.places(ours.removeprefix(part.ours)))
        return ()


_BUFFERS = (
    "betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod"
    "|log_one_minus_alphas_cumprod|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance"
    "|posterior_log_variance_clipped|posterior_mean_coef1|posterior_mean_coef2"
)
POSITION_IDS = (
    r"(.+[./])?embeddings\.position_ids",
    "0 to 76 by definition; stored as integers, as floats, or damaged by merging, under many spellings",
)
_CLIP_L_PROJECTION = "projection of CLIP-L's pooled text, which no family reads"

ORIGINAL = (
    (_BUFFERS, "noise schedule: computed anew in float64, because stored copies may be float16 or absent"),
    (r"denoiser\.(log_)?sigmas", "noise schedule: computed anew in float64"),
    (rf"low_scale_model\.({_BUFFERS})", "noise schedule of the x4 upscaler's input: computed anew"),
    (r"lvlb_weights|logvar", "weights of a training loss"),
    POSITION_IDS,
    (r"model_ema\.(decay|num_updates)", "bookkeeping of the moving average"),
    (r"(cond_stage_model\.((transformer|model)\.)?|conditioner\.embedders\.\d\.(transformer|model)\.)logit_scale",
     "temperature of CLIP's training loss"),
    (r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection\.weight", _CLIP_L_PROJECTION),
    (r"(first_stage_model\.)?loss\..+", "discriminator and perceptual loss of the VAE's training"),
    (r"first_stage_model\.model_ema\..+", "moving average of the VAE's training, which its weights already are"),
    (r"embedding_manager\..+", "leftover of textual inversion training"),
    (r"v_pred|ztsnr", "a mark of how the model was trained, read when its family is found out"),
    (r"model\.diffusion_model\.time_embedding\.cond_proj\.weight",
     "guidance embedding of a consistency model, left by a merge; it is added only where one is given"),
)  # fmt: skip

DEAD_TEXT = (
    (r"cond_stage_model\.model\.(transformer\..+|token_embedding\.weight|positional_embedding|text_projection"
     r"|ln_final\.(weight|bias)|logit_scale)",
     "text half of CLIP, which image variations do not use"),
)  # fmt: skip

DEPTH_HEAD = (
    (r"depth_model\.model\.pretrained\.model\.(head|norm)\.(weight|bias)",
     "ImageNet classifier of the depth network's backbone, which depth does not read"),
)  # fmt: skip

ALONE = (  # of networks that come alone
    POSITION_IDS,
    (r"(first_stage_model\.)?loss\..+", "discriminator and perceptual loss of the VAE's training"),
    (r"(first_stage_model\.)?model_ema\..+",
     "moving average of the VAE's training, which its weights already are, or its bookkeeping"),
    (rf"{re.escape(LEFTOVERS)}/.+", "of the original file, and no picture is computed from it"),
)  # fmt: skip


def reason(ignored: Iterable[tuple[str, str]], key: str) -> str | None:
    """Why a key may be ignored, by a table like those above; None: it may not."""
    return next((why for pattern, why in ignored if re.fullmatch(pattern, key)), None)


_HUGGING_FACE, _OPENCLIP = "text_model.embeddings.token_embedding.weight", "token_embedding.weight"


def original(keys: Container[str]) -> Layout:
    """The layout of a single file with these keys, as the networks in it show."""
    parts = [Part("unet.", "model.diffusion_model."), Part("vae.", "first_stage_model.", names.vae)]
    ignored: tuple[tuple[str, str], ...] = ORIGINAL
    vision = "cond_stage_model.model.visual.proj" in keys
    if vision:
        parts.append(Part("vision.", "cond_stage_model.model.visual.", names.openai_vision))
        ignored += DEAD_TEXT
    towers = [tower for prefix in _TOWERS for tower in _towers(keys, prefix, vision)]
    parts += [Part(f"text.{i}.", theirs, places) for i, (theirs, places) in enumerate(towers)]
    if "depth_model.model.pretrained.model.cls_token" in keys:
        parts.append(Part("depth.", "depth_model.model."))
        ignored += DEPTH_HEAD
    return Layout(tuple(parts), ignored, averaged="model.")


_TOWERS = ("cond_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")


def _towers(keys: Container[str], prefix: str, vision: bool) -> list[tuple[str, Places]]:
    """The text tower under a prefix, if there is one."""
    theirs = f"{prefix}transformer."
    if any(theirs + place.key in keys for place in names.hugging_face(_HUGGING_FACE)):
        return [(theirs, names.hugging_face)]
    theirs = f"{prefix}model."
    return [(theirs, names.openclip)] if theirs + _OPENCLIP in keys and not vision else []
