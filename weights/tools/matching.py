"""The tensors of a file or folder under the names of `LatentDiffusion`, whatever its layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ldm.config import FAMILIES, ModelConfig
from ldm.networks.clip import CLIPText
from ldm.networks.dpt import DPT
from ldm.networks.unet import UNet
from ldm.networks.vae import VAE
from ldm.networks.vision import CLIPVision
from weights.files.folders import Folder
from weights.files.opened import Weights
from weights.names import blank
from weights.names import diffusers as diffusers_names
from weights.names import original as names
from weights.names.detect import REFUSED, TITLES, family, lookup, not_a_model
from weights.names.layout import ALONE, FOLDER, Layout, Part, diffusers, original, reason
from weights.names.places import Place, Shape
from weights.names.sizes import (
    UNET,
    Shapes,
    read_diffusers_unet,
    read_diffusers_vae,
    read_text,
    read_unet,
    read_vae,
    read_vision,
)

AVERAGE = "moving average of the weights"
UNREAD = "part of a text tower after the last block that is read"
NETWORKS = ("unet", "vae", "text", "vision", "depth")  # components that are networks, without their numbers

_CONTAINERS = {
    "safetensors": "a .safetensors file",
    "zip": "a torch checkpoint",
    "stream": "a torch checkpoint of the kind before 1.6",
}
_OWN = (  # pattern of a key, component: where names are the file's own
    (r"model_ema\.", "ema"), (r"model\.diffusion_model\.|unet/", "unet"), (r"first_stage_model\.|vae/", "vae"), (r"depth_model\.|depth_estimator/", "depth"),
    (r"cond_stage_model\.|conditioner\.embedders\.0\.|text_encoder/", "text.0"), (r"conditioner\.embedders\.1\.|text_encoder_2/", "text.1"),
    (r"(base_model\.model\.)?(lora_unet_|unet\.)", "unet"), (r"(base_model\.model\.)?(lora_te2_|text_encoder_2\.)", "text.1"),
    (r"(base_model\.model\.)?(lora_te1?_|text_encoder\.)", "text.0"),
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor, or a part of one, that is one of ours."""

    component: str  # unet, vae, text.0, text.1, vision, depth, ema or other
    place: Place
    dtype: torch.dtype
    shape: Shape  # as it is here; 1x1 convolutions that some files hold as matrices: as matrices
    reason: str = ""  # why a file may lack it, if it is a known leftover


@dataclass(frozen=True)
class Side:
    """A file or folder, open."""

    file: Weights | Folder
    title: str  # what it is: "an SD 1 model"
    container: str  # what it lies in: "a diffusers folder"
    entries: Mapping[str, Entry]  # by our names if `ours`, by the file's otherwise
    ours: bool

    @cached_property
    def components(self) -> set[str]:
        """The networks in it; where names are the file's own, all that it has."""
        found = {entry.component for entry in self.entries.values()}
        return {component for component in found if is_network(component)} if self.ours else found

    def read(self, name: str) -> Tensor:
        """The tensor in its own type, on the CPU. It is a copy: what passes through is given back to the system."""
        entry = self.entries[name]
        pieces = [
            self.file.read(key, rows=entry.place.rows(self.file.shape(key)), mapped=False) for key in entry.place.keys
        ]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return tensor.T if entry.place.how == "transposed" else tensor.reshape(entry.shape)


def is_network(component: str) -> bool:
    """Is this component a network, and no leftover?"""
    return component.partition(".")[0] in NETWORKS


