"""The names that a checkpoint's pickle may contain, by exact (module, name) pairs."""

from __future__ import annotations

import torch

STORAGES = {
    ("torch", f"{name}Storage"): dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
        "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    }.items()
}  # fmt: skip

UNTYPED = ("torch.storage", "UntypedStorage")  # bytes, whose type each tensor says: how torch stores types that have no storage class
TYPES = {
    ("torch", str(dtype).removeprefix("torch.")): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    )
}  # fmt: skip

# Bookkeeping that published and fine-tuned checkpoints carry beside their weights: accepted by name, kept as nothing.
INERT = frozenset(
    (module, name)
    for module, names in {
        "pytorch_lightning.callbacks.model_checkpoint": "ModelCheckpoint",
        "pytorch_lightning.callbacks.early_stopping": "EarlyStopping",
        "pytorch_lightning.callbacks.lr_monitor": "LearningRateMonitor",
        "pytorch_lightning.callbacks.timer": "Timer",
        "pytorch_lightning.utilities.parsing": "AttributeDict",
        "lightning.pytorch.callbacks.model_checkpoint": "ModelCheckpoint",
        "lightning.pytorch.callbacks.early_stopping": "EarlyStopping",
        "lightning.pytorch.utilities.parsing": "AttributeDict",
        "lightning_fabric.utilities.data": "AttributeDict",
        "lightning.fabric.utilities.data": "AttributeDict",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.base": "ContainerMetadata Metadata",
        "omegaconf.nodes": "AnyNode StringNode IntegerNode FloatNode BooleanNode",
        "typing": "Any",
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "scalar _reconstruct",
        "numpy._core.multiarray": "scalar _reconstruct",
        "numpy.core.numeric": "_frombuffer",
        "numpy._core.numeric": "_frombuffer",
        "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
        "datetime": "datetime date time timedelta timezone",
        "collections": "defaultdict Counter deque",
        "builtins": "set frozenset dict list tuple int float str bool bytes bytearray complex object",
        "__builtin__": "set frozenset dict list tuple int long float str unicode bool bytearray complex object",
        "torch": "Size device",
    }.items()
    for name in names.split()
)
