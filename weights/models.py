"""A whole model, or one network that was published alone, from a file; and a model into one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm.config import ModelConfig, VAEConfig, VisionConfig
from ldm.errors import FileError
from ldm.model import LatentDiffusion
from ldm.networks.safety import SafetyChecker
from ldm.networks.vae import VAE
from ldm.networks.vision import CLIPVision
from weights.checkpoint import Parameters, open_any, recognise, require_dtype, vae_alone
from weights.files.folders import COMPONENTS, Folder, add_component
from weights.files.opened import Weights, open_file
from weights.files.write import pending, write
from weights.folder.read import component, read_vae_config, read_vision_config
from weights.names import original as names
from weights.names.blank import built
from weights.names.detect import lookup
from weights.names.instead import instead
from weights.names.layout import ALONE, Layout, Part, published
from weights.names.metadata import CONFIG_KEY, from_json, to_json
from weights.names.places import Place, joined
from weights.names.prediction import Prediction, marks, require_prediction, settle_by_output
from weights.names.sizes import Shapes, read_vision, visible

EMBEDDED = Path(__file__).parent / "embedded"
VISUAL = "cond_stage_model.model.visual."  # where the published image-variations checkpoints have their vision tower
SAFETY = Layout((Part("", "", names.doubled_vision),), ALONE)
IN_MODEL = Layout(
    (Part("", VISUAL, names.openai_vision),),
    ((r"(?!cond_stage_model\.model\.visual\.).+", "not of the vision tower, which alone was asked for"),),
)
IN_CLIP = Layout(
    (Part("", "", names.hugging_face_vision),),
    (*ALONE, (r"text_model\..+|text_projection\.weight|logit_scale", "text half of CLIP, or its temperature")),
)
Network = TypeVar("Network", bound=nn.Module)


# --- whole models ---------------------------------------------------------------------------------------------------


def load(
    path: str | PathLike[str] | None = None,
    config: ModelConfig | str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
    prediction: Prediction | None = None,
    variant: str | None = None,
) -> LatentDiffusion:
    """The model in a checkpoint, ready for inference: in eval mode, no gradients.

    path        .safetensors or .ckpt (zip or pre-1.6 stream), or a diffusers folder; None: the small model that ships with the package
    config      a ModelConfig or a family's name, for what the file does not tell; None: found out from the file
    dtype       of all parameters, whatever the file's: they are converted while they are read
    ema         take the moving average of the UNet where the file holds both it and the raw weights
    prediction  "eps" or "v", what the UNet predicts, where file and weights leave it open or disagree; None: found out
    variant     of a diffusers folder's weights, "fp16" or "non_ema" for example; None: the first there is in `folders.VARIANTS`
    Tensors that need no conversion are mapped from the file, so the file must not be written to while the model lives.
    Raises FileError, AmbiguousCheckpoint (pass `config` or `prediction`, as it says) or ArgumentError.
    """
    require_dtype(dtype)
    require_prediction(prediction)
    path = embedded() if path is None else path
    with open_any(path, variant) as file, file.read_ahead() as wait:
        checkpoint = recognise(file, config, prediction)
        model = built(lambda: LatentDiffusion(checkpoint.config))
        wait()
        fill(model, file, checkpoint.layout, torch.device(device), dtype, ema)
        model.config = settle_by_output(checkpoint.finding, model.unet, file.error)
        return model


def embedded() -> Path:
    """The file of the small model that ships with the package."""
    files = sorted(EMBEDDED.glob("*.safetensors"))
    if len(files) != 1:
        raise FileError(
            f"{len(files)} models ship with this installation, one is expected; name a checkpoint", path=EMBEDDED
        )
    return files[0]


def fill(
    network: nn.Module,
    file: Weights | Folder,
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    ema: bool = False,
) -> None:
    """Put a file's tensors in the place of all parameters of a network on the meta device, and make it ready for inference.

    Raises FileError unless every key of the file is loaded, or ignored for a written reason.
    """
    owners: dict[str, tuple[nn.Module, str]] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            ours = f"{path}.{name}" if path else name
            owners[ours], wanted[ours] = (module, name), tuple(parameter.shape)
    parameters = Parameters(file=file, layout=layout, network=lambda: wanted, ema=ema)
    parameters.require_whole()
    parameters.require_numbers()
    for ours, (
        module,
        name,
    ) in owners.items():  # load_state_dict would account for every key again, which takes longer than to read them
        tensor = parameters.read(ours, dtype, device, mapped=True)
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    file.require_unchanged()
    network.eval()


def original_state(model: LatentDiffusion) -> dict[str, Tensor]:
    """The model's parameters under their names in the original checkpoints of its make.

    The tensors are the model's own, except where the original stores them in another form: OpenCLIP's attention and projections.
    """
    layout = published(model.config)
    gathered: dict[str, list[tuple[Place, Tensor]]] = {}
    for name, tensor in model.state_dict().items():
        place = layout.places(name)[0]
        gathered.setdefault(place.key, []).append((place, tensor.detach()))
    return {key: joined(key, parts) for key, parts in gathered.items()}


def save(
    model: LatentDiffusion,
    path: str | PathLike[str],
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = torch.float16,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that `load` and other tools for its family read: original names, `dtype` (None: as they are), own metadata added.

    A model of zero terminal SNR also gets the marks by which other tools know one: the empty tensors v_pred and ztsnr.

    All or nothing: a temporary file in the same directory takes the place of `path` when it is complete and on the disk.
    Raises OutputError, also where `path` exists and `overwrite` is false.
    """
    tensors = {name: pending(tensor, dtype) for name, tensor in original_state(model).items()}
    tensors |= {mark: pending(torch.zeros(0)) for mark in marks(model.config)}
    return write(
        tensors, path, {"format": "pt", CONFIG_KEY: to_json(model.config), **(metadata or {})}, overwrite=overwrite
    )


