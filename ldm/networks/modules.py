"""Torch's containers with the kinds of modules in them, for type checkers; when the code runs they are torch's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)

if TYPE_CHECKING:

    class Modules(nn.Module, Generic[M]):
        """A ModuleList whose modules are of one kind."""

        def __init__(self, modules: Iterable[M] = ()) -> None: ...
        def __iter__(self) -> Iterator[M]: ...
        def __len__(self) -> int: ...
        def __getitem__(self, index: int) -> M: ...
        def append(self, module: M) -> None: ...

    class Layers(nn.Module):
        """A Sequential, whose modules are of several kinds."""

        def __init__(self, *modules: nn.Module) -> None: ...
        def __iter__(self) -> Iterator[Any]: ...
        def __getitem__(self, index: int) -> Any: ...

else:
    Modules, Layers = nn.ModuleList, nn.Sequential
