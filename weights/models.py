"""A whole model from a file or folder."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import nn

from ldm.config import ModelConfig
from ldm.errors import FileError
from ldm.model import LatentDiffusion
from weights.checkpoint import Parameters, open_any, recognise, require_dtype
from weights.files.opened import Tensors
from weights.names.blank import built
from weights.names.layout import Layout
from weights.names.prediction import Prediction, require_prediction

EMBEDDED = Path(__file__).parent / "embedded"


def load(
    path: str | PathLike[str] | None = None, config: ModelConfig | str | None = None, *,
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, ema: bool = False,
    prediction: Prediction | None = None, variant: str | None = None,
) -> LatentDiffusion:  # fmt: skip
    """The model in a checkpoint, ready for inference: in eval mode, no gradients.

    path        .safetensors or .ckpt (zip or pre-1.6 stream), or a diffusers folder; None: the model that ships with us
    config      a ModelConfig or a family's name, for what the file does not tell; None: found out from the file
    dtype       of all parameters, whatever the file's: they are converted while they are read
    ema         take the moving average of the UNet where the file holds both it and the raw weights
    prediction  "eps" or "v", what the UNet predicts, where file and weights leave it open or disagree; None: found out
    variant     of a diffusers folder's weights, "fp16" or "non_ema" for example; None: the first in `folders.VARIANTS`
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
        if checkpoint.finding.doubt is not None:
            from weights.names.probe import settle_by_output  # which few files need

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
    file: Tensors,
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    ema: bool = False,
) -> None:
    """Put a file's tensors in the place of all parameters of a network on the meta device, ready for inference.

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
    # load_state_dict would account for every key again, which takes longer than to read them.
    for ours, (module, name) in owners.items():
        tensor = parameters.read(ours, dtype, device, mapped=True)
        assert tensor.shape == wanted[ours], ours
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    file.require_unchanged()
    network.eval()
