"""Names, shapes and a few numbers -> what a file or folder is: a model, a part of one, or what goes with one."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldm.config import FAMILIES, VAE_F4, VAE_F8, ModelConfig, VisionConfig
from ldm.errors import FileError
from ldm.model import LatentDiffusion
from ldm.networks.safety import SafetyChecker
from weights.alone import SAFETY, vae_alone
from weights.checkpoint import Parameters
from weights.files.folders import Folder, add_component
from weights.files.opened import Tensors
from weights.files.source import Spec
from weights.folder.read import describe
from weights.names.blank import shapes as shapes_of
from weights.names.detect import detect, like_file, shown_in_file
from weights.names.diffusers import read_diffusers_unet, read_diffusers_vae
from weights.names.family import family, title_of
from weights.names.folders import FOLDER, bare, shown_in_folder
from weights.names.instead import What, instead, kind_of
from weights.names.layout import ALONE, Layout, original
from weights.names.metadata import CONFIG_KEY
from weights.names.places import hugging_face
from weights.names.sizes import (
    UNET,
    Shapes,
    read_text,
    read_unet,
    read_vae,
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
    same_names,
    sizes_of,
    tower_titles,
    vae_sizes,
)
from weights.tools.facts import AverageFacts, Component, EmbeddingFacts, LoraFacts, PredictionFacts

FOLDER_OWNERS = {
    "unet/": "unet",
    "vae/": "vae",
    "image_encoder/": "vision",
    "depth_estimator/": "depth",
    "safety_checker/": "safety",
}
VAES = (
    (VAE_F8, "VAE of SD 1, SD 2 or SDXL, which have the same shapes"),
    (VAE_F4, "VAE of the x4 upscaler"),
)


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


def describe_contents(file: Tensors, config: ModelConfig | str | None, stack: contextlib.ExitStack) -> Findings:
    """What an open file or folder is; what has to be opened beside it is closed with `stack`."""
    shapes = {key: file.shape(key) for key in file}
    if isinstance(file, Folder) and "unet/conv_in.weight" in shapes:
        return _folder(file, shapes, config, stack)
    if f"{UNET}input_blocks.0.0.weight" in shapes:
        return _single(file, shapes, config)
    return _part(file, shapes, FAMILIES[config] if isinstance(config, str) else config)


def _single(file: Tensors, shapes: Shapes, config: ModelConfig | str | None) -> Findings:
    """A model in one file."""
    layout = original(shapes)
    there = shown_in_file(shapes, layout)
    name = family(there.unet, there.vision is not None, shapes)
    known, refused = None, None
    try:
        known = detect(shapes, file.metadata, config, file.path)
    except FileError as error:
        refused = error.what
    noted = f"{CONFIG_KEY} in its metadata" if CONFIG_KEY in file.metadata else None
    explicit = noted if config is None else "the config given"
    evidence: tuple[str, ...] = () if there.unet is None else (f"{sizes_of(there.unet)} -> {name}",)
    if known is not None and explicit is not None:
        evidence += (f"{explicit}: {known.name}",)
    groups = components(file.specs, owners(layout), layout.ignored, tower_titles(there.text))
    usual = FAMILIES.get(name)
    like = like_file(usual, there.text) if usual and same_names(there.unet, there.vae, usual) else None
    return _model(file, layout, name, known, like, refused, explicit, evidence, groups)


def _folder(folder: Folder, shapes: Shapes, config: ModelConfig | str | None, stack: contextlib.ExitStack) -> Findings:
    """A model in a diffusers folder."""
    folders = {key.split("/")[0] for key in shapes}
    layout = bare(folders)
    there = shown_in_folder(shapes)
    marks = ("cc_projection.",) if (folder.path / "cc_projection").is_dir() else ()
    name = family(there.unet, "image_encoder" in folders, marks)
    known, refused = None, None
    try:
        known, layout = describe(folder, config)
    except FileError as error:  # of a file in the folder, perhaps
        inside = "" if error.path is None else os.path.relpath(error.path, folder.path)
        refused = error.what if inside in ("", ".") else f"{Path(inside).as_posix()}: {error.what}"
    prefixes = FOLDER_OWNERS | {
        part.theirs: part.ours.rstrip(".") for part in layout.parts if part.ours.startswith("text.")
    }
    groups = components({**folder.specs, **_safety_checker(folder, stack)}, prefixes, FOLDER, tower_titles(there.text))
    evidence: tuple[str, ...] = () if there.unet is None else (f"{sizes_of(there.unet)} -> {name}",)
    if known is not None and config is None:
        evidence += ("its config.json files describe the tensors beside them",)
    explicit = None if config is None else "the config given"
    return _model(folder, layout, name, known, None, refused, explicit, evidence, groups)


def _safety_checker(folder: Folder, stack: contextlib.ExitStack) -> Mapping[str, Spec]:
    """The tensors of the safety checker, which lies in the folder and is no part of the model."""
    path = folder.path / "safety_checker"
    if not any(next(path.glob(f"{stem}*"), None) for stem in ("model", "pytorch_model")):
        return {}
    beside = stack.enter_context(Folder(folder.path))
    add_component(beside, path, ("model", "pytorch_model"), "safety_checker/")
    return beside.specs


def _model(
    file: Tensors, layout: Layout, name: str, known: ModelConfig | None, like: ModelConfig | None, refused: str | None,
    explicit: str | None, evidence: tuple[str, ...], groups: tuple[Component, ...],
) -> Findings:  # fmt: skip
    """What a model and a lone UNet have in common. One not `known` is compared by names with what it is `like`."""
    what: What = "unet" if {group.name for group in groups} <= {"unet", "leftovers", "schedule"} else "model"
    predicted, trouble = None, None
    found = Account((), (), (), None if layout.averaged is None else average(file.specs, ()), None)
    title = title_of(name)
    if (config := known or like) is not None:
        predicted, config, trouble = prediction(file, config, layout, explicit)
        name = config.name
        title = config.family.title or name
        network = functools.partial(shapes_of, LatentDiffusion, config)
        found = account(Parameters(file=file, layout=layout, network=network), sized=known is not None)
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


def _part(file: Tensors, shapes: Shapes, config: ModelConfig | None) -> Findings:
    kind = kind_of(shapes)
    what = "other" if kind is None else kind.what
    if what == "lora":
        return _lora(file, config)
    if what == "embedding":
        return _embedding(file, shapes)
    networks = {"vae": _vae, "safety checker": _safety, "unet": _unet, "text tower": _text}
    return networks[what](file, shapes) if what in networks else _other(what, file, shapes)


def _lora(file: Tensors, config: ModelConfig | None) -> Findings:
    groups = components(file.specs, {"": "lora"}, ())
    try:
        facts, unknown, evidence = lora_facts(file, config)
    except FileError as error:
        return Findings("lora", "damaged LoRA", groups, (), problem=error.what)
    title = f"{'/'.join(facts.kinds)} for {' or '.join(facts.families) or 'no known family'}"
    none = "no model of this project has the" if config is None else f"a model of family {config.name} has none of the"
    problem = None if facts.families else f"{none} modules that it changes"
    return Findings("lora", title, groups, evidence, None, problem, unknown_keys=unknown, lora=facts)


def _embedding(file: Tensors, shapes: Shapes) -> Findings:
    groups = components(file.specs, {"": "embedding"}, ())
    try:
        facts = embedding_facts(file)
    except FileError as error:
        return Findings("other", "small tensors that are no embedding", groups, (), problem=error.what)
    evidence = tuple(f"{key}: {[*shapes[key]]}" for key in shapes if file.specs[key].dtype.is_floating_point)
    return Findings(
        "embedding", f"textual-inversion embedding for {' and '.join(facts.towers)}", groups, evidence, embedding=facts
    )


def _vae(file: Tensors, shapes: Shapes) -> Findings:
    unread = ("model_ema.", "loss.", "first_stage_model.model_ema.", "first_stage_model.loss.")
    groups = components(file.specs, {"": "vae"} | dict.fromkeys(unread, "leftovers"), ALONE)
    prefix = "" if "encoder.conv_in.weight" in shapes else "first_stage_model."
    there = read_vae(shapes, prefix)
    there = there if there is not None and there.num_res_blocks else read_diffusers_vae(shapes, prefix)
    known, title = next((one for one in VAES if there == visible(one[0])), (None, "VAE of other sizes"))
    evidence = () if there is None else (vae_sizes(there),)
    try:
        parameters = None if known is None else vae_alone(file, known)
    except FileError:
        parameters = None
    if parameters is None:
        return Findings("vae", title, groups, evidence, problem="no family of this project has a VAE of these sizes")
    found = account(parameters)
    return Findings(
        "vae", title, groups, evidence, None, found.refusal, None, (), found.missing_keys, found.unknown_keys
    )


def _safety(file: Tensors, shapes: Shapes) -> Findings:
    network = functools.partial(shapes_of, SafetyChecker, VisionConfig())
    found = account(Parameters(file=file, layout=SAFETY, network=network))
    groups, evidence = components(file.specs, {"": "safety"}, ()), ("it has special_care_embeds",)
    what: What = "safety checker"
    return Findings(what, what, groups, evidence, None, found.refusal, None, (), found.missing_keys, found.unknown_keys)


def _unet(file: Tensors, shapes: Shapes) -> Findings:
    prefix = "diffusion_model." if "diffusion_model.input_blocks.0.0.weight" in shapes else ""
    unet = read_diffusers_unet(shapes, "") if "conv_in.weight" in shapes else read_unet(shapes, prefix)
    name = family(unet, False, shapes)
    evidence = () if unet is None else (f"{sizes_of(unet)} -> {name}",)
    return Findings(
        "unet",
        f"UNet alone, of {title_of(name)}",
        components(file.specs, {"": "unet"}, ()),
        evidence,
        name,
        instead(shapes),
    )


def _text(file: Tensors, shapes: Shapes) -> Findings:
    key = next(key for key in shapes if "text_model.encoder.layers.0." in key)
    prefix = key[: key.index("text_model.encoder.layers.0.")]
    tower = read_text(
        lambda name: next((shapes[k] for p in hugging_face(name) if (k := prefix + p.key) in shapes), None)
    )
    titles = tower_titles((tower,))
    evidence = (
        () if tower is None else (f"text tower: {tower.width} wide, {tower.layers} blocks, {tower.vocab} tokens",)
    )
    groups = components(file.specs, {"": "text.0"}, (), titles)
    return Findings("text tower", f"{titles['text.0']}, alone", groups, evidence, None, instead(shapes))


def _other(what: What, file: Tensors, shapes: Shapes) -> Findings:
    title = {"controlnet": "ControlNet", "transformer": "Flux or SD 3 transformer"}.get(what, "something else")
    name = {"controlnet": "controlnet"}.get(what, "unknown")
    return Findings(what, title, components(file.specs, {"": name}, ()), (), None, instead(shapes))
