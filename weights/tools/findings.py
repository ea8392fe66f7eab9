"""Names, shapes and a few numbers -> what a file or folder is: a model, a part of one, or something that goes with one."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.config import FAMILIES, VAE_F4, VAE_F8, ModelConfig, VisionConfig
from ldm.errors import FileError
from ldm.model import LatentDiffusion
from ldm.networks.safety import SafetyChecker
from ldm.networks.vae import VAE
from weights.files.folders import Folder, add_component
from weights.files.opened import Weights
from weights.folder.read import describe
from weights.models import vae_layout
from weights.names import original as names
from weights.names.blank import shapes as shapes_of
from weights.names.detect import REFUSED, TITLES, detect, family, like_file, lookup, not_a_model
from weights.names.layout import ALONE, FOLDER, Layout, Part, original
from weights.names.metadata import CONFIG_KEY
from weights.names.original import hugging_face, hugging_face_vision
from weights.names.sizes import (
    UNET,
    read_diffusers_unet,
    read_diffusers_vae,
    read_text,
    read_unet,
    read_vae,
    read_vision,
    visible,
)
from weights.tools.adapters import embedding_facts, lora_facts
from weights.tools.evidence import (
    Account,
    account,
    average,
    components,
    owners,
    prediction,
    read_towers,
    reason,
    same_names,
    sizes_of,
    tower_titles,
    vae_sizes,
)
from weights.tools.facts import AverageFacts, Component, EmbeddingFacts, LoraFacts, PredictionFacts, What

FOLDER_OWNERS = {
    "unet/": "unet",
    "vae/": "vae",
    "image_encoder/": "vision",
    "depth_estimator/": "depth",
    "safety_checker/": "safety",
}


@dataclass(frozen=True)
class Findings:
    """What one kind of file has to say; the rest of a report is the same for all."""

    what: What
    title: str
    components: tuple[Component, ...]
    evidence: tuple[str, ...]
    family: str | None = None
    problem: str | None = None
    prediction: PredictionFacts | None = None
    missing: tuple[str, ...] = ()
    missing_keys: tuple[str, ...] = ()
    unknown_keys: tuple[str, ...] = ()
    ema: AverageFacts | None = None
    lora: LoraFacts | None = None
    embedding: EmbeddingFacts | None = None


# --- models ---------------------------------------------------------------------------------------------------------


def describe_contents(
    file: Weights | Folder, config: ModelConfig | str | None, stack: contextlib.ExitStack
) -> Findings:
    """What an open file or folder is; what has to be opened beside it is closed with `stack`."""
    shapes = {key: file.shape(key) for key in file}
    if isinstance(file, Folder) and "unet/conv_in.weight" in shapes:
        return _folder(file, shapes, config, stack)
    if f"{UNET}input_blocks.0.0.weight" in shapes:
        return _single(file, shapes, config)
    return _part(file, shapes, FAMILIES[config] if isinstance(config, str) else config)


def _single(
    file: Weights | Folder, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig | str | None
) -> Findings:
    """A model in one file."""
    layout = original(shapes)
    towers = read_towers(layout, shapes)
    unet, vision = read_unet(shapes), read_vision(lookup(layout, shapes, "vision."))
    name = family(unet, vision is not None, shapes)
    try:
        known, refused = detect(shapes, file.metadata, config, ""), None
    except FileError as error:
        known, refused = None, reason(error)
    explicit = (
        "the config given"
        if config is not None
        else f"{CONFIG_KEY} in its metadata"
        if CONFIG_KEY in file.metadata
        else None
    )
    evidence = () if unet is None else (f"{sizes_of(unet)} -> {name}",)
    if known is not None and explicit is not None:
        evidence += (f"{explicit}: {known.name}",)
    groups = components(file.specs, owners(layout), layout.ignored, tower_titles(towers))
    like = (
        like_file(FAMILIES[name], [*towers.values()])
        if name in FAMILIES and same_names(unet, read_vae(shapes), FAMILIES[name])
        else None
    )
    return _model(file, layout, name, known, like, refused, explicit, evidence, groups)


def _folder(
    folder: Folder, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig | str | None, stack: contextlib.ExitStack
) -> Findings:
    """A model in a diffusers folder."""
    there = [name for name in ("text_encoder", "text_encoder_2") if any(key.startswith(f"{name}/") for key in shapes)]
    parts = tuple(Part(f"text.{i}.", f"{name}/", hugging_face) for i, name in enumerate(there))
    layout = Layout((*parts, Part("vision.", "image_encoder/", hugging_face_vision)), FOLDER)
    towers = read_towers(layout, shapes)
    unet = read_diffusers_unet(shapes, "unet/")
    name = family(
        unet,
        any(key.startswith("image_encoder/") for key in shapes),
        {"cc_projection.": ()} if (folder.path / "cc_projection").is_dir() else {},
    )
    known, refused = None, None
    try:
        known, layout = describe(folder, config)
    except FileError as error:
        refused = str(error).removeprefix(f"{folder.path}: ")
    prefixes = FOLDER_OWNERS | {f"{name}/": f"text.{i}" for i, name in enumerate(there)}
    groups = components({**folder.specs, **_safety_checker(folder, stack)}, prefixes, FOLDER, tower_titles(towers))
    evidence = () if unet is None else (f"{sizes_of(unet)} -> {name}",)
    evidence += (
        ("its config.json files describe the tensors beside them",) if known is not None and config is None else ()
    )
    return _model(
        folder, layout, name, known, None, refused, None if config is None else "the config given", evidence, groups
    )


def _safety_checker(folder: Folder, stack: contextlib.ExitStack) -> Mapping[str, Any]:
    """The tensors of the safety checker, which lies in the folder and is no part of the model."""
    path = folder.path / "safety_checker"
    if not any(next(path.glob(f"{stem}*"), None) for stem in ("model", "pytorch_model")):
        return {}
    beside = stack.enter_context(Folder(folder.path))
    add_component(beside, path, ("model", "pytorch_model"), "safety_checker/")
    return beside.specs


def _model(
    file: Weights | Folder, layout: Layout, name: str, known: ModelConfig | None, like: ModelConfig | None, refused: str | None,
    explicit: str | None, evidence: tuple[str, ...], groups: tuple[Component, ...],
) -> Findings:  # fmt: skip
    """What a model and a lone UNet have in common. Where it cannot be `known`, its names are compared with those of one that it is `like`."""
    what: What = "unet" if {group.name for group in groups} <= {"unet", "leftovers", "schedule"} else "model"
    predicted, trouble = None, None
    found = Account((), (), (), None if layout.averaged is None else average(file.specs, ()), None)
    if (config := known or like) is not None:
        predicted, config, trouble = prediction(file, config, layout, explicit)
        name = config.name
        found = account(layout, shapes_of(LatentDiffusion, config), file.specs, sized=known is not None)
    title = TITLES.get(name) or REFUSED.get(name, name)
    return Findings(
        what=what,
        title=f"UNet alone, of {title}" if what == "unet" else re.sub(r"^an? ", "", title),
        components=groups,
        evidence=evidence,
        family=name,
        problem=refused or trouble or found.refusal,
        prediction=predicted,
        missing=found.missing,
        missing_keys=found.missing_keys,
        unknown_keys=found.unknown_keys,
        ema=found.ema,
    )


# --- everything else ------------------------------------------------------------------------------------------------


def what_is(shapes: Mapping[str, tuple[int, ...]]) -> What:
    """What a file without a UNet under its original name is: the answers of `weights.detect.not_a_model`, in its order, as words."""
    if any(re.search(r"^lora_|\.lora_|_lora\.|hada_w|lokr_w", key) for key in shapes):
        return "lora"
    if any("double_blocks." in key or "joint_blocks." in key for key in shapes):
        return "transformer"
    if any(key.startswith(("control_model.", "controlnet_")) for key in shapes):
        return "controlnet"
    if any(
        f"{prefix}encoder.conv_in.weight" in shapes and f"{prefix}decoder.conv_in.weight" in shapes
        for prefix in ("", "first_stage_model.")
    ):
        return "vae"
    if "conv_in.weight" in shapes and any(key.startswith("down_blocks.") for key in shapes):
        return "unet"
    if any(key.removeprefix("diffusion_model.") == "input_blocks.0.0.weight" for key in shapes):
        return "unet"
    if any(key.startswith("special_care_embeds") for key in shapes):
        return "safety checker"
    if any("text_model.encoder.layers.0." in key for key in shapes):
        return "text tower"
    small = len(shapes) <= 3 and all(len(shape) <= 2 and math.prod(shape) <= 1_000_000 for shape in shapes.values())
    return "embedding" if small or any(key.startswith("string_to_param.") for key in shapes) else "other"


def _part(file: Weights | Folder, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig | None) -> Findings:
    what = what_is(shapes)
    if what == "lora":
        return _lora(file, config)
    teller = {"embedding": _embedding, "vae": _vae, "safety checker": _safety, "unet": _unet, "text tower": _text}.get(
        what
    )
    return teller(file, shapes) if teller else _other(what, file, shapes)


def _lora(file: Weights | Folder, config: ModelConfig | None) -> Findings:
    groups = components(file.specs, {"": "lora"}, ())
    try:
        facts, unknown, evidence = lora_facts(file, config)
    except FileError as error:
        return Findings("lora", "damaged LoRA", groups, (), problem=str(error).removeprefix(f"{file.path}: "))
    title = "/".join(facts.kinds) + (
        f" for {' or '.join(facts.families)}" if facts.families else " for no known family"
    )
    problem = (
        None
        if facts.families
        else f"{'no model of this project' if config is None else f'a model of family {config.name}'} has {'the' if config is None else 'none of the'} modules that it changes"
    )
    return Findings("lora", title, groups, evidence, None, problem, unknown_keys=unknown, lora=facts)


def _embedding(file: Weights | Folder, shapes: Mapping[str, Any]) -> Findings:
    groups = components(file.specs, {"": "embedding"}, ())
    try:
        facts = embedding_facts(file)
    except FileError as error:
        return Findings(
            "other",
            "small tensors that are no embedding",
            groups,
            (),
            problem=str(error).removeprefix(f"{file.path}: "),
        )
    evidence = tuple(f"{key}: {[*shapes[key]]}" for key in shapes if file.specs[key].dtype.is_floating_point)
    return Findings(
        "embedding", f"textual-inversion embedding for {' and '.join(facts.towers)}", groups, evidence, embedding=facts
    )


def _vae(file: Weights | Folder, shapes: Mapping[str, Any]) -> Findings:
    groups = components(
        file.specs,
        {
            "": "vae",
            "model_ema.": "leftovers",
            "loss.": "leftovers",
            "first_stage_model.model_ema.": "leftovers",
            "first_stage_model.loss.": "leftovers",
        },
        ALONE,
    )
    prefix = "" if "encoder.conv_in.weight" in shapes else "first_stage_model."
    there = read_vae(shapes, prefix)
    there = there if there is not None and there.num_res_blocks else read_diffusers_vae(shapes, prefix)
    known = next((config for config in (VAE_F8, VAE_F4) if there == visible(config)), None)
    evidence = () if there is None else (vae_sizes(there),)
    title = (
        "VAE of the x4 upscaler"
        if known is VAE_F4
        else "VAE of SD 1, SD 2 or SDXL, which have the same shapes"
        if known is VAE_F8
        else "VAE of other sizes"
    )
    try:
        layout = None if known is None else vae_layout(shapes, known, file)
    except FileError:
        layout = None
    if layout is None:
        return Findings("vae", title, groups, evidence, problem="no family of this project has a VAE of these sizes")
    found = account(layout, shapes_of(VAE, known), file.specs)
    return Findings(
        "vae", title, groups, evidence, None, found.refusal, None, (), found.missing_keys, found.unknown_keys
    )


def _safety(file: Weights | Folder, shapes: Mapping[str, Any]) -> Findings:
    found = account(
        Layout((Part("", "", names.doubled_vision),), ALONE), shapes_of(SafetyChecker, VisionConfig()), file.specs
    )
    return Findings(
        "safety checker",
        "safety checker",
        components(file.specs, {"": "safety"}, ()),
        ("it has special_care_embeds",),
        None,
        found.refusal,
        None,
        (),
        found.missing_keys,
        found.unknown_keys,
    )


def _unet(file: Weights | Folder, shapes: Mapping[str, Any]) -> Findings:
    prefix = "diffusion_model." if "diffusion_model.input_blocks.0.0.weight" in shapes else ""
    unet = read_diffusers_unet(shapes, "") if "conv_in.weight" in shapes else read_unet(shapes, prefix)
    name = family(unet, False, shapes)
    evidence = () if unet is None else (f"{sizes_of(unet)} -> {name}",)
    return Findings(
        "unet",
        f"UNet alone, of {(TITLES | REFUSED)[name]}",
        components(file.specs, {"": "unet"}, ()),
        evidence,
        name,
        not_a_model(shapes),
    )


def _text(file: Weights | Folder, shapes: Mapping[str, Any]) -> Findings:
    key = next(key for key in shapes if "text_model.encoder.layers.0." in key)
    prefix = key[: key.index("text_model.encoder.layers.0.")]
    tower = read_text(
        lambda name: next(
            (shapes[prefix + place.key] for place in hugging_face(name) if prefix + place.key in shapes), None
        )
    )
    titles = tower_titles({"text.0": tower})
    evidence = (
        () if tower is None else (f"text tower: {tower.width} wide, {tower.layers} blocks, {tower.vocab} tokens",)
    )
    return Findings(
        "text tower",
        f"{titles['text.0']}, alone",
        components(file.specs, {"": "text.0"}, (), titles),
        evidence,
        None,
        not_a_model(shapes),
    )


def _other(what: What, file: Weights | Folder, shapes: Mapping[str, Any]) -> Findings:
    title = {"controlnet": "ControlNet", "transformer": "Flux or SD 3 transformer"}.get(what, "something else")
    name = {"controlnet": "controlnet"}.get(what, "unknown")
    return Findings(what, title, components(file.specs, {"": name}, ()), (), None, not_a_model(shapes))
