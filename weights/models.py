"""A file or folder -> `LatentDiffusion`, strictly: every key loaded, ignored for a written reason, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config import ModelConfig, VAEConfig, VisionConfig
from ldm.errors import ArgumentError, FileError
from ldm.model import LatentDiffusion
from ldm.networks.safety import SafetyChecker
from ldm.networks.vae import VAE
from ldm.networks.vision import CLIPVision
from weights.files.folders import Folder, add_component, is_folder, open_folder
from weights.files.opened import Weights, open_file
from weights.files.write import pending, write
from weights.folder.read import component, describe, read_vae_config, read_vision_config
from weights.names import diffusers as diffusers_names
from weights.names import original as names
from weights.names.blank import built
from weights.names.detect import detect, lookup, not_a_model
from weights.names.layout import ALONE, Layout, Part, original, published
from weights.names.metadata import CONFIG_KEY, from_json, to_json
from weights.names.places import Place, Shape
from weights.names.prediction import STATISTIC, Finding, Prediction, marks, require_prediction, settle, settle_by_output
from weights.names.sizes import UNET, Shapes, read_vision, visible
from weights.plan import plan

EMBEDDED = Path(__file__).parent / "embedded"


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
        finding, layout = recognise(file, config, prediction)
        model = built(lambda: LatentDiffusion(finding.config))
        wait()
        fill(model, file, layout, torch.device(device), dtype, ema)
        model.config = settle_by_output(finding, model.unet, file.error)
        return model


def open_any(path: str | PathLike[str], variant: str | None = None) -> Weights | Folder:
    """A file of weights, or a diffusers folder with the weights of one `variant`. Raises FileError; ArgumentError for a variant of a file."""
    if is_folder(path):
        return open_folder(path, variant)
    if variant is not None:
        raise ArgumentError(
            f"variant: {variant[:40]!r} is one of a diffusers folder's, and {Path(path).name[-60:]} is a file; leave it out",
            key="variant",
        )
    return open_file(path)


def recognise(
    file: Weights | Folder, config: ModelConfig | str | None = None, prediction: Prediction | None = None
) -> tuple[Finding, Layout]:
    """Which model an open file or folder holds, and where its tensors lie in it. `config` and `prediction` overrule the file as in `load`.

    Reads headers and, of SD 2's text models, one small tensor. Raises FileError for what is no model of a family that this version knows.
    """
    found, layout = described(file, config)
    explicit = config is not None or CONFIG_KEY in file.metadata
    return settle(
        found,
        file.specs,
        file.metadata,
        lambda: statistic(file, layout),
        file.error,
        prediction=prediction,
        explicit=explicit,
    ), layout


def described(file: Weights | Folder, config: ModelConfig | str | None = None) -> tuple[ModelConfig, Layout]:
    """The same, what the network predicts aside: from headers alone."""
    if isinstance(file, Folder):
        return describe(file, config)
    shapes = {key: file.shape(key) for key in file}
    return detect(shapes, file.metadata, config, file.path), original(shapes)


def statistic(file: Weights | Folder, layout: Layout) -> Tensor | None:
    """The tensor that tells SD 2's two kinds apart; None where it is not in the file."""
    return next((file[place.key] for place in layout.places(STATISTIC) if place.key in file), None)


def embedded() -> Path:
    """The file of the small model that ships with the package."""
    files = sorted(EMBEDDED.glob("*.safetensors"))
    if len(files) != 1:
        raise FileError(
            f"{len(files)} models ship with this installation, one is expected; name a checkpoint", path=EMBEDDED
        )
    return files[0]


def require_dtype(dtype: torch.dtype) -> None:
    """Refuse a type that parameters cannot have."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ArgumentError(
            f"dtype {dtype} cannot hold weights; use torch.float32, torch.bfloat16 or torch.float16", key="dtype"
        )


def fill(
    network: nn.Module,
    file: Weights | Folder,
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    ema: bool = False,
) -> None:
    """Put a file's tensors in the place of all parameters of a network on the meta device, and make it ready for inference."""
    owners, wanted = {}, {}
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            ours = f"{path}.{name}" if path else name
            owners[ours], wanted[ours] = (module, name), tuple(parameter.shape)
    sources = plan(layout, wanted, {key: file.shape(key) for key in file}, file.error, ema=ema).sources
    integers = [key for place in sources.values() for key in place.keys if not file.specs[key].dtype.is_floating_point]
    if integers:
        raise file.error(
            f"{integers[0]} holds {file.specs[integers[0]].dtype} numbers, not floating-point ones: quantised weights are not read",
            integers[0],
        )
    for ours, (
        module,
        name,
    ) in owners.items():  # load_state_dict would account for every key again, which takes longer than to read them
        tensor = _read(file, sources[ours], wanted[ours], device, dtype)
        assert tensor.shape == wanted[ours], ours
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    file.require_unchanged()
    network.eval()


