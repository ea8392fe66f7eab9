"""A second network around the parameters of a first."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from ldm.errors import ArgumentError


def shared(network: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """A copy of `network` with the classes of its modules exchanged as told, and its very parameters and buffers in it.

    What is done to parameters, in place or by putting others into a module, is seen on both sides. Modules that are exchanged, what lies
    inside of them and what they lie in are copies; the rest is the same. What is copied may have no hooks: raises ArgumentError.
    """
    return _copy(network, classes, inside=False)


def _copy(network: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]], inside: bool) -> nn.Module:
    def exchanged(module: nn.Module) -> type[nn.Module] | None:
        return next((classes[kind] for kind in type(module).__mro__ if kind in classes), None)

    inside = inside or exchanged(network) is not None
    if not inside and not any(map(exchanged, network.modules())):
        return network
    if inside and (network._forward_hooks or network._forward_pre_hooks):
        raise ArgumentError(
            "this model has hooks in its networks, which a faster one would not: remove them, or undo its offloading, and add them after"
        )
    twin = copy.copy(network)
    twin.__class__ = exchanged(network) or type(network)
    twin.__dict__.update(
        {name: value.__class__() for name, value in network.__dict__.items() if name.endswith("_hooks")}
    )
    twin._modules = {
        name: None if child is None else _copy(child, classes, inside) for name, child in network._modules.items()
    }
    return twin
