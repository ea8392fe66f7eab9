"""A CLIP vision tower from whatever holds one: a model that is told pictures, or a CLIP."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch

from ldm.config import VisionConfig
from ldm.vision import CLIPVision
from weights import names
from weights.blank import built
from weights.detect import lookup
from weights.fields import component
from weights.files import Weights, open_file
from weights.folder_config import read_vision_config
from weights.folders import Folder, add_component
from weights.layout import ALONE, Layout, Part
from weights.load import fill, require_dtype
from weights.metadata import CONFIG_KEY, from_json
from weights.sizes import Shapes, read_vision, visible

VISUAL = "cond_stage_model.model.visual."  # where the published image-variations checkpoints have it
IN_MODEL = Layout((Part("", VISUAL, names.openai_vision),), ((r"(?!cond_stage_model\.model\.visual\.).+", "not of the vision tower, which alone was asked for"),))
IN_CLIP = Layout(
    (Part("", "", names.hugging_face_vision),), (*ALONE, (r"text_model\..+|text_projection\.weight|logit_scale", "text half of CLIP, or its temperature"))
)  # fmt: skip


def load_vision(path: str | PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> CLIPVision:
    """A CLIP vision tower with its projection, ready for inference: what `ldm.surgery.swap_conditioner` takes.

    path  an image-variations model, as one file or a diffusers folder; or a CLIP of Hugging Face, or its vision half, as a folder or a file.
          A file alone must have the sizes of ViT-L/14, or be one of ours, which says its sizes: shapes do not show heads
    Raises FileError for other sizes, or for what holds no such tower.
    """
    require_dtype(dtype)
    with _open(Path(path)) as file:
        shapes = {key: file.shape(key) for key in file}
        layout = _layout(shapes, file)
        there, config = read_vision(lookup(layout, shapes, "")), _config(file)
        if there is None:
            raise file.error("holds no whole vision tower: tensors are missing, such as visual_projection.weight; use a CLIP with its projection")
        if there != visible(config):
            raise file.error("holds a vision tower of other sizes than ViT-L/14's, or than its config says; give its folder, with the config.json that tells its heads")
        tower = built(lambda: CLIPVision(config))
        fill(tower, file, layout, torch.device(device), dtype)
    return tower


def _open(path: Path) -> Weights | Folder:
    """The file; or the folder of a CLIP, or the image encoder in a model's folder."""
    if not path.is_dir():
        return open_file(path)
    folder = Folder(path / "image_encoder" if (path / "image_encoder").is_dir() else path)
    try:
        add_component(folder, folder.path, ("model", "pytorch_model"), "")
    except BaseException:
        folder.close()
        raise
    return folder


def _layout(shapes: Shapes, file: Weights | Folder) -> Layout:
    if VISUAL + "proj" in shapes:
        return IN_MODEL
    if any(name in shapes for name in ("vision_model.embeddings.patch_embedding.weight", "embeddings.patch_embedding.weight")):
        return IN_CLIP
    raise file.error(f"holds no CLIP vision tower, it begins with {next(iter(shapes))[:40]}; use an image-variations model, or a CLIP of Hugging Face")


def _config(file: Weights | Folder) -> VisionConfig:
    """Of a folder what its config.json says, of a file of ours what its metadata say, and otherwise ViT-L/14."""
    if isinstance(file, Folder):
        return read_vision_config(component(file.path, "", "CLIP"))
    said = file.metadata.get(CONFIG_KEY)
    return (said and from_json(said).vision) or VisionConfig()
