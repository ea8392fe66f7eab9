"""Networks without memory or numbers, for the names and shapes of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from weights.names.places import Shape

T = TypeVar("T")

_FACTORIES = frozenset(
    (
        torch.empty,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.tensor,
        torch.arange,
        torch.linspace,
        torch.rand,
        torch.randn,
    )
)
_FILLS = frozenset(("uniform_", "normal_", "fill_", "zero_"))


def built(make: Callable[[], T]) -> T:
    """What `make()` returns, on the meta device: no memory, no random numbers."""
    with _Blank():
        return make()


@lru_cache(maxsize=64)  # one conversion asks for the same networks several times, at up to a second each
def shapes(kind: Callable[[Any], nn.Module], config: Any) -> Mapping[str, Shape]:
    """{name: shape} of every parameter of `kind(config)`, such as `shapes(UNet, SDXL)`."""
    return MappingProxyType(
        {name: tuple(tensor.shape) for name, tensor in built(lambda: kind(config)).state_dict(keep_vars=True).items()}
    )


class _Blank(TorchFunctionMode):
    """Tensors made inside are on the meta device, and get no initial values.

    There is nothing to fill there, and the attempt makes torch import its compiler: a second and 150 MB. One mode for
    both, since every call of torch passes through each: beside `torch.device("meta")` building SD 1's 1200 modules
    takes a sixth longer.
    """

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function in _FACTORIES and kwargs.get("device") is None:
            return function(*args, **{**kwargs, "device": "meta"})
        if getattr(function, "__module__", None) == "torch.nn.init" or getattr(function, "__name__", "") in _FILLS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)
