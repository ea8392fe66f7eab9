"""Only the network that is running on the GPU; the others rest in the CPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion

NETWORKS = ("text", "vision", "depth", "unet", "vae")


def offload(
    models: LatentDiffusion | Sequence[LatentDiffusion], device: torch.device, networks: Collection[str] = NETWORKS
) -> Callable[[], None]:
    """Let networks rest where they are and have each brought to `device` when it runs, until another of them runs.

    models    on the CPU, not yet offloaded; of all their networks only one at a time is on `device`
    networks  which: some of NETWORKS; text towers come one by one. The others move to `device` and stay
    Returns a function that undoes it. Weights are copied and never copied back, so do not change them meanwhile.
    Results are the same bit for bit. Raises ArgumentError for a network of another name, or an offloaded model.
    """
    models = [models] if isinstance(models, LatentDiffusion) else list(models)
    if unknown := set(networks) - set(NETWORKS):
        raise ArgumentError(f"networks: {sorted(unknown)} unknown; all: {' '.join(NETWORKS)}", key="networks")
    if any(model.runs_on is not None for model in models):
        raise ArgumentError("this model is offloaded already: undo that first")
    resting: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # network: its tensors, and their values where they rest
    hooks: list[RemovableHandle] = []
    brought: nn.Module | None = None  # the network on the device

    def send_back() -> None:
        nonlocal brought
        for tensor, value in resting[brought] if brought is not None else ():
            tensor.data = value
        brought = None

    def bring(network: nn.Module) -> None:
        nonlocal brought
        if brought is network:
            return
        send_back()
        brought = network
        try:
            for tensor, value in resting[network]:
                tensor.data = _carried(value, device)
        except BaseException:
            send_back()
            raise

    def undo() -> None:
        send_back()
        for hook in hooks:
            hook.remove()
        for model in models:
            model.runs_on = None

    def watch(network: nn.Module) -> None:
        resting[network] = [(tensor, tensor.data) for tensor in (*network.parameters(), *network.buffers())]
        # all its modules, as they are called without the whole: VAE.decode calls the decoder
        hooks.extend([module.register_forward_pre_hook(lambda *_: bring(network)) for module in network.modules()])
        hooks.append(
            network.register_forward_pre_hook(lambda _, args, kwargs: _moved((args, kwargs), device), with_kwargs=True)
        )

    for model in models:
        for name in NETWORKS:
            network = getattr(model, name)
            if network is None:
                continue
            if name not in networks:
                network.to(device)
            else:
                for each in network if isinstance(network, nn.ModuleList) else [network]:
                    watch(each)
        model.runs_on = device
    return undo


def _carried(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device)


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, and those inside tuples and dicts, on the device: inputs made where a network rests come with it."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return value