def by_parameters(file: Weights | Folder, config: ModelConfig | str | None = None) -> Side | None:
    """The tensors by our names; None where the file has no network of a known make.

    Names follow the structure that shapes show, so models of any width will do. `config` tells the structure where shapes do not:
    of a model that lacks tensors. What is no parameter of a network keeps the file's name, except the position ids and temperatures
    that every layout has in a place of its own.
    """
    shapes = {key: file.shape(key) for key in file}
    known = FAMILIES[config] if isinstance(config, str) else config
    found = _folder(shapes, known) if isinstance(file, Folder) else _single(shapes, known)
    if found is None:
        return None
    title, layout, parameters, read = found
    entries: dict[str, Entry] = {}
    used: set[str] = set()
    for ours in parameters:
        place = next(
            (place for place in layout.places(ours) if all(_usable(place, shapes.get(key)) for key in place.keys)), None
        )
        if place is None:
            continue
        entries[ours] = _entry(
            file,
            _component(ours),
            place,
            read(ours) or (_reason(layout, place.key) if ours.startswith("text.") else ""),
        )
        used.update(place.keys)
        average = names.ema(place.key) if layout.averaged and place.key.startswith(layout.averaged) else ""
        if average in shapes:
            entries[f"ema.{ours}"] = _entry(file, "ema", Place(average), AVERAGE)
            used.add(average)
    for key in shapes:
        if key not in used:
            name = _leftover(layout, key)
            entries[name if name not in entries else f"other/{key}"] = _entry(
                file, "other", Place(key), _reason(layout, key)
            )
    return Side(file, title, _container(file), entries, ours=True)


def by_keys(file: Weights | Folder) -> Side:
    """The tensors by the file's own names."""
    shapes = {key: file.shape(key) for key in file}
    entries = {
        key: _entry(
            file, next((component for pattern, component in _OWN if re.match(pattern, key)), "other"), Place(key), ""
        )
        for key in shapes
    }
    model = isinstance(file, Folder) or f"{UNET}input_blocks.0.0.weight" in shapes
    told = re.match(r"is (an? [^,(;:]+)", not_a_model(shapes)) if not model else None
    title = REFUSED["unknown"] if model else told[1].strip() if told else "a file of weights"
    return Side(file, title, _container(file), entries, ours=False)


# --- what the networks of a file are --------------------------------------------------------------------------------

_Found = tuple[
    str, Layout, list[str], Callable[[str], str]
]  # title, layout, our names of the parameters, why a parameter may be left out


def _single(shapes: Shapes, known: ModelConfig | None) -> _Found | None:
    if not any(key.startswith(UNET) for key in shapes):
        return _alone(shapes)
    layout = original(shapes)
    towers = [read_text(lookup(layout, shapes, part.ours)) for part in layout.parts if part.ours.startswith("text.")]
    vision = read_vision(lookup(layout, shapes, "vision."))
    unet = read_unet(shapes)
    name = known.name if known is not None and unet is None else family(unet, vision is not None, shapes)
    if known is None and unet is not None:
        usual = FAMILIES.get(name, FAMILIES["sd1"])
        known = replace(
            usual, unet=unet, vae=read_vae(shapes), text=tuple(towers), vision=vision, depth=FAMILIES["sd2-depth"].depth
        )
    return known and (_title(name), layout, [*_parameters(known, layout)], _unread(name))


def _folder(shapes: Shapes, known: ModelConfig | None) -> _Found | None:
    there = {key.split("/")[0] for key in shapes}
    folders = [folder for folder in ("text_encoder", "text_encoder_2") if folder in there]
    parts = [Part(f"text.{i}.", f"{folder}/", names.hugging_face) for i, folder in enumerate(folders)]
    bare = Layout((*parts, Part("vision.", "image_encoder/", names.hugging_face_vision)), FOLDER)
    towers = [read_text(lookup(bare, shapes, part.ours)) for part in parts]
    vision = read_vision(lookup(bare, shapes, "vision."))
    unet, vae = read_diffusers_unet(shapes, "unet/"), read_diffusers_vae(shapes, "vae/")
    name = known.name if known is not None and unet is None else family(unet, vision is not None, shapes)
    if known is None and unet is not None and vae is not None:
        usual = FAMILIES.get(name, FAMILIES["sd1"])
        known = replace(usual, unet=unet, vae=vae, text=tuple(towers), vision=vision, depth=FAMILIES["sd2-depth"].depth)
    if known is None:
        return None
    layout = diffusers(known, there)
    return _title(name), layout, [*_parameters(known, layout)], _unread(name)


