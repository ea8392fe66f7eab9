"""From a network that predicts eps or v at t to what samplers ask for: x0 from (x, sigma)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.conditioning.cond import Cond
from ldm.errors import MemoryLimit, NonFinite
from ldm.limits.recover import again, dtype_of, is_finite
from ldm.model import LatentDiffusion
from ldm.networks.unet import UNet
from samplers import Combine, Denoiser


def to_x0(prediction: str, x: Tensor, out: Tensor, sigma: float) -> Tensor:
    """x0 from the network's output `out` at x = x0 + sigma * eps.

    eps: x0 = x - sigma eps. v = alpha eps - sqrt(1 - alpha^2) x0 with alpha = 1 / sqrt(1 + sigma^2)
    (Salimans & Ho 2022, appendix D), so x0 = alpha^2 x - sigma alpha v.
    """
    if prediction == "eps":
        return x - sigma * out
    return x / (1 + sigma**2) - out * (sigma / math.sqrt(1 + sigma**2))


def predict_x0(model: LatentDiffusion, x: Tensor, sigma: float, cond: Cond) -> Tensor:
    """One network call: x [b, c, h, w] float32 at noise level sigma -> x0, float32. Half precision begins and ends in here.

    Where half precision overflows, or the GPU's memory does not suffice, it is done again as `predictor` says.
    Raises NonFinite and MemoryLimit.
    """
    return predictor(model)(x, sigma, cond)


def predictor(model: LatentDiffusion) -> Callable[[Tensor, float, Cond], Tensor]:
    """`predict_x0` of this model for the calls of one run, which remembers what it took to do one.

    An output with NaN or infinity in half precision: again with attention in float32, then in bfloat16 and in float32, each a copy of the
    UNet that is kept; the model stays as it is. Not enough memory on the GPU: again in halves of the batch. One warning each.
    Raises NonFinite that names the first module and the weights it comes from, and MemoryLimit.
    """
    taken: UNet | None = None  # a wider copy, once the model's own has failed
    most: int | None = None  # pictures at once, once there was no room for more
    told: tuple[Tensor, int | None, torch.dtype] | None = (
        None  # the last context, its state, and the type of the network
    )
    said: Tensor | None = None  # that context in that type: the same tensor in every step

    def in_parts(unet: UNet, inputs: Sequence[Tensor | None]) -> Tensor:
        nonlocal most
        n = len(inputs[0])
        size = n if most is None else min(n, most)
        while True:
            parts = [[None if each is None else each[i : i + size] for each in inputs] for i in range(0, n, size)]
            try:
                return torch.cat([unet(*part) for part in parts])
            except torch.OutOfMemoryError:
                pass  # what the failed call holds is free only outside of this
            torch.cuda.empty_cache()
            if size == 1:
                side = "x".join(str(cells * model.config.vae.factor) for cells in reversed(inputs[0].shape[2:]))
                raise MemoryLimit(
                    f"UNet: the GPU's memory does not suffice for {side}, one picture and condition at a time; use a smaller size, or --offload"
                )
            if most is None:
                warnings.warn(
                    f"UNet: the GPU's memory does not suffice for a batch of {size}: it is computed in parts from here on",
                    stacklevel=6,
                )
            size = most = (size + 1) // 2

    def out_of(unet: UNet, x: Tensor, sigma: float, cond: Cond) -> Tensor:
        nonlocal told, said
        dtype = dtype_of(unet)
        version = None if cond.context.is_inference() else cond.context._version  # how often it was written in place
        if told is None or told[0] is not cond.context or told[1:] != (version, dtype) or version is None:
            told = cond.context, version, dtype
            said = cond.context.to(dtype)
        x_in = x / math.sqrt(1 + sigma**2)  # unit variance, what the network was trained on
        if cond.concat is not None:
            x_in = torch.cat([x_in, cond.concat.to(x_in)], dim=1)
        t = torch.full((len(x),), model.schedule.timestep(sigma), dtype=torch.float32, device=x.device)
        y = cond.y.to(dtype) if cond.y is not None and cond.y.is_floating_point() else cond.y
        return in_parts(unet, (x_in.to(dtype), t, said, y)).float()

    @torch.no_grad()
    def predict(x: Tensor, sigma: float, cond: Cond) -> Tensor:
        nonlocal taken
        unet = model.unet if taken is None else taken
        out = out_of(unet, x, sigma, cond)
        if not is_finite(out):
            out, taken = _again(unet, lambda unet: out_of(unet, x, sigma, cond), x, sigma, cond)
        return to_x0(model.config.prediction, x, out, sigma)

    return predict


def _again(unet: UNet, run: Callable[[UNet], Tensor], x: Tensor, sigma: float, cond: Cond) -> tuple[Tensor, UNet]:
    """A finite output, and the wider copy that gave it. Raises NonFinite where there is none."""
    for what, given in (("x", x), ("the context", cond.context), ("y", cond.y), ("what is concatenated", cond.concat)):
        if given is not None and not is_finite(given):
            raise NonFinite(
                f"UNet: at sigma {sigma:.4g}, {what} has NaN or infinity before the UNet has seen it; use bfloat16 or float32, or check the weights"
            )
    out, wide, wrong, how = again(
        unet, run, lambda how, where: f"UNet: NaN or infinity at sigma {sigma:.4g} {how}, {where}"
    )
    warnings.warn(f"{wrong}; computed {how} from here on", stacklevel=5)
    return out, wide


def guided(model: LatentDiffusion, conds: Sequence[Cond], combine: Combine) -> Denoiser:
    """A `Denoiser` that asks the network for every condition `combine` needs at this noise level, in one batched call.

    conds  in the order `combine` wants them, [uncond, cond] for `cfg`; each of x's batch size
    What overflow and lack of memory have taught (see `predictor`) is remembered for as long as the denoiser lives.
    """
    predict, batches = predictor(model), {}

    def denoise(x: Tensor, sigma: float) -> Tensor:
        needed = combine.needs(sigma)
        if needed not in batches:
            batches[needed] = Cond.cat([conds[i] for i in needed])
        x0s = predict(torch.cat([x] * len(needed)), sigma, batches[needed]).chunk(len(needed))
        return combine(x0s, sigma)

    return denoise
