"""The tensors of a file or folder under the names of `LatentDiffusion`, whatever its layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ldm.config import FAMILIES, DepthConfig, ModelConfig
from ldm.networks.clip import CLIPText
from ldm.networks.dpt import DPT
from ldm.networks.unet import UNet
from ldm.networks.vae import VAE
from ldm.networks.vision import CLIPVision
from weights.checkpoint import Parameters, network_of, read
from weights.files.folders import Folder
from weights.files.opened import Tensors, Weights
from weights.names import blank
from weights.names import places as names
from weights.names.detect import Shown, shown_in_file, unread
from weights.names.diffusers import in_diffusers_unet, in_diffusers_vae, read_diffusers_unet, read_diffusers_vae
from weights.names.family import REFUSED, UNKNOWN, family, family_title, title_of
from weights.names.folders import bare, diffusers, shown_in_folder
from weights.names.instead import kind_of
from weights.names.layout import ALONE, Layout, Part, original, reason
from weights.names.places import Place, Shape
from weights.names.sizes import UNET, Shapes, read_unet, read_vae

AVERAGE = "moving average of the weights"
UNREAD = "part of a text tower after the last block that is read"
NETWORKS = ("unet", "vae", "text", "vision", "depth")  # components that are networks, without their numbers

_CONTAINERS = {
    "safetensors": "a .safetensors file",
    "zip": "a torch checkpoint",
    "stream": "a torch checkpoint of the kind before 1.6",
}
_OWN = (  # pattern of a key, component: where names are the file's own
    (r"model_ema\.", "ema"), (r"model\.diffusion_model\.|unet/", "unet"), (r"first_stage_model\.|vae/", "vae"),
    (r"depth_model\.|depth_estimator/", "depth"),
    (r"cond_stage_model\.|conditioner\.embedders\.0\.|text_encoder/", "text.0"),
    (r"conditioner\.embedders\.1\.|text_encoder_2/", "text.1"),
    (r"(base_model\.model\.)?(lora_unet_|unet\.)", "unet"), (r"(base_model\.model\.)?(lora_te2_|text_encoder_2\.)",
    "text.1"),
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

    file: Tensors
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
        return read(self.file, entry.place, entry.shape)


def is_network(component: str) -> bool:
    """Is this component a network, and no leftover?"""
    return component.partition(".")[0] in NETWORKS


def by_parameters(file: Tensors, config: ModelConfig | str | None = None) -> Side | None:
    """The tensors by our names; None where the file has no network of a known make.

    Names follow the structure that shapes show, so models of any width will do. `config` tells the structure where
    shapes do not: of a model that lacks tensors. What is no parameter of a network keeps the file's name, except the
    position ids and temperatures that every layout has in a place of its own.
    """
    shapes = {key: file.shape(key) for key in file}
    known = FAMILIES[config] if isinstance(config, str) else config
    if isinstance(file, Folder) or any(key.startswith(UNET) for key in shapes):
        found = _model(shapes, isinstance(file, Folder), known)
    else:
        found = _alone(shapes)
    return None if found is None else Side(file, found.title, _container(file), _entries(file, found), ours=True)


def by_keys(file: Tensors, title: str | None = None) -> Side:
    """The tensors by the file's own names; what the file is, is found out where no title says it."""
    owners = {key: next((name for pattern, name in _OWN if re.match(pattern, key)), "other") for key in file}
    entries = {key: _entry(file, component, Place(key), "") for key, component in owners.items()}
    if title is None:
        kind = kind_of({key: file.shape(key) for key in file})
        model = isinstance(file, Folder) or (kind is not None and kind.what == "model")
        title = REFUSED[UNKNOWN] if model else "a file of weights" if kind is None else kind.title
    return Side(file, title, _container(file), entries, ours=False)


@dataclass(frozen=True)
class _Networks:
    """The networks that a file may have, by what its shapes show."""

    title: str
    layout: Layout
    sizes: Mapping[
        str, tuple[Callable[..., nn.Module], object]
    ]  # prefix of our names -> how the network is built, its config
    family: ModelConfig | None = None  # of a published family, which may lack what it does not read

    def parameters(self) -> dict[str, Shape]:
        """Our names of all parameters of those networks that the layout has a place for."""
        parts = [part.ours for part in self.layout.parts if part.ours in self.sizes]
        return {ours + name: shape for ours in parts for name, shape in blank.shapes(*self.sizes[ours]).items()}


