"""A second network around the parameters of a first."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn


def shared(network: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """A copy of `network` with its modules' classes exchanged as told, and its very parameters and buffers in it.

    What is done to parameters, in place or by putting others into a module, is seen on both sides. Modules are copies, hooks are not:
    what is put on one side stays there.
    """
    twin = copy.copy(network)
    twin.__class__ = classes.get(type(network), type(network))
    twin.__dict__.update({name: value.__class__() for name, value in network.__dict__.items() if name.endswith("_hooks")})
    twin._modules = {name: None if child is None else shared(child, classes) for name, child in network._modules.items()}
    return twin
