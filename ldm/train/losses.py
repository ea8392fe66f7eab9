"""The losses of training, per example: the formulas of the papers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ldm.networks.vae import VAE

Prediction = Literal["eps", "v"]


def noised(x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """sqrt(alpha) x0 + sqrt(1 - alpha) noise; alpha [b]: alpha_bar of the timesteps (Ho et al. 2020, eq. 4)."""
    alpha = alpha[:, None, None, None]
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise


def target(prediction: Prediction, x0: Tensor, noise: Tensor, alpha: Tensor) -> Tensor:
    """The noise (Ho et al. 2020, eq. 14), or v = sqrt(alpha) noise - sqrt(1 - alpha) x0 (Salimans & Ho 2022, D)."""
    if prediction == "eps":
        return noise
    alpha = alpha[:, None, None, None]
    return alpha.sqrt() * noise - (1 - alpha).sqrt() * x0


def snr_weight(prediction: Prediction, alpha: Tensor, least: float, most: float) -> Tensor:
    """[b]: the weight that turns an error of eps or v into an error of x0 times its signal-to-noise ratio, clamped.

    The ratio is kept between `least`, so that the levels that decide a picture's layout keep some weight, and `most`,
    min-SNR's gamma (Hang et al. 2023, section 3.4).
    """
    snr = alpha / (1 - alpha)
    return snr.clamp(least, most) / (snr if prediction == "eps" else snr + 1)


def vae_loss(vae: VAE, image: Tensor, noise: Tensor, kl_weight: float) -> Tensor:
    """[b]: mean |error| of each picture plus `kl_weight` times its mean KL divergence per latent value.

    image [b, 3, H, W] in [-1, 1]; noise N(0, 1) of the latent's shape (Rombach et al. 2022, appendix G).
    """
    mean, logvar = vae.moments(image).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30.0, 20.0)
    z = mean + torch.exp(0.5 * logvar) * noise
    restored = vae.decode(z * vae.config.scale).float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
    return (restored - image).abs().mean(dim=(1, 2, 3)) + kl_weight * kl.mean(dim=(1, 2, 3))
