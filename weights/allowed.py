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
        "torch": "Size device float16 float32 float64 bfloat16 int8 int16 int32 int64 uint8 bool",
    }.items()
    for name in names.split()
)
