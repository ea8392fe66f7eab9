"""DDIM and its relatives that forget everything but the last estimate: `ddim ddpm lcm`."""

from __future__ import annotations

from torch import Tensor

from samplers.core import Denoiser, Noise, Sigmas, falling, noisier, pairs, split, toward


def ddim(denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, eta: float = 0.0, noise: Noise | None = None) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12), written for x = x0 + sigma * noise; eta 0 is deterministic."""
    for sigma, sigma_next in pairs(sigmas):
        x0 = denoise(x, sigma)
        down, up = split(sigma, sigma_next, eta)
        x = noisier(toward(x0, x, down / sigma), up, noise)
    return x


def ddpm(denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, noise: Noise | None = None) -> Tensor:
    """DDPM (Ho et al. 2020, eq. 6-7, the smaller of the two variances): a draw from q(x_next | x, x0) at every step.

    Any subset of the trained levels will do (Nichol & Dhariwal 2021, section 4), not only all of them.
    """
    for sigma, sigma_next in falling(sigmas, "ddpm"):
        x0 = denoise(x, sigma)
        keep = (sigma_next / sigma) ** 2  # the posterior mean lies between x0 and x, closer to x for a shorter step
        x = noisier(toward(x0, x, keep), sigma_next * (1 - keep) ** 0.5, noise)
    return x


def lcm(denoise: Denoiser, x: Tensor, sigmas: Sigmas, *, noise: Noise | None = None) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, alg. 1; Luo et al. 2023, alg. 3): jump to x0, noise it, repeat.

    Only for consistency models (LCM checkpoints and LoRAs), in 1 to 8 steps. Their skip weight
    c_skip = 0.25 / ((10 t)^2 + 0.25), below 1e-4 for every timestep above 5, is taken as 0: x0 is the network's own.
    """
    for sigma, sigma_next in falling(sigmas, "lcm"):
        x = noisier(denoise(x, sigma), sigma_next, noise)
    return x
