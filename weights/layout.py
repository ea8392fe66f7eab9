"""Which prefix holds which network in the published layouts, and which keys may be ignored, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ldm.errors import FileError
from weights import names

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A network: `ours` + name in `LatentDiffusion` is `theirs` + name in the file."""

    what: str  # for people
    ours: str
    theirs: str


@dataclass(frozen=True)
class Layout:
    """How one kind of published file is arranged."""

    parts: tuple[Part, ...]
    averaged: str  # prefix in the file of what the EMA covers
    ignored: tuple[tuple[str, str], ...]  # pattern of a whole key, reason

    def key(self, ours: str) -> str:
        """The name in the file of one of our parameters."""
        for part in self.parts:
            if ours.startswith(part.ours):
                return part.theirs + ours.removeprefix(part.ours)
        raise KeyError(ours)


@dataclass(frozen=True)
class Plan:
    """Where every key of a file goes."""

    sources: Mapping[str, str]  # our parameter -> key in the file
    ignored: Mapping[str, str]  # key in the file -> reason


_BUFFERS = (
    "betas|alphas_cumprod|alphas_cumprod_prev|sqrt_alphas_cumprod|sqrt_one_minus_alphas_cumprod|log_one_minus_alphas_cumprod"
    "|sqrt_recip_alphas_cumprod|sqrt_recipm1_alphas_cumprod|posterior_variance|posterior_log_variance_clipped"
    "|posterior_mean_coef1|posterior_mean_coef2"
)

SD1 = Layout(
    parts=(
        Part("UNet", "unet.", "model.diffusion_model."),
        Part("VAE", "vae.", "first_stage_model."),
        Part("text tower", "text.0.", "cond_stage_model.transformer."),
    ),
    averaged="model.",
    ignored=(
        (_BUFFERS, "noise schedule: computed anew in float64, because stored copies may be float16 or absent"),
        (r"lvlb_weights|logvar", "weights of a training loss"),
        (r"cond_stage_model\.transformer\.(text_model|vision_model)\.embeddings\.position_ids", "0 to 76 by definition; stored as integers, as floats, or damaged by merging"),
        (r"model_ema\.(decay|num_updates)", "bookkeeping of the moving average"),
        (r"(cond_stage_model\.(transformer\.)?)?logit_scale", "temperature of CLIP's training loss"),
        (r"cond_stage_model\.transformer\.text_projection\.weight", "projection of the pooled text, which SD 1 does not use"),
        (r"first_stage_model\.loss\..+|loss\..+", "discriminator and perceptual loss of the VAE's training"),
        (r"embedding_manager\..+", "leftover of textual inversion training"),
    ),
)

LAYOUTS: dict[str, Layout] = {"sd1": SD1}  # by family: those that this version can load

RAW = "the moving average was not asked for: ema=True loads it"
AVERAGED = "the moving average was asked for in place of these"


def plan(layout: Layout, wanted: Mapping[str, Shape], found: Mapping[str, Shape], error: Callable[[str, str | None], FileError], *, ema: bool = False) -> Plan:
    """Account for every key of a file whose shapes are `found`: loaded, ignored for a reason, or an error.

    `wanted` are the parameters of the model. `error` makes the FileError: missing, unknown and misshapen tensors are counted,
    the first three are named.
    """
    spelled: dict[str, str] = {}  # original spelling -> key in the file
    for key in found:
        if names.canonical(key) in spelled:
            raise error(f"has {_short(key)} twice, with and without text_model.; which is right cannot be known", key)
        spelled[names.canonical(key)] = key
    originals = {ours: layout.key(ours) for ours in wanted}
    averages = {key: names.ema(key) for key in originals.values() if key.startswith(layout.averaged)}
    if ema:
        _require_ema(averages, spelled, error)
        originals = {ours: averages.get(key, key) for ours, key in originals.items()}

    missing = [key for key in originals.values() if key not in spelled]
    sources = {ours: spelled[key] for ours, key in originals.items() if key in spelled}
    misshapen = [(key, wanted[ours], found[key]) for ours, key in sources.items() if wanted[ours] != found[key]]
    reasons = dict.fromkeys(averages, AVERAGED) if ema else dict.fromkeys(averages.values(), RAW)
    used, ignored, unknown = set(sources.values()), {}, []
    for name, key in spelled.items():
        if key in used:
            continue
        reason = reasons.get(name) or next((why for pattern, why in layout.ignored if re.fullmatch(pattern, name)), None)
        if reason is None:
            unknown.append(key)
        else:
            ignored[key] = reason
    for part in layout.parts:
        if not any(ours.startswith(part.ours) for ours in sources) and any(ours.startswith(part.ours) for ours in wanted):
            raise error(f"has no {part.what} (no {part.theirs}* of the names SD 1 has); use a complete checkpoint", None)
    if missing or unknown or misshapen:
        raise _unaccounted(missing, unknown, misshapen, error)
    return Plan(sources, ignored)


def _require_ema(averages: Mapping[str, str], spelled: Mapping[str, str], error: Callable[[str, str | None], FileError]) -> None:
    there = sum(average in spelled for average in averages.values())
    if there == 0:
        leftover = "only its decay and num_updates: the average is already in the weights" if "model_ema.decay" in spelled else "no model_ema.* at all"
        raise error(f"has no moving average ({leftover}); load it with ema=False", None)
    if there < len(averages):
        first = next(average for average in averages.values() if average not in spelled)
        raise error(f"has a moving average of {there} of {len(averages)} tensors, {_short(first)} is missing; load it with ema=False", first)


def _unaccounted(
    missing: list[str], unknown: list[str], misshapen: list[tuple[str, Shape, Shape]], error: Callable[[str, str | None], FileError]
) -> FileError:
    parts, first = [], None
    if misshapen:
        first = misshapen[0][0]
        shown = ", ".join(f"{_short(key)} {list(there)} instead of {list(want)}" for key, want, there in misshapen[:3])
        parts.append(f"{len(misshapen)} of another shape ({shown})")
    if missing:
        first = first or missing[0]
        parts.append(f"{len(missing)} missing ({', '.join(map(_short, missing[:3]))})")
    if unknown:
        first = first or unknown[0]
        parts.append(f"{len(unknown)} unknown ({', '.join(map(_short, unknown[:3]))})")
    return error(f"tensors {', '.join(parts)}", first)


def _short(key: str, limit: int = 34) -> str:
    """The telling end of a long name."""
    return key if len(key) <= limit else "..." + key[3 - limit :]
