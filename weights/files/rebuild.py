"""What a checkpoint's pickle may describe, and the functions it names for that, carried out here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ldm.errors import FileError

STORAGES = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}  # fmt: skip
# Bytes, whose type each tensor says: how torch stores types that have no storage class.
UNTYPED = ("torch.storage", "UntypedStorage")
TYPES = {
    ("torch", str(dtype).removeprefix("torch.")): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    )
}  # fmt: skip


# Bookkeeping that published and fine-tuned checkpoints carry beside their weights: these names are accepted, and
# nothing is kept of the objects.
INERT = frozenset(
    (module, name)
    for module, names in {
        "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
        "pytorch_lightning.callbacks.lr_monitor": "LearningRateMonitor",
        "pytorch_lightning.callbacks.timer": "Timer", "pytorch_lightning.utilities.parsing": "AttributeDict",
        "lightning.pytorch.callbacks.model_checkpoint": "ModelCheckpoint",
        "lightning.pytorch.callbacks.early_stopping": "EarlyStopping",
        "lightning.pytorch.utilities.parsing": "AttributeDict",
        "lightning_fabric.utilities.data": "AttributeDict", "lightning.fabric.utilities.data": "AttributeDict",
        "omegaconf.dictconfig": "DictConfig", "omegaconf.listconfig": "ListConfig",
        "omegaconf.base": "ContainerMetadata Metadata",
        "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode",
        "typing": "Any", "argparse": "Namespace", "types": "SimpleNamespace", "numpy": "dtype ndarray",
        "numpy.core.multiarray": "scalar _reconstruct", "numpy._core.multiarray": "scalar _reconstruct",
        "numpy.core.numeric": "_frombuffer", "numpy._core.numeric": "_frombuffer",
        "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "datetime": "datetime date time timedelta timezone", "collections": "defaultdict Counter deque",
        "builtins": "set frozenset dict list tuple int float str bool bytes bytearray complex object",
        "__builtin__": "set frozenset dict list tuple int long float str unicode bool bytearray complex object",
        "torch": "Size device",
    }.items()
    for name in names.split()
)  # fmt: skip

CONTAINER_WORK = 4  # operations that an empty list or dictionary counts as, besides its own
MAX_DIMENSIONS = 64  # torch's own limit


class Reader(Protocol):
    """What reads the pickle, as far as the functions below need it."""

    def bad(self, what: str) -> FileError:
        """The error to raise about a pickle that is broken, or made to break readers."""

    def spend(self, work: int) -> None:
        """Count work."""

    def fill(self, target: dict[str, Any], keys: list[Any], values: list[Any]) -> None:
        """Put values under keys, those that are text."""


@dataclass(frozen=True)
class Storage:
    """A run of `numel` numbers, found elsewhere in the file under `key`."""

    key: str
    dtype: torch.dtype | None  # None: bytes, whose type each tensor says
    numel: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.numel * (self.dtype.itemsize if self.dtype else 1)


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor as a view of a storage; offset and strides in elements. The numbers are the file's, unchecked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Inert:
    """Stands for an object that is not weights: its type's name, nothing else."""

    type_name: str


@dataclass(frozen=True, eq=False)
class InertType(Inert):
    """Stands for the type itself, or for the function that makes the object. All objects it makes are one `Inert`."""

    instance: Inert


BYTES, SET, FROZEN_SET = Inert("bytes"), Inert("builtins.set"), Inert("builtins.frozenset")


