"""What names, shapes and single numbers say of a file: which networks are in it, what is missing, what is amiss."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.errors import AmbiguousCheckpoint, FileError
from weights.checkpoint import Parameters, network_of
from weights.files.opened import Tensors
from weights.files.source import Spec
from weights.names.layout import WHAT, Layout
from weights.names.layout import reason as ignored_for
from weights.names.prediction import STATISTIC, THRESHOLD, Finding, claims_of, deviation_of, settle
from weights.tools.facts import AverageFacts, Component, Damage, PredictionFacts, TrainingFacts

TOWERS = {768: "CLIP-L", 1024: "OpenCLIP-H", 1280: "OpenCLIP-bigG"}  # text towers by width
TITLES = {
    "unet": "UNet", "vae": "VAE", "vision": "image encoder", "depth": "depth network", "safety": "safety checker",
    "controlnet": "ControlNet", "lora": "factors", "embedding": "vectors", "ema": "moving average",
    "schedule": "noise schedule", "leftovers": "read by nothing", "unknown": "unknown",
}  # fmt: skip
ORDER = (
    "unet", "vae", "text.0", "text.1", "vision", "depth", "safety", "controlnet", "lora", "embedding", "ema",
    "schedule", "leftovers", "unknown",
)  # fmt: skip
POSITION_IDS = re.compile(r"(.+[./])?embeddings\.position_ids")
_SCHEDULE = re.compile(r"(low_scale_model\.)?\w*(alphas_cumprod|betas|posterior)\w*")
_OLD_TOWER = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.embeddings\.token_embedding\.weight"
)
MAX_IDS = 65536  # numbers of a position_ids that is read to be checked; the published ones have 77 or 257


def typed(dtype: torch.dtype) -> str:
    """torch.float16 -> float16."""
    return str(dtype).removeprefix("torch.")


def owners(layout: Layout) -> dict[str, str]:
    """{prefix: component} of a single file's layout."""
    found = {
        "model_ema.": "ema", "first_stage_model.": "vae", "depth_model.": "depth",
        "first_stage_model.loss.": "leftovers", "first_stage_model.model_ema.": "leftovers",
    }  # fmt: skip
    for part in layout.parts:
        root = re.match(r"cond_stage_model\.|conditioner\.embedders\.\d\.", part.theirs)
        found[root[0] if root and part.ours.startswith("text.") else part.theirs] = part.ours.rstrip(".")
    return found