# --- networks alone -------------------------------------------------------------------------------------------------


def load_vae(
    path: str | PathLike[str],
    config: VAEConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> VAE:
    """A VAE that was published alone, ready for inference.

    path    .safetensors or .ckpt with bare names, under `first_stage_model.` or with diffusers' names; or a diffusers folder of one VAE
    config  that of the model it is for. Files do not tell the scale of their latents; a folder does, and must agree
    Raises FileError for other sizes than the config's, or for what is no VAE.
    """
    require_dtype(dtype)
    with _open(path, "vae") as file:
        layout = vae_alone(file, config).layout
        if isinstance(file, Folder) and (file.path / "config.json").exists():
            stored = read_vae_config(component(file.path, "", "AutoencoderKL"), config)
            if stored != config:
                same_sizes = replace(stored, scale=config.scale) == config
                odd = (
                    f"another scale ({stored.scale})"
                    if same_sizes
                    else f"other sizes ({stored.channels}, {stored.channel_mult})"
                )
                raise file.error(f"is a VAE of {odd}, not for this model; use its own")
        return _filled(lambda: VAE(config), file, layout, device, dtype)


def load_safety(
    path: str | PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SafetyChecker:
    """The safety checker, ready for inference.

    path  .safetensors or .bin, or its diffusers folder. A file alone must have the published sizes, since shapes do not show heads
    Raises FileError for other sizes, or for what is no safety checker.
    """
    require_dtype(dtype)
    with _open(path, "safety_checker") as file:
        shapes = {key: file.shape(key) for key in file}
        if "special_care_embeds" not in shapes:
            raise file.error(instead(shapes, "a safety checker"))
        there = read_vision(lambda name: lookup(SAFETY, shapes, "")(_inside(name)))
        config = VisionConfig()
        if isinstance(file, Folder):
            config = read_vision_config(component(file.path, "", ("StableDiffusionSafetyChecker", "SafetyChecker")))
        if there != visible(config):
            raise file.error(
                "is a safety checker of other sizes than the published one's, or than its config.json says; shapes do not show heads"
            )
        return _filled(lambda: SafetyChecker(config), file, SAFETY, device, dtype)


def _inside(name: str) -> str:
    return f"vision_model.{name}" if name.startswith("vision_model.") else name


def load_vision(
    path: str | PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CLIPVision:
    """A CLIP vision tower with its projection, ready for inference: what `ldm.surgery.swap_conditioner` takes.

    path  an image-variations model, as one file or a diffusers folder; or a CLIP of Hugging Face, or its vision half, as a folder or a file.
          A file alone must have the sizes of ViT-L/14, or be one of ours, which says its sizes: shapes do not show heads
    Raises FileError for other sizes, or for what holds no such tower.
    """
    require_dtype(dtype)
    with _open(path, "image_encoder") as file:
        shapes = {key: file.shape(key) for key in file}
        layout = _layout(shapes, file)
        there, config = read_vision(lookup(layout, shapes, "")), _config(file)
        if there is None:
            raise file.error(
                "holds no whole vision tower: tensors are missing, such as visual_projection.weight; use a CLIP with its projection"
            )
        if there != visible(config):
            raise file.error(
                "holds a vision tower of other sizes than ViT-L/14's, or than its config says; give its folder, with the config.json that tells its heads"
            )
        return _filled(lambda: CLIPVision(config), file, layout, device, dtype)


def _layout(shapes: Shapes, file: Weights | Folder) -> Layout:
    if VISUAL + "proj" in shapes:
        return IN_MODEL
    if any(
        name in shapes
        for name in ("vision_model.embeddings.patch_embedding.weight", "embeddings.patch_embedding.weight")
    ):
        return IN_CLIP
    raise file.error(
        f"holds no CLIP vision tower, it begins with {next(iter(shapes))[:40]}; use an image-variations model, or a CLIP of Hugging Face"
    )


def _config(file: Weights | Folder) -> VisionConfig:
    """Of a folder what its config.json says, of a file of ours what its metadata say, and otherwise ViT-L/14."""
    if isinstance(file, Folder):
        return read_vision_config(component(file.path, "", "CLIP"))
    said = file.metadata.get(CONFIG_KEY)
    return (said and from_json(said).vision) or VisionConfig()


def _open(path: str | PathLike[str], name: str) -> Weights | Folder:
    """The file; or the folder of one component, or that component of a model's folder."""
    path = Path(path)
    if not path.is_dir():
        return open_file(path)
    inside = path / name if (path / name).is_dir() else path
    folder = Folder(inside)
    try:
        add_component(folder, inside, COMPONENTS.get(name, ("model", "pytorch_model")), "")
    except BaseException:
        folder.close()
        raise
    return folder


def _filled(
    make: Callable[[], Network], file: Weights | Folder, layout: Layout, device: torch.device | str, dtype: torch.dtype
) -> Network:
    """The network that `make` builds, with the tensors of a file."""
    network = built(make)
    fill(network, file, layout, torch.device(device), dtype)
    return network