def _model(shapes: Shapes, is_folder: bool, known: ModelConfig | None) -> _Networks | None:
    """The networks of a whole model; None: without a `config` that is `known` its structure cannot be told."""
    folders = {key.split("/")[0] for key in shapes} if is_folder else set()
    layout = bare(folders) if is_folder else original(shapes)
    there = shown_in_folder(shapes) if is_folder else shown_in_file(shapes, layout)
    depth = DepthConfig() if known is None else known.depth
    if known is not None:
        sizes: Shown | ModelConfig = known
        layout = diffusers(known, folders) if is_folder else layout
    elif there.unet is None or (is_folder and there.vae is None):
        return None
    else:
        sizes = there
        if is_folder and there.vae is not None:
            layout = diffusers(replace(FAMILIES["sd1"], unet=there.unet, vae=there.vae, depth=depth), folders)
    networks: dict[str, tuple[Callable[..., nn.Module], object]] = {
        "unet.": (UNet, sizes.unet),
        "vae.": (VAE, sizes.vae),
        "vision.": (CLIPVision, sizes.vision),
        "depth.": (DPT, depth),
        **{f"text.{i}.": (CLIPText, tower) for i, tower in enumerate(sizes.text)},
    }
    networks = {ours: network for ours, network in networks.items() if network[1] is not None}
    if known is not None and there.unet is None:
        return _Networks(family_title(known), layout, networks, FAMILIES.get(known.name))
    name = family(there.unet, there.vision is not None, shapes)
    return _Networks(title_of(name), layout, networks, FAMILIES.get(name))


def _alone(shapes: Shapes) -> _Networks | None:
    """A VAE or a UNet that comes alone, under its own names or diffusers'."""
    for prefix in ("", "first_stage_model."):
        vae, theirs = read_vae(shapes, prefix), read_diffusers_vae(shapes, prefix)
        if vae is not None and vae.channel_mult:  # none: its blocks have other names
            return _Networks("a VAE", _one("vae.", prefix, names.vae), {"vae.": (VAE, vae)})
        if theirs is not None and theirs.channel_mult:
            return _Networks("a VAE", _one("vae.", prefix, in_diffusers_vae(theirs)), {"vae.": (VAE, theirs)})
    if (unet := read_unet(shapes, "")) is not None:
        return _Networks("a UNet", _one("unet.", "", names.same), {"unet.": (UNet, unet)})
    if (unet := read_diffusers_unet(shapes, "")) is not None:
        return _Networks("a UNet", _one("unet.", "", in_diffusers_unet(unet)), {"unet.": (UNet, unet)})
    return None


def _one(ours: str, theirs: str, places: names.Places) -> Layout:
    return Layout((Part(ours, theirs, places),), ALONE)


def _entries(file: Tensors, found: _Networks) -> dict[str, Entry]:
    """Every tensor of a file: parameters and their moving averages by our names, others by those that layouts share."""
    parameters = Parameters(file=file, layout=found.layout, network=found.parameters)
    entries: dict[str, Entry] = {}
    used: set[str] = set()
    for ours, place in parameters.places.items():
        if not all(_usable(place, file.shape(key)) for key in place.keys):
            continue
        why = UNREAD if found.family is not None and unread(ours, found.family) else ""
        if not why and ours.startswith("text."):
            why = reason(found.layout.ignored, place.key) or ""
        entries[ours] = _entry(file, network_of(ours).rstrip("."), place, why)
        used.update(place.keys)
        if ours in parameters.averages:
            average = parameters.averages[ours]
            entries[f"ema.{ours}"] = _entry(file, "ema", Place(average), AVERAGE)
            used.add(average)
    for key in file:
        if key not in used:
            name = _leftover(found.layout, key)
            why = reason(found.layout.ignored, key) or ""
            entries[name if name not in entries else f"other/{key}"] = _entry(file, "other", Place(key), why)
    return entries


def _usable(place: Place, stored: Shape) -> bool:
    """Can this place be read from a tensor of this shape? Which shape it should have, the comparison says."""
    if place.how in ("q", "k", "v"):
        return len(stored) > 0 and stored[0] % 3 == 0
    return len(stored) == 2 if place.how == "transposed" else len(stored) > 0 or not place.more


def _entry(file: Tensors, component: str, place: Place, reason: str) -> Entry:
    shape = place.ours(file.shape(place.key))
    if place.more:
        shape = (sum(file.shape(key)[0] for key in place.keys), *shape[1:])
    if place.how == "kernel" and shape[2:] == (1, 1):
        shape = shape[:2]
    return Entry(component, place, file.specs[place.key].dtype, shape, reason)


def _leftover(layout: Layout, key: str) -> str:
    """A name that the leftovers of a tower have in every layout; the file's own for others."""
    leaf = re.fullmatch(r"(?:.+[./])?(position_ids|logit_scale)", key)
    part = next(
        (part for part in layout.parts if part.ours.startswith(("text.", "vision.")) and key.startswith(part.theirs)),
        None,
    )
    return part.ours + leaf[1] if leaf and part else key


def _container(file: Tensors) -> str:
    return _CONTAINERS[file.kind] if isinstance(file, Weights) else "a diffusers folder"
