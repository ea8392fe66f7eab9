"""The floor of a cell's time: its FLOPs, done directly, at the rate that this machine was seen to reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.sides.cells import Cell, inputs
from ldm.config import ModelConfig
from ldm.networks.clip import CLIPText
from ldm.networks.unet import UNet
from ldm.networks.vae import VAE
from weights.names.blank import built

TRIALS = 5  # the best counts


@lru_cache(maxsize=256)
def flops(config: ModelConfig, cell: Cell) -> int:
    """Floating-point operations of a cell's matrix products and convolutions, a multiplication and an addition as two.

    A picture is its text, `steps` guided steps and its decoding. What is the same in every step (keys and values of the
    prompt) counts every time, and convolutions count as the plain networks do them. A side that does less (Winograd's
    transform, what is the same for both prompts) may take less time than the floor.
    """
    if cell.stage == "picture":
        step, *once = (Cell(stage, cell.batch, cell.size) for stage in ("step", "text", "decode"))
        return cell.steps * flops(config, step) + sum(flops(config, each) for each in once)
    given = inputs(config, cell, "meta", torch.float32)
    if cell.stage == "text":
        towers = [built(partial(CLIPText, tower)) for tower in config.text]
        return sum(_counted(tower, ids) for tower, ids in zip(towers, given.ids, strict=True))
    if cell.stage == "decode":
        return _counted(built(partial(VAE, config.vae)).decode, given.latent)
    y = None if config.unet.vector_dim is None else torch.empty(2 * cell.batch, config.unet.vector_dim, device="meta")
    return _counted(built(partial(UNet, config.unet)), given.x, given.t, given.context, y)


@torch.no_grad()
def _counted(call: Callable[..., object], *given: Tensor | None) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*given)
    return counter.get_total_flops()


@torch.no_grad()
def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of large products and convolutions in this type: what the machine reaches, whichever library does it.

    The same product is timed as a matrix product and as a 1x1 convolution, which on a CPU are done by different
    libraries. Sizes grow while they take less than a quarter of a second: types that a processor does not have can be a
    hundred times as slow.
    """
    found: dict[str, float] = {}
    for cells in (128, 256) if device.startswith("cuda") else (8, 16, 32, 64):
        slowest = 0.0
        for name, call, count in _operations(device, dtype, cells):
            seconds = _best(call, device)
            found[name] = max(found.get(name, 0.0), count / seconds)
            slowest = max(slowest, seconds)
        if slowest > 0.25:
            break
    return found


def _operations(device: str, dtype: torch.dtype, cells: int) -> list[tuple[str, Callable[[], Tensor], int]]:
    """(name, operation, its FLOPs): on 2 pictures of cells x cells x 320, and on a matrix as large."""
    channels, pixels, side = 320, 2 * cells**2, 32 * cells
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(2, channels, cells, cells, device=device, dtype=dtype)
    kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    wide = torch.randn(4 * channels, channels, 1, 1, device=device, dtype=dtype)
    x_last, kernel_last, wide_last = (each.to(memory_format=torch.channels_last) for each in (x, kernel, wide))
    count = 2 * pixels * 9 * channels**2
    return [
        ("matrix product", lambda: a @ b, 2 * side**3),
        ("1x1 convolution", lambda: F.conv2d(x_last, wide_last), 2 * pixels * 4 * channels**2),
        ("3x3 convolution", lambda: F.conv2d(x, kernel, padding=1), count),
        ("3x3 convolution, channels last", lambda: F.conv2d(x_last, kernel_last, padding=1), count),
    ]


def _best(call: Callable[[], object], device: str) -> float:
    call()
    seconds = []
    for _ in range(TRIALS):
        _wait(device)
        begun = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak(device: str, dtype: torch.dtype) -> dict[str, object]:
    """{rates: {type: {operation: FLOP/s}}, best: FLOP/s}. float32 counts for half precision too, if it is faster."""
    kinds = dict.fromkeys((torch.float32, dtype))
    found = {str(each).removeprefix("torch."): rates(device, each) for each in kinds}
    return {"rates": found, "best": max(rate for each in found.values() for rate in each.values())}
