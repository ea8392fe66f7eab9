"""Targets, weights and losses against the papers' formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.models.golden import tiny_vae
from benchmarks.models.seeded import normal
from ldm.train import losses
from ldm.train.draws import Draws
from ldm.train.tasks import Autoencoding
from samplers import Schedule
from tests.made.pictures import batch_of

ALPHAS = torch.tensor(Schedule().alphas_cumprod)


def test_the_noisy_latent_and_both_targets_are_the_formulas_of_the_papers() -> None:
    x0, noise = normal("x0", (2, 4, 8, 8)).double(), normal("noise", (2, 4, 8, 8)).double()
    a = ALPHAS[torch.tensor([300, 999])]
    x, v = losses.noised(x0, noise, a), losses.target("v", x0, noise, a)
    for i, alpha in enumerate(a):
        assert torch.allclose(x[i], alpha.sqrt() * x0[i] + (1 - alpha).sqrt() * noise[i])
        assert torch.allclose(alpha.sqrt() * x[i] - (1 - alpha).sqrt() * v[i], x0[i]), (
            "v gives x0 back (Salimans & Ho 2022, appendix D)"
        )
    assert losses.target("eps", x0, noise, a) is noise


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_error_of_x0_weighs_as_much_as_the_limited_snr_says(prediction: str) -> None:
    """An error e of eps is one of e sqrt((1 - a) / a) of x0, an error e of v one of e sqrt(1 - a)."""
    a = ALPHAS[torch.tensor([10, 400, 900])]
    snr = a / (1 - a)
    of_x0 = (1 - a) / a if prediction == "eps" else 1 - a
    assert torch.allclose(losses.snr_weight(prediction, a, 0.2, 5.0), snr.clamp(0.2, 5.0) * of_x0, rtol=1e-6)
    assert torch.allclose(losses.snr_weight("eps", a, 0.0, 5.0), snr.clamp(max=5.0) / snr), (
        "min-SNR as in Hang et al. 2023, section 3.4"
    )


def test_the_autoencoder_loss_is_the_error_plus_the_weighted_divergence() -> None:
    vae, image = tiny_vae("vae-f8-tiny"), normal("image", (2, 3, 16, 16)).clamp(-1, 1)
    noise = normal("z", (2, 4, 2, 2))
    plain = (vae.decode(vae.encode(image, noise)) - image).abs().mean(dim=(1, 2, 3))
    mean, logvar = vae.moments(image).chunk(2, dim=1)
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    ).mean(dim=(1, 2, 3))
    assert torch.allclose(losses.vae_loss(vae, image, noise, 0.0), plain)
    assert torch.allclose(losses.vae_loss(vae, image, noise, 0.5), plain + 0.5 * kl)
    batch = replace(batch_of(side=16), weight=torch.tensor([1.0, 0.5]))
    task = Autoencoding(vae, 0.5)
    each = task(batch, Draws(0, batch.index)).each
    assert torch.allclose(
        each,
        losses.vae_loss(vae, batch.image, Draws(0, batch.index).normal("posterior", (4, 2, 2)), 0.5) * batch.weight,
    )
