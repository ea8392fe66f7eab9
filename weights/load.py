"""A file -> `LatentDiffusion`, strictly: every key loaded, ignored for a written reason, or an error."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ldm.config import ModelConfig
from ldm.errors import ArgumentError, FileError
from ldm.model import LatentDiffusion
from weights import names
from weights.detect import detect
from weights.files import Weights, open_file
from weights.layout import SD1, plan

EMBEDDED = Path(__file__).parent / "embedded"


def load(
    path: str | PathLike[str] | None = None,
    config: ModelConfig | str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ema: bool = False,
) -> LatentDiffusion:
    """The model in a checkpoint, ready for inference: in eval mode, no gradients.

    path    .safetensors or .ckpt (zip or pre-1.6 stream); None: the small model that ships with the package
    config  a ModelConfig or a family's name, for what the file does not tell; None: found out from the file
    dtype   of all parameters, whatever the file's: they are converted while they are read
    ema     take the moving average of the UNet where the file holds both it and the raw weights
    Tensors that need no conversion are mapped from the file, so the file must not be written to while the model lives.
    Raises FileError, AmbiguousCheckpoint (pass `config`) or ArgumentError.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ArgumentError(f"dtype {dtype} cannot hold weights; use torch.float32, torch.bfloat16 or torch.float16", key="dtype")
    with open_file(embedded() if path is None else path) as file:
        return _load(file, config, torch.device(device), dtype, ema)


def embedded() -> Path:
    """The file of the small model that ships with the package."""
    files = sorted(EMBEDDED.glob("*.safetensors"))
    if len(files) != 1:
        raise FileError(f"{len(files)} models ship with this installation, one is expected; name a checkpoint", path=EMBEDDED)
    return files[0]


def _load(file: Weights, config: ModelConfig | str | None, device: torch.device, dtype: torch.dtype, ema: bool) -> LatentDiffusion:
    shapes = {key: file.shape(key) for key in file}
    found = detect({names.canonical(key): shape for key, shape in shapes.items()}, file.metadata, config, file.source.path)
    with torch.device("meta"), _Uninitialised():  # no memory, no random numbers: every parameter is replaced below
        model = LatentDiffusion(found)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources = plan(SD1, wanted, shapes, file.error, ema=ema).sources
    integers = [key for key in sources.values() if not file.specs[key].dtype.is_floating_point]
    if integers:
        raise file.error(f"{integers[0]} holds {file.specs[integers[0]].dtype} numbers, not floating-point ones: quantised weights are not read", integers[0])
    state = {name: file.read(key, device, dtype) for name, key in sources.items()}
    model.load_state_dict(state, strict=True, assign=True)
    file.source.require_unchanged()
    return model.requires_grad_(False).eval()


class _Uninitialised(TorchFunctionMode):
    """Modules built inside get no initial values.

    On the meta device there is nothing to fill, and the attempt makes torch import its compiler: a second and 150 MB.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init" or getattr(function, "__name__", "") in ("uniform_", "normal_", "fill_", "zero_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)