def components(
    specs: Mapping[str, Spec],
    prefixes: Mapping[str, str],
    ignored: Iterable[tuple[str, str]],
    titles: Mapping[str, str] | None = None,
) -> tuple[Component, ...]:
    """The tensors in groups: each has the component of its longest prefix, or is ignored for a reason, or unknown."""
    longest = sorted(prefixes, key=len, reverse=True)
    groups: dict[str, list[str]] = {}
    for key in specs:
        name = next((prefixes[prefix] for prefix in longest if key.startswith(prefix)), None)
        if name is None:
            why = ignored_for(ignored, key)
            name = "unknown" if why is None else "schedule" if why.startswith("noise schedule") else "leftovers"
        groups.setdefault(name, []).append(key)
    ranked = sorted(groups, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    return tuple(
        _component(name, (titles or {}).get(name) or TITLES.get(name, name), {key: specs[key] for key in groups[name]})
        for name in ranked
    )


def _component(name: str, title: str, specs: Mapping[str, Spec]) -> Component:
    dtypes = dict(Counter(typed(spec.dtype) for spec in specs.values()))
    parameters = sum(spec.numel for key, spec in specs.items() if not POSITION_IDS.fullmatch(key))
    size = sum(spec.numel * spec.dtype.itemsize for spec in specs.values())
    return Component(name, title, len(specs), parameters, size, dtypes)


def same_names(unet: UNetConfig | None, vae: VAEConfig | None, config: ModelConfig) -> bool:
    """Have networks of these sizes the names of the config's? Widths may differ, the number of layers not."""

    def layers(of: UNetConfig) -> tuple[object, ...]:
        return of.num_res_blocks, of.down_depth, of.up_depth, of.mid_depth

    def levels(of: VAEConfig) -> tuple[object, ...]:
        return len(of.channel_mult), of.num_res_blocks

    same = unet is None or layers(unet) == layers(config.unet)
    return same and (vae is None or levels(vae) == levels(config.vae))


def tower_titles(towers: Sequence[TextConfig | None]) -> dict[str, str]:
    """What text towers are called, by component."""
    known = [TOWERS.get(tower.width, f"{tower.width} wide") if tower else None for tower in towers]
    return {f"text.{i}": f"text tower, {which}" if which else "text tower" for i, which in enumerate(known)}


def sizes_of(unet: UNetConfig) -> str:
    """What tells families apart, in words."""
    sizes = [
        f"{unet.model_channels} channels",
        f"{unet.in_channels} in",
        f"context {unet.context_dim}",
        "linear projections" if unet.linear_proj else "1x1-convolution projections",
    ]
    if unet.vector_dim is not None:
        sizes += [f"vector {unet.vector_dim}", f"{unet.mid_depth or 0} transformer blocks in the middle"]
    if unet.noise_levels is not None:
        sizes.append(f"{unet.noise_levels} noise levels")
    return "UNet: " + ", ".join(sizes)


def vae_sizes(vae: VAEConfig) -> str:
    """What tells VAEs apart, in words."""
    return f"VAE: {vae.channels} channels, {vae.z_channels} in the latent, {vae.factor} pixels per latent cell"


@dataclass(frozen=True)
class Account:
    """Every key and every parameter, compared."""

    missing: tuple[str, ...]  # networks
    missing_keys: tuple[str, ...]
    unknown_keys: tuple[str, ...]
    ema: AverageFacts | None  # None: this layout has none
    refusal: str | None  # what the loader would say


def account(parameters: Parameters, *, sized: bool = True) -> Account:
    """What there is of a network in a file, by name; `sized`: by shape and type too, as the loader asks."""
    there = {network_of(name) for name in parameters.raw}
    gone = [network for network in parameters.missing if network not in there and network.startswith(tuple(WHAT))]
    missing_keys = [key for network, keys in parameters.missing.items() if network not in gone for key in keys]
    ema = None if parameters.layout.averaged is None else average(parameters.file, parameters.averaged.values())
    refused = None
    try:
        if sized:
            parameters.require_whole()
            parameters.require_numbers()
    except FileError as error:
        refused = error.what
    networks = tuple(network.rstrip(".") for network in gone)
    return Account(networks, tuple(dict.fromkeys(missing_keys)), tuple(parameters.unknown), ema, refused)


def average(keys: Iterable[str], expected: Iterable[str]) -> AverageFacts:
    """What there is of a moving average, whose tensors should be `expected`, where they are known."""
    keys, expected = set(keys), set(expected)
    bookkeeping = {"model_ema.decay", "model_ema.num_updates"}
    there = [key for key in keys - bookkeeping if key.startswith("model_ema.")]
    if not there:
        return AverageFacts("leftover" if bookkeeping & keys else "none", 0, len(expected))
    return AverageFacts("full" if expected <= set(there) else "partial", len(there), len(expected))


def prediction(
    file: Tensors, config: ModelConfig, layout: Layout, explicit: str | None
) -> tuple[PredictionFacts, ModelConfig, str | None]:
    """What is predicted and who says so, the config with it, and why it cannot be loaded, if so.

    `explicit`: who gave the config, where somebody did. Reads one tensor of a few hundred numbers.
    """

    def statistic() -> torch.Tensor | None:
        keys = (place.key for place in layout.places(STATISTIC) if place.key in file)
        return next((file.read(key, mapped=False) for key in keys), None)

    evidence = _claims(file)
    try:
        if (deviation := deviation_of(config, statistic)) is not None:
            evidence.append(f"weights: norm1.bias std {deviation:.3f}; eps has less than {THRESHOLD}, v more")
        given = explicit is not None
        finding: Finding = settle(config, file.specs, file.metadata, statistic, file.error, explicit=given)
    except AmbiguousCheckpoint as clash:
        return PredictionFacts(None, tuple(evidence), clash.what), config, clash.what
    except FileError as fault:
        return PredictionFacts(None, tuple(evidence), None), config, fault.what
    if finding.doubt is not None:
        conflict = f"norm1.bias std {finding.doubt:.3f} is in between: loading asks the network"
        return PredictionFacts(None, tuple(evidence), conflict), finding.config, None
    if explicit is not None:
        evidence.insert(0, f"{explicit}: {finding.config.prediction}")
    elif not evidence:
        usual = f"all published models of family {config.name} predict {finding.config.prediction}"
        evidence.append(f"{usual}; this file says nothing else")
    if finding.config.schedule.zero_snr:
        evidence.append("trained with zero terminal SNR: its last timestep is pure noise")
    return PredictionFacts(finding.config.prediction, tuple(evidence), None), finding.config, None


def _claims(file: Tensors) -> list[str]:
    """Who says what, or what somebody says that this version does not understand."""
    try:
        return [f"{who}: {what}" for who, what in claims_of(file.specs, file.metadata, file.error).items()]
    except FileError as fault:
        return [fault.what]


def damages(file: Tensors) -> tuple[Damage, ...]:
    """Buffers that are not as published, and names that lack a part; NaN would take reading everything."""
    found = [Damage(key, fault) for key in file if POSITION_IDS.fullmatch(key) and (fault := _ids_fault(file, key))]
    half = [key for key in file if _SCHEDULE.fullmatch(key) and file.specs[key].dtype.itemsize < 4]
    if half:
        types = ", ".join(sorted({typed(file.specs[key].dtype) for key in half}))
        what = f"{len(half)} buffers of the noise schedule are stored as {types}, too coarse to be used"
        found.append(Damage(half[0], what))
    if (old := next(filter(_OLD_TOWER.fullmatch, file), None)) is not None:
        found.append(Damage(old, "the names of this text tower lack text_model."))
    return tuple(found)


def _ids_fault(file: Tensors, key: str) -> str | None:
    """What is wrong with the position_ids of a tower: 0, 1, 2, ... as integers."""
    spec = file.specs[key]
    if len(spec.shape) != 2 or spec.shape[0] != 1 or not 0 < spec.numel <= MAX_IDS:
        return f"has the shape {list(spec.shape)[:6]}"
    ids = file.read(key, mapped=False).double()[0]
    faults = [] if not spec.dtype.is_floating_point else [f"is stored as {typed(spec.dtype)}"]
    if not torch.equal(ids, torch.arange(len(ids), dtype=torch.float64)):
        faults.append(f"does not count from 0 to {len(ids) - 1}")
    return " and ".join(faults) or None


def training(file: Tensors, metadata: Mapping[str, str]) -> TrainingFacts | None:
    """How long was trained: what a trainer noted, or how often a moving average was updated."""
    for step, epoch in (("global_step", "epoch"), ("ss_steps", "ss_epoch"), ("step", "epoch")):
        if (steps := _whole(metadata.get(step))) is not None:
            return TrainingFacts(steps, _whole(metadata.get(epoch)), step)
    key = "model_ema.num_updates"
    if key in file and file.specs[key].numel == 1 and not file.specs[key].dtype.is_floating_point:
        updates = int(file.read(key, mapped=False).reshape(-1)[0])
        return TrainingFacts(updates, None, f"{key}, the updates of its moving average")
    return None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,18}", text) else None
