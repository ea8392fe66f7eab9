"""From a network that predicts eps or v at t to what samplers ask for: x0 from (x, sigma)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning.cond import Cond
from ldm.limits.recover import Inputs, Recovery, recovered
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


@torch.no_grad()
def predict_x0(model: LatentDiffusion, x: Tensor, sigma: float, cond: Cond, recovery: Recovery | None = None) -> Tensor:
    """One network call: x [b, c, h, w] float32 at noise level sigma -> x0, float32.

    Where half precision overflows, or the GPU's memory does not suffice, it is computed in another way, with a warning
    (`ldm.limits.recover`); `recovery` remembers that way for the next calls. Raises NonFinite and MemoryLimit.
    """
    x_in = x / math.sqrt(1 + sigma**2)  # unit variance, what the network was trained on
    if cond.concat is not None:
        x_in = torch.cat([x_in, cond.concat.to(x_in)], dim=1)
    t = torch.full((len(x),), model.schedule.timestep(sigma), dtype=torch.float32, device=x.device)
    out = _call(model, (x_in, t, cond.context, cond.y), recovery or Recovery(), f"at sigma {sigma:.4g}")
    return to_x0(model.config.prediction, x, out, sigma)


def _call(model: LatentDiffusion, inputs: Inputs, recovery: Recovery, where: str) -> Tensor:
    """The UNet's output in float32, whatever the type of its weights: half precision begins and ends in here."""
    x, t, context, y = inputs

    def run(unet: UNet, part: slice) -> Tensor:
        dtype = unet.time_embed[0].weight.dtype
        version = None if context.is_inference() else context._version  # how often it was written in place
        last = recovery.context
        if last is None or last[0] is not context or version is None or last[1] != version or last[2].dtype != dtype:
            last = recovery.context = context, version, context.to(dtype)
        label = None if y is None else y[part].to(dtype) if y.is_floating_point() else y[part]
        return unet(x[part].to(dtype), t[part], last[2][part], label).float()

    out = None
    if recovery.most is None:
        with contextlib.suppress(torch.OutOfMemoryError):
            out = run(recovery.unet or model.unet, slice(None))
            if torch.isfinite(out).all():
                return out
    return recovered(model, inputs, run, out, recovery, where)


def guided(model: LatentDiffusion, conds: Sequence[Cond], combine: Combine) -> Denoiser:
    """A `Denoiser` that asks the network for every condition `combine` needs at this noise level, in one batched call.

    conds  in the order `combine` wants them, [uncond, cond] for `cfg`; each of x's batch size
    What overflow and lack of memory made necessary is remembered for as long as the denoiser lives.
    """
    recovery, batches = Recovery(), dict[tuple[int, ...], Cond]()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        needed = combine.needs(sigma)
        if needed not in batches:
            batches[needed] = Cond.cat([conds[i] for i in needed])
        x0 = predict_x0(model, torch.cat([x] * len(needed)), sigma, batches[needed], recovery)
        return combine(x0.chunk(len(needed)), sigma)

    return denoise
