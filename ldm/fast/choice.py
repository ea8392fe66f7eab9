"""Which operations a model gets where, in a second model around the same parameters."""

from __future__ import annotations

import copy
import ctypes
import functools
import warnings
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import nn

from ldm.errors import ArgumentError
from ldm.fast import cpu, gpu, plain, vae_scale
from ldm.fast.graphs import GraphedUNet
from ldm.fast.networks import FastDecoder, FastEncoder, FastUNet
from ldm.model import LatentDiffusion
from ldm.networks import unet, vae
from ldm.networks.modules import M

Classes = Mapping[type[nn.Module], type[nn.Module]]


def optimize(model: LatentDiffusion) -> LatentDiffusion:
    """A model that computes the same function faster, around the parameters of this one; `model` itself stays as it is.

    On a CPU in float32 with the C++ of ldm/fast/cpu.cpp, compiled at first use (seconds) and kept; on CUDA with
    Triton's kernels and CUDA graphs; elsewhere in plain PyTorch, which does the work that all steps share only once.
    Results differ from `model`'s by rounding. The readable networks run where somebody looks inside or changes a part
    (hooks, another `Attend`, gradients, circular padding), after a move to another device or type (optimize again
    then), and in the VAE above 1024 x 1024, which works in strips.
    Parameters may be replaced or changed in place, as `ldm.changes.lora` does, but not through `.data` while a context
    is in use: its keys and values are kept. On CUDA convolutions and attention are chosen by measuring, so that another
    process may round otherwise, and a first picture takes the time for that and for compiling. The order in which
    weights lie in a GPU's memory may change, and on a CPU freed memory is kept for the next tensor.
    Warns where there is no compiler, or no Triton. Raises ArgumentError for a model with hooks in its UNet or VAE, such
    as an offloaded one.
    """
    ops, decoding, unet_class = _chosen(model.device, model.dtype)
    if ops is gpu:
        for network in (model.unet, model.vae):
            gpu.lay_out(network)
    made_for = model.device.type, model.dtype

    def with_ops(fast: type[nn.Module], ops: ModuleType) -> type[nn.Module]:
        return type(fast.__name__, (fast,), {"__doc__": fast.__doc__, "ops": ops, "made_for": made_for})

    classes = {
        unet.UNet: with_ops(unet_class, ops),
        vae.Decoder: with_ops(FastDecoder, decoding),
        vae.Encoder: with_ops(FastEncoder, decoding),
    }
    fast = shared(model, classes)
    for kept in ("_kept", "_graphs"):  # of a fast model that is optimised again: it has its own
        fast.unet.__dict__.pop(kept, None)
    return fast


def _chosen(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, ModuleType, type[FastUNet]]:
    """The operations of the UNet, those of the VAE, and the UNet's class."""
    if device.type == "cuda" and gpu.available(device):
        return gpu, vae_scale if dtype == torch.float16 else gpu, GraphedUNet
    if device.type == "cuda":
        what = "fast: no Triton, or a GPU before Ampere; plain PyTorch instead, which is slower; install triton"
        warnings.warn(what, stacklevel=3)
    elif device.type == "cpu":
        keep_freed()
        if dtype == torch.float32:
            if (why := cpu.missing()) is None:
                return cpu, cpu, FastUNet
            warnings.warn(f"fast: {why}; plain PyTorch instead, which is slower; install g++ or set CXX", stacklevel=3)
    return plain, plain, FastUNet


@functools.cache
def keep_freed() -> bool:
    """Have the C library keep freed memory for the next tensor, instead of returning every large tensor to the system.

    The system hands memory out in zeroed pages of 4 KB, one at a time: for the activations of a VAE that takes longer
    than the arithmetic. It holds for the whole process and until its end. Returns whether the C library can: glibc can.
    """
    trim_threshold, mmap_threshold = -1, -3  # of mallopt(3)
    least, most = 2**25, 2**31 - 1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = mallopt(mmap_threshold, most) or mallopt(mmap_threshold, least)  # some versions refuse more
    return bool(mallopt(trim_threshold, most)) and bool(kept)


def shared(network: M, classes: Classes, inside: bool = False) -> M:
    """A copy of `network` with the classes of its modules exchanged, and its very parameters and buffers in it.

    classes  {class of a module, or one that it is derived from: class in the copy}
    inside   whether the network lies in a module that is exchanged
    A change of parameters, in place or by putting others into a module, is seen on both sides. Exchanged modules, the
    modules inside of them and those that they lie in are copies; the rest is the same. Raises ArgumentError where a
    module with hooks would be copied.
    """

    def exchanged(module: nn.Module) -> type[nn.Module] | None:
        return next((classes[kind] for kind in type(module).__mro__ if kind in classes), None)

    inside = inside or exchanged(network) is not None
    if not inside and not any(map(exchanged, network.modules())):
        return network
    if inside and (network._forward_hooks or network._forward_pre_hooks):
        raise ArgumentError(
            "this model has hooks in its networks, which a faster one would not: "
            "remove them, or undo its offloading, and add them after"
        )
    twin = copy.copy(network)
    module: nn.Module = twin
    module.__class__ = exchanged(network) or type(network)
    hooks = {name: value for name, value in network.__dict__.items() if name.endswith("_hooks")}
    twin.__dict__.update({name: value.__class__() for name, value in hooks.items()})
    twin._modules = {
        name: None if child is None else shared(child, classes, inside) for name, child in network._modules.items()
    }
    return twin
