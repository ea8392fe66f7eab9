"""Which operations a model gets where."""

from __future__ import annotations

import warnings
from types import ModuleType

import torch
from torch import nn

from ldm.fast import cpu, gpu, memory, plain, vae_scale
from ldm.fast.graphs import GraphedUNet
from ldm.fast.networks import FastDecoder, FastEncoder, FastUNet
from ldm.fast.share import shared
from ldm.model import LatentDiffusion
from ldm.networks import unet, vae


def optimize(model: LatentDiffusion) -> LatentDiffusion:
    """A model that computes the same function faster, around the parameters of this one; `model` itself stays as it is.

    On a CPU in float32 with the C++ of ldm/fast/cpu.cpp, compiled at first use (seconds) and kept; on CUDA with Triton's kernels and CUDA
    graphs; elsewhere in plain PyTorch, with the work that is the same in every step done once. Results differ from `model`'s by rounding.
    Where somebody looks inside or changes a part (hooks, another `Attend`, gradients, circular padding) the readable networks run; so they do
    after a move to another device or type (call it again then), and in the VAE above 1024 x 1024, which works in strips.
    Parameters may be replaced or changed in place, as `ldm.lora` does, but not through `.data` while a context is in use: its keys and values
    are kept. On CUDA convolutions and attention are chosen by measuring, so that another process may round otherwise, and a first picture pays
    for that and for compiling. It may change the order in which weights lie in a GPU's memory, and on a CPU it keeps freed memory for the next tensor
    (`ldm.fast.memory`). Warns where there is no compiler, or no Triton. Raises ArgumentError for a model with hooks in its UNet or VAE, such
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


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `optimize` has been measured to be faster there: float32 on a CPU, with a compiler."""
    return device.type == "cpu" and dtype == torch.float32 and cpu.missing() is None


def _chosen(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, ModuleType, type[FastUNet]]:
    """The operations of the UNet, those of the VAE, and the UNet's class."""
    if device.type == "cuda" and gpu.available(device):
        return gpu, vae_scale if dtype == torch.float16 else gpu, GraphedUNet
    if device.type == "cuda":
        warnings.warn(
            "fast: no Triton, or a GPU before Ampere; plain PyTorch instead, which is slower; install triton",
            stacklevel=3,
        )
        return plain, plain, FastUNet
    ops = _on_cpu(dtype) if device.type == "cpu" else plain
    return ops, ops, FastUNet


def _on_cpu(dtype: torch.dtype) -> ModuleType:
    memory.keep_freed()
    if dtype != torch.float32:
        return plain
    if why := cpu.missing():
        warnings.warn(f"fast: {why}; plain PyTorch instead, which is slower; install g++ or set CXX", stacklevel=4)
        return plain
    return cpu