def _read(
    file: Weights | Folder, place: Place, ours: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    if place.more:
        return torch.cat([file.read(key, device, dtype) for key in place.keys])
    return place.turned(file.read(place.key, device, dtype, place.rows(file.shape(place.key))), ours)


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
        shapes = {key: file.shape(key) for key in file}
        layout = vae_layout(shapes, config, file)
        if isinstance(file, Folder) and (file.path / "config.json").exists():
            told = read_vae_config(component(file.path, "", "AutoencoderKL"), config)
            if told != config:
                odd = (
                    f"another scale ({told.scale})"
                    if replace(told, scale=config.scale) == config
                    else f"other sizes ({told.channels}, {told.channel_mult})"
                )
                raise file.error(f"is a VAE of {odd}, not for this model; use its own")
        vae = built(lambda: VAE(config))
        fill(vae, file, layout, torch.device(device), dtype)
    return vae


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
            raise file.error(_other(shapes, "a safety checker"))
        layout = Layout((Part("", "", names.doubled_vision),), ALONE)
        there = read_vision(
            lambda name: next((shapes[p.key] for p in names.doubled_vision(_inside(name)) if p.key in shapes), None)
        )
        config = VisionConfig()
        if isinstance(file, Folder):
            config = read_vision_config(component(file.path, "", ("StableDiffusionSafetyChecker", "SafetyChecker")))
        if there != visible(config):
            raise file.error(
                "is a safety checker of other sizes than the published one's, or than its config.json says; shapes do not show heads"
            )
        checker = built(lambda: SafetyChecker(config))
        fill(checker, file, layout, torch.device(device), dtype)
    return checker


def _inside(name: str) -> str:
    return f"vision_model.{name}" if name.startswith("vision_model.") else name


def _open(path: str | PathLike[str], name: str) -> Weights | Folder:
    """The file; or the folder of one component, or that component of a model's folder."""
    path = Path(path)
    if not path.is_dir():
        return open_file(path)
    inside = path / name if (path / name).is_dir() else path
    folder = Folder(inside)
    try:
        add_component(
            folder, inside, ("diffusion_pytorch_model",) * 2 if name == "vae" else ("model", "pytorch_model"), ""
        )
    except BaseException:
        folder.close()
        raise
    return folder


def vae_layout(shapes: Mapping[str, Shape], config: VAEConfig, file: Weights | Folder) -> Layout:
    """Whose names the VAE has."""
    for prefix in () if f"{UNET}input_blocks.0.0.weight" in shapes else ("", "first_stage_model."):
        if f"{prefix}encoder.down.0.block.0.conv1.weight" in shapes:
            return Layout((Part("", prefix, names.vae),), ALONE)
        if f"{prefix}encoder.down_blocks.0.resnets.0.conv1.weight" in shapes:
            return Layout((Part("", prefix, diffusers_names.in_diffusers_vae(config)),), ALONE)
    raise file.error(_other(shapes, "a VAE"))


def _other(shapes: Mapping[str, Shape], wanted: str) -> str:
    """What a file is instead of the network that is wanted."""
    if f"{UNET}input_blocks.0.0.weight" in shapes:
        return f"is a whole model, not {wanted}; give it as the model"
    what = not_a_model(shapes).split(", not a model")[0].split(";")[0]
    return (
        f"begins with {next(iter(shapes))[:40]}: that is not {wanted}"
        if what.startswith("has no UNet")
        else f"{what}, not {wanted}"
    )


VISUAL = "cond_stage_model.model.visual."  # where the published image-variations checkpoints have it
IN_MODEL = Layout(
    (Part("", VISUAL, names.openai_vision),),
    ((r"(?!cond_stage_model\.model\.visual\.).+", "not of the vision tower, which alone was asked for"),),
)
IN_CLIP = Layout(
    (Part("", "", names.hugging_face_vision),), (*ALONE, (r"text_model\..+|text_projection\.weight|logit_scale", "text half of CLIP, or its temperature"))
)  # fmt: skip


def load_vision(
    path: str | PathLike[str], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CLIPVision:
    """A CLIP vision tower with its projection, ready for inference: what `ldm.surgery.swap_conditioner` takes.

    path  an image-variations model, as one file or a diffusers folder; or a CLIP of Hugging Face, or its vision half, as a folder or a file.
          A file alone must have the sizes of ViT-L/14, or be one of ours, which says its sizes: shapes do not show heads
    Raises FileError for other sizes, or for what holds no such tower.
    """
    require_dtype(dtype)
    with _open_vision(Path(path)) as file:
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
        tower = built(lambda: CLIPVision(config))
        fill(tower, file, layout, torch.device(device), dtype)
    return tower


def _open_vision(path: Path) -> Weights | Folder:
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


def original_state(model: LatentDiffusion) -> dict[str, Tensor]:
    """The model's parameters under their names in the original checkpoints of its make.

    The tensors are the model's own, except where the original stores them in another form: OpenCLIP's attention and projections.
    """
    layout = published(model.config)
    gathered: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        place = layout.places(name)[0]
        gathered.setdefault(place.key, {})[place.how] = tensor.detach()
    return {key: _stored(parts) for key, parts in gathered.items()}


def _stored(parts: dict[str, Tensor]) -> Tensor:
    if "q" in parts:
        return torch.cat([parts[how] for how in ("q", "k", "v")])
    ((how, tensor),) = parts.items()
    return tensor.T.contiguous() if how == "transposed" else tensor


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
