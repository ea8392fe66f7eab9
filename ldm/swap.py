"""Exchanging modules of a network for the length of a block: `with swap(model.unet, make, where="*.attn1.attend")`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from ldm.errors import ArgumentError

Make = Callable[[str, nn.Module], nn.Module]  # (path, module) -> what takes its place, and may hold and call it
Where = str | Callable[[str, nn.Module], bool]  # a glob over paths, whose * matches dots too, or (path, module) -> bool


@contextmanager
def swap(network: nn.Module, make: Make, where: Where) -> Iterator[dict[str, nn.Module]]:
    """Modules of a network exchanged inside the block, and put back after it, also after an exception.

    Paths are those of `network.named_modules()`. Gives the new modules by path. A network that was compiled before is
    compiled anew for them; a fast one runs as the readable one. Raises ArgumentError as `exchange` does.
    """
    before = exchange(network, make, where)
    try:
        yield {path: getattr(parent, name) for path, (parent, name, _) in before.items()}
    finally:
        for parent, name, module in reversed(before.values()):
            setattr(parent, name, module)


def exchange(network: nn.Module, make: Make, where: Where) -> dict[str, tuple[nn.Module, str, nn.Module]]:
    """The same for good; gives (parent, its attribute, the module before) by path.

    Raises ArgumentError, which names the nearest paths, where no module is chosen: a misspelt path must not go
    unnoticed.
    """
    network = getattr(network, "_orig_mod", network)  # the readable one, where torch.compile was given it
    modules = dict(network.named_modules(remove_duplicate=False))
    chosen = [
        path
        for path, module in modules.items()
        if path and (fnmatchcase(path, where) if isinstance(where, str) else where(path, module))
    ]
    if not chosen:
        wanted = f"matches {where!r}" if isinstance(where, str) else "is chosen"
        near = _nearest(where, [*modules][1:]) if isinstance(where, str) else [*modules][-3:]
        raise ArgumentError(
            f"where: no module of {type(network).__name__} {wanted}; nearest: {', '.join(near)}", key="where"
        )
    made = {path: make(path, modules[path]) for path in chosen}  # all of them before any is put in: one may fail
    before = {}
    for path, module in made.items():
        parent, _, name = path.rpartition(".")
        before[path] = (modules[parent], name, modules[path])
        setattr(modules[parent], name, module)
    return before


def _nearest(where: str, paths: list[str]) -> list[str]:
    """Of the ends of paths with as many names as the glob has, those most like it."""
    end = where.removeprefix("*.")
    ends = {".".join(path.split(".")[-end.count(".") - 1 :]) for path in paths}
    return [where[: len(where) - len(end)] + near for near in get_close_matches(end, sorted(ends), cutoff=0)]
