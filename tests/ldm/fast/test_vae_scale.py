"""The VAE in units against the VAE: on a GPU with `-m gpu`, elsewhere in Triton's interpreter (see
test_fast_kernels)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.models.golden import fill, relative
from benchmarks.models.seeded import normal
from ldm.config import VAEConfig
from ldm.fast import vae_scale
from ldm.fast.choice import shared
from ldm.fast.networks import FastDecoder, FastEncoder
from ldm.networks.vae import VAE, Decoder, Encoder
from tests.made.kernels import DEVICE, few_groups, on_the_device

INPUTS = {"decode": normal("latent", (1, 4, 3, 4)), "moments": normal("image", (1, 3, 6, 8))}
pytestmark = pytest.mark.usefixtures("plain_attention", "large_tiles")


def tame() -> VAE:
    """Two levels of one block, and inner numbers of about 1."""
    return few_groups(fill(VAE(VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)), lambda key: key)).to(
        DEVICE
    )


def wild() -> VAE:
    """The same function but for rounding, with inner numbers of about 2^15.

    All that a norm reads is 2^15 times as large: the convolutions to it, and the biases of those on the way, with the
    squares in eps."""
    vae = tame()
    for name, parameter in vae.named_parameters():
        layer = name.split(".")[-2]
        if layer in ("conv_in", "conv1", "conv2", "proj_out") or (
            layer in ("nin_shortcut", "conv") and parameter.ndim == 1
        ):
            parameter.mul_(2.0**15)
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps *= 2.0**30
    return vae


def in_units(vae: VAE) -> VAE:
    twin = shared(vae, {Decoder: FastDecoder, Encoder: FastEncoder})
    twin.encoder.ops = twin.decoder.ops = vae_scale
    return twin


@on_the_device
@pytest.mark.parametrize("run", INPUTS)
@torch.no_grad()
def test_in_float64_units_change_nothing(run: str) -> None:
    vae, given = tame().double(), INPUTS[run].to(DEVICE).double()
    assert relative(getattr(in_units(vae), run)(given), getattr(vae, run)(given)) < 1e-12


@on_the_device
@pytest.mark.parametrize("run", INPUTS)
@torch.no_grad()
def test_what_overflows_in_float16_is_finite_and_right_in_units(run: str) -> None:
    """Right: no further from float64 than the tame VAE is in float16, twice over since rounding errors of two ways to
    compute it are compared."""
    given = INPUTS[run].to(DEVICE)
    exact, exact_wild = (getattr(vae.double(), run)(given.double()) for vae in (tame(), wild()))
    assert relative(exact_wild, exact) < 1e-12
    allowed = 2 * relative(getattr(tame().half(), run)(given.half()).double(), exact)
    vae = wild().half()
    assert not getattr(vae, run)(given.half()).isfinite().all()
    ours = getattr(in_units(vae), run)(given.half())
    assert ours.isfinite().all()
    assert relative(ours.double(), exact) < allowed