@dataclass(frozen=True, eq=False)
class TypeName(Inert):
    """Stands for a type of numbers, which some tensors name."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class StorageType:
    """Stands for a class of storages; `dtype` is None for that of bytes without a type."""

    dtype: torch.dtype | None


@dataclass(frozen=True, eq=False)
class Builder:
    """A function or type that this code carries out itself: `make(machine, arguments)`."""

    make: Callable[[Reader, tuple], Any]


class ParameterDict(dict):
    """A torch ParameterDict, which old embeddings use: its parameters by name."""


def _ordered_dict(machine: Reader, arguments: tuple) -> dict[str, Any]:
    made: dict[str, Any] = {}
    machine.spend(CONTAINER_WORK)
    if arguments:  # Python 2 wrote the items as a list of pairs
        pairs = arguments[0]
        machine.spend(len(pairs) if type(pairs) is list else 0)
        if (
            len(arguments) != 1
            or type(pairs) is not list
            or any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs)
        ):
            raise machine.bad("a dictionary from something else than pairs")
        machine.fill(made, [pair[0] for pair in pairs], [pair[1] for pair in pairs])
    return made


def _parameter_dict(machine: Reader, arguments: tuple) -> ParameterDict:
    if arguments:
        raise machine.bad("a parameter dictionary with arguments")
    return ParameterDict()


def _tensor(machine: Reader, arguments: tuple) -> TensorRef:
    """(storage, offset, shape, stride[, requires_grad, hooks[, metadata]])"""
    if len(arguments) not in (4, 6, 7):
        raise machine.bad("a tensor with a wrong number of arguments")
    if type(arguments[0]) is not Storage or arguments[0].dtype is None:
        raise machine.bad("a tensor without a storage of numbers")
    return _view(machine, arguments, arguments[0].dtype)


def _typed_tensor(machine: Reader, arguments: tuple) -> TensorRef:
    """(storage of bytes, offset, shape, stride, requires_grad, hooks, type[, metadata]): float8 and unsigned types."""
    if len(arguments) not in (7, 8) or type(arguments[6]) is not TypeName:
        raise machine.bad("a tensor with a wrong number of arguments, or without a type")
    if type(arguments[0]) is not Storage or arguments[0].dtype is not None:
        raise machine.bad("a tensor without a storage of bytes")
    return _view(machine, arguments[:6] + arguments[7:], arguments[6].dtype)


def _view(machine: Reader, arguments: tuple, dtype: torch.dtype) -> TensorRef:
    storage, offset, shape, stride = arguments[:4]
    if type(offset) is not int or type(shape) is not tuple or type(stride) is not tuple:
        raise machine.bad("a tensor without offset, shape or stride")
    if len(shape) > MAX_DIMENSIONS or len(stride) > MAX_DIMENSIONS:
        raise machine.bad("a tensor of absurd rank")
    if any(type(n) is not int for n in shape + stride):
        raise machine.bad("a tensor whose shape is not made of whole numbers")
    if not all(map(_is_nothing, arguments[5:6])):
        raise machine.bad("a tensor with hooks, which are code")
    if not all(map(_is_nothing, arguments[6:7])):
        raise machine.bad("a tensor that is conjugated or negated in passing")
    return TensorRef(storage, offset, shape, stride, dtype)


def _is_nothing(value: Any) -> bool:
    return value is None or (type(value) is dict and not value)


def _parameter(machine: Reader, arguments: tuple) -> TensorRef:
    """(tensor, requires_grad, hooks)"""
    if len(arguments) != 3 or type(arguments[0]) is not TensorRef:
        raise machine.bad("a parameter that is not a tensor")
    if type(arguments[2]) is not dict or arguments[2]:
        raise machine.bad("a parameter with hooks, which are code")
    return arguments[0]


def _encode(machine: Reader, arguments: tuple) -> Inert:
    """Bytes in protocol 2, as text and a codec; only numpy scalars, which are bookkeeping, hold any."""
    if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] not in ("latin1", "latin-1"):
        raise machine.bad("bytes in an unusual encoding")
    return BYTES


BUILDERS = {
    ("collections", "OrderedDict"): Builder(_ordered_dict),
    ("torch._utils", "_rebuild_tensor"): Builder(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): Builder(_typed_tensor),
    ("torch._utils", "_rebuild_parameter"): Builder(_parameter),
    ("torch.nn.modules.container", "ParameterDict"): Builder(_parameter_dict),
    ("_codecs", "encode"): Builder(_encode),
}
# (module, name) -> what stands for it: all that a pickle may name.
NAMED: dict[tuple[str, str], Builder | StorageType | Inert] = {
    **{pair: InertType(".".join(pair), Inert(".".join(pair))) for pair in INERT},
    **{pair: TypeName(".".join(pair), dtype) for pair, dtype in TYPES.items()},
    **{pair: StorageType(dtype) for pair, dtype in (*STORAGES.items(), (UNTYPED, None))},
    **BUILDERS,
}
