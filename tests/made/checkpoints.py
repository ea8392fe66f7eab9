"""Seeded checkpoints, written to disk in the layouts in which models were published."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pathlib
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from benchmarks.models.published import DTYPES, manifest, original_name, seeded
from benchmarks.models.seeded import weight
from ldm.config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ldm.errors import FileError
from ldm.model import LatentDiffusion
from weights.checkpoint import Parameters
from weights.names.layout import original

TINY = ModelConfig(  # every kind of layer that SD 1 has, 2.5 million parameters
    "sd1",
    unet=UNetConfig(
        model_channels=32, channel_mult=(1, 2), num_res_blocks=1, context_dim=64, heads=4,
        down_depth=((1,), (0,)), up_depth=((0, 0), (1, 1)), cross_only=(False, False),
    ),
    vae=VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1),
    text=(TextConfig(vocab=1000, width=64, layers=3, heads=4, mlp=256),),
)  # fmt: skip

POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


def checkpoint(
    config: ModelConfig = TINY,
    *,
    dtype: torch.dtype = torch.float32,
    position_ids: Literal["I64", "F16", "F32", "wrong"] | None = "I64",
    buffers: bool = True,
    text_model: bool = True,
    ema: Literal["leftover", "full"] | None = "leftover",
) -> dict[str, Tensor]:
    """An SD 1 checkpoint of this size, as published files have it or with the damage that is seen in the wild."""
    with torch.device("meta"):
        names = {
            original_name(name): tuple(tensor.shape) for name, tensor in LatentDiffusion(config).state_dict().items()
        }
    state = seeded({key: (shape, dtype) for key, shape in names.items()})
    if position_ids:
        ids = torch.arange(config.text[0].length)[None]
        state[POSITION_IDS] = ids.flip(1) if position_ids == "wrong" else ids.to(DTYPES[position_ids])
    if buffers:
        betas = [(key, entry) for key, entry in manifest("sd1").items() if "." not in key]
        state = {**seeded(dict(betas)), **state}
    if ema:
        state["model_ema.decay"], state["model_ema.num_updates"] = (
            torch.tensor(0.9999),
            torch.tensor(470_000, dtype=torch.int32),
        )
    if ema == "full":
        state |= {
            ema_name(key): weight("ema " + key, shape).to(dtype)
            for key, shape in names.items()
            if key.startswith("model.")
        }
    if not text_model:
        state = {key.replace(".text_model.", "."): value for key, value in state.items()}
    return state


def ema_name(key: str) -> str:
    """Where the original code keeps the moving average of `key`."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


@contextlib.contextmanager
def pretended(*names: str) -> Iterator[list[type]]:
    """Classes that pickle as if they came from these packages, installed or not."""
    before = dict(sys.modules)
    classes = []
    try:
        for module, _, name in (full.rpartition(".") for full in names):
            parts = module.split(".")
            for i in range(1, len(parts) + 1):
                parent = ".".join(parts[:i])
                if parent not in sys.modules or i == len(parts):
                    sys.modules[parent] = types.ModuleType(parent)
            classes.append(type(name, (), {"__module__": module}))
            setattr(sys.modules[module], name, classes[-1])
        yield classes
    finally:
        sys.modules.clear()
        sys.modules.update(before)


class _Scalar:
    """A number that pickles as a numpy scalar does, under numpy's name of the day."""

    def __init__(self, function: type, value: float):
        self.function, self.value = function, value

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, (np.dtype("float64"), struct.pack("<d", self.value))