def _alone(shapes: Shapes) -> _Found | None:
    """A VAE or a UNet that comes alone, under its own names or diffusers'."""
    for prefix in ("", "first_stage_model."):
        for vae, places in (
            (read_vae(shapes, prefix), lambda config: names.vae),
            (read_diffusers_vae(shapes, prefix), diffusers_names.in_diffusers_vae),
        ):
            if vae is not None and vae.channel_mult:  # none: its blocks have other names
                layout = Layout((Part("vae.", prefix, places(vae)),), ALONE)
                return "a VAE", layout, [f"vae.{name}" for name in blank.shapes(VAE, vae)], lambda ours: ""
    for unet, places in (
        (read_unet(shapes, ""), lambda config: names.same),
        (read_diffusers_unet(shapes, ""), diffusers_names.in_diffusers_unet),
    ):
        if unet is not None:
            layout = Layout((Part("unet.", "", places(unet)),), ALONE)
            return "a UNet", layout, [f"unet.{name}" for name in blank.shapes(UNet, unet)], lambda ours: ""
    return None


def _parameters(config: ModelConfig, layout: Layout) -> Iterator[str]:
    """Our names of all parameters of the networks that the layout has a place for."""
    towers = {f"text.{i}.": (CLIPText, text) for i, text in enumerate(config.text)}
    networks: dict[str, tuple[Callable[..., nn.Module], object]] = {
        "unet.": (UNet, config.unet), "vae.": (VAE, config.vae), "vision.": (CLIPVision, config.vision), "depth.": (DPT, config.depth), **towers,
    }  # fmt: skip
    for part in layout.parts:
        kind, sizes = networks.get(part.ours, (None, None))
        if kind is not None and sizes is not None:
            yield from (part.ours + name for name in blank.shapes(kind, sizes))


def _title(name: str) -> str:
    return TITLES.get(name) or REFUSED.get(name) or f"a model of family {name}"


def _unread(name: str) -> Callable[[str], str]:
    """Why a model of this family may lack a part of a text tower."""
    config = FAMILIES.get(name)

    def reason(ours: str) -> str:
        match = re.match(r"text\.(\d+)\.(?:text_model\.encoder\.layers\.(\d+)\.|(text_projection))", ours)
        if match is None or config is None or int(match[1]) >= len(config.text):
            return ""
        i = int(match[1])
        pooled = config.unet.vector_dim is not None and i == len(config.text) - 1
        last = match[3] is not None or int(match[2]) >= config.text[i].layers - config.text[i].skip
        return UNREAD if last and not pooled else ""

    return reason


# --- one tensor -----------------------------------------------------------------------------------------------------


def _usable(place: Place, stored: Shape | None) -> bool:
    """Can this place be read from a tensor of this shape? Which shape it should have, the comparison says."""
    if stored is None:
        return False
    if place.how in ("q", "k", "v"):
        return len(stored) > 0 and stored[0] % 3 == 0
    return len(stored) == 2 if place.how == "transposed" else len(stored) > 0 or not place.more


def _entry(file: Weights | Folder, component: str, place: Place, reason: str) -> Entry:
    shape = place.ours(file.shape(place.key))
    if place.more:
        shape = (sum(file.shape(key)[0] for key in place.keys), *shape[1:])
    if place.how == "kernel" and shape[2:] == (1, 1):
        shape = shape[:2]
    return Entry(component, place, file.specs[place.key].dtype, shape, reason)


def _component(ours: str) -> str:
    return re.match(r"text\.\d+|\w+", ours)[0]


def _leftover(layout: Layout, key: str) -> str:
    """A name that the leftovers of a tower have in every layout; the file's own for others."""
    leaf = re.fullmatch(r"(?:.+[./])?(position_ids|logit_scale)", key)
    part = next(
        (part for part in layout.parts if part.ours.startswith(("text.", "vision.")) and key.startswith(part.theirs)),
        None,
    )
    return part.ours + leaf[1] if leaf and part else key


def _reason(layout: Layout, key: str) -> str:
    return reason(layout.ignored, key) or ""


def _container(file: Weights | Folder) -> str:
    return "a diffusers folder" if isinstance(file, Folder) else _CONTAINERS[file.kind]
