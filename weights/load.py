"""A file or folder -> `LatentDiffusion`, strictly: every key loaded, ignored for a written reason, or an error."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.config import ModelConfig
from ldm.errors import ArgumentError, FileError
from ldm.model import LatentDiffusion
from weights.blank import built
from weights.detect import detect
from weights.files import Weights, open_file
from weights.folder_config import describe
from weights.folders import Folder, is_folder, open_folder
from weights.layout import Layout, original
from weights.metadata import CONFIG_KEY
from weights.places import Place
from weights.plan import plan
from weights.prediction import STATISTIC, Finding, Prediction, require_prediction, settle, settle_by_output

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
        raise ArgumentError(f"variant: {variant[:40]!r} is one of a diffusers folder's, and {Path(path).name[-60:]} is a file; leave it out", key="variant")
    return open_file(path)


def recognise(file: Weights | Folder, config: ModelConfig | str | None = None, prediction: Prediction | None = None) -> tuple[Finding, Layout]:
    """Which model an open file or folder holds, and where its tensors lie in it. `config` and `prediction` overrule the file as in `load`.

    Reads headers and, of SD 2's text models, one small tensor. Raises FileError for what is no model of a family that this version knows.
    """
    found, layout = described(file, config)
    explicit = config is not None or CONFIG_KEY in file.metadata
    return settle(found, file.specs, file.metadata, lambda: statistic(file, layout), file.error, prediction=prediction, explicit=explicit), layout


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
        raise FileError(f"{len(files)} models ship with this installation, one is expected; name a checkpoint", path=EMBEDDED)
    return files[0]


def require_dtype(dtype: torch.dtype) -> None:
    """Refuse a type that parameters cannot have."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ArgumentError(f"dtype {dtype} cannot hold weights; use torch.float32, torch.bfloat16 or torch.float16", key="dtype")


def fill(network: nn.Module, file: Weights | Folder, layout: Layout, device: torch.device, dtype: torch.dtype, ema: bool = False) -> None:
    """Put a file's tensors in the place of all parameters of a network on the meta device, and make it ready for inference."""
    owners, wanted = {}, {}
    for path, module in network.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            ours = f"{path}.{name}" if path else name
            owners[ours], wanted[ours] = (module, name), tuple(parameter.shape)
    sources = plan(layout, wanted, {key: file.shape(key) for key in file}, file.error, ema=ema).sources
    integers = [key for place in sources.values() for key in place.keys if not file.specs[key].dtype.is_floating_point]
    if integers:
        raise file.error(f"{integers[0]} holds {file.specs[integers[0]].dtype} numbers, not floating-point ones: quantised weights are not read", integers[0])
    for ours, (module, name) in owners.items():  # load_state_dict would account for every key again, which takes longer than to read them
        tensor = _read(file, sources[ours], wanted[ours], device, dtype)
        assert tensor.shape == wanted[ours], ours
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    file.require_unchanged()
    network.eval()


def _read(file: Weights | Folder, place: Place, ours: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if place.more:
        return torch.cat([file.read(key, device, dtype) for key in place.keys])
    return place.turned(file.read(place.key, device, dtype, place.rows(file.shape(place.key))), ours)