@contextlib.contextmanager
def lightning(state: Mapping[str, Tensor], numpy: str = "numpy.core") -> Iterator[dict[str, Any]]:
    """What PyTorch Lightning would save beside the weights: callbacks by class, numpy scalars, configs, optimiser
    states."""
    names = (
        "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        "omegaconf.dictconfig.DictConfig",
        f"{numpy}.multiarray.scalar",
    )
    with pretended(*names) as (callback, config, scalar):
        settings = config()
        settings.__dict__.update(_content={"base_learning_rate": 1e-4}, _parent=None)
        yield {
            "epoch": 3,
            "global_step": 470_000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": OrderedDict(state),
            "callbacks": {
                callback: {
                    "monitor": "val/loss_simple_ema",
                    "best_model_score": _Scalar(scalar, 0.1416),
                    "best_model_path": pathlib.PurePosixPath("logs/last.ckpt"),
                    "current_score": torch.tensor(0.15),
                }
            },
            "optimizer_states": [
                {"state": {0: {"step": 7, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
            ],
            "lr_schedulers": [],
            "hparams": argparse.Namespace(scale_lr=True),
            "config": settings,
        }


def save_zip(contents: Any, path: Path, **options: Any) -> Path:
    """A `.ckpt` as torch writes it since 1.6."""
    torch.save(contents, path, **options)
    return path


def save_stream(contents: Any, path: Path, **options: Any) -> Path:
    """A `.ckpt` as torch wrote it before 1.6."""
    torch.save(contents, path, _use_new_zipfile_serialization=False, **options)
    return path


def save_safetensors(state: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """A `.safetensors` file."""
    safetensors.torch.save_file(dict(state), path, metadata=dict(metadata) if metadata else None)
    return path


def zip_of(files: Mapping[str, bytes], top: str = "archive/") -> bytes:
    """A zip with these stored files, to build what torch would not write."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(top + name), data)
    return buffer.getvalue()


def safetensors_of(header: Any, data: bytes = b"", *, raw: bytes | None = None) -> bytes:
    """A safetensors file with this header, true or not."""
    text = raw if raw is not None else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# -- pickles that torch would not write --------------------------------------------------------------------------------


class Name:
    """A global name in a pickle."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name


class Call:
    """A name called with arguments."""

    def __init__(self, name: Name, *arguments: Any):
        self.name, self.arguments = name, arguments


class Persistent:
    """A persistent id."""

    def __init__(self, *identity: Any):
        self.identity = identity


def pickled(value: Any) -> bytes:
    """A pickle of protocol 2, without memo, of plain values and the three classes above."""
    return b"\x80\x02" + _encoded(value) + b"."


def _encoded(value: Any) -> bytes:
    if isinstance(value, Name):
        return f"c{value.module}\n{value.name}\n".encode()
    if isinstance(value, Call):
        return _encoded(value.name) + _encoded(value.arguments) + b"R"
    if isinstance(value, Persistent):
        return _encoded(value.identity) + b"Q"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return b"\x8b" + struct.pack("<i", size) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_encoded, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_encoded, value)) + b"e"
    return b"}(" + b"".join(_encoded(key) + _encoded(item) for key, item in value.items()) + b"u"


FLOAT = Name("torch", "FloatStorage")
REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
HOOKS = Call(Name("collections", "OrderedDict"))


def storage(key: str = "0", numel: Any = 6, kind: Any = FLOAT) -> Persistent:
    """A reference to a storage."""
    return Persistent("storage", kind, key, "cpu", numel)


def tensor(
    where: Any = None, offset: Any = 0, shape: Any = (2, 3), stride: Any = (3, 1), hooks: Any = HOOKS, *rest: Any
) -> Call:
    """A description of a tensor."""
    return Call(REBUILD, where if where is not None else storage(), offset, shape, stride, False, hooks, *rest)


def ckpt_of(data: bytes | Any, records: Mapping[str, bytes] | None = None, **more: bytes) -> bytes:
    """A zip checkpoint with this pickle (or a pickle of this value) and these storages; six float32 zeros are the
    default."""
    data = data if isinstance(data, bytes) else pickled(data)
    records = {"data/0": bytes(24)} if records is None else records
    return zip_of({"data.pkl": data, "version": b"3\n", **records, **more})


class Header(dict[str, tuple[int, ...]]):
    """The names and shapes of a file, without the file."""

    def shape(self, key: str) -> tuple[int, ...]:
        return self[key]

    def error(self, what: str, key: str | None = None) -> FileError:
        return FileError(what, path="x.ckpt", key=key)


def accounted(
    found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], *, ema: bool = False
) -> Parameters:
    """The parameters `wanted` in a single file with these names and shapes, every key of which is accounted for."""
    made = Parameters(file=Header(found), layout=original(found), network=lambda: wanted, ema=ema)
    made.require_whole()
    return made
