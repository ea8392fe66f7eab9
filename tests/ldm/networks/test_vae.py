"""The VAE against the original implementation."""

import pytest
import torch

from benchmarks.models.golden import TINY_VAES, relative, tiny_vae
from benchmarks.models.seeded import golden, normal

TOLERANCE = 1e-5  # as in test_unet.py


@pytest.mark.parametrize(("name", "size"), [("vae-f8-tiny", 64), ("vae-f4-tiny", 32)])
@torch.no_grad()
def test_the_vae_gives_what_the_original_gives(name: str, size: int) -> None:
    """In float64 every element is within the tolerance, so all that is left there is the reference's own rounding: up
    to 5.4e-6.

    In float32 the processor's rounding joins it, which depends on its instructions: the worst of 24,576 elements of the
    decoded picture was 5.5e-6 from the reference with AVX-512 and 1.3e-5 without, the rms error 2.0e-6 at most. So
    there only the rms is held; the moments' every element is."""
    vae, file = tiny_vae(name), golden("vae")
    image, z = normal(f"{name}/image", (2, 3, size, size)).clamp(-1, 1), normal(f"{name}/z", (2, 4, 8, 8))
    assert relative(vae.moments(image), file[f"{name}/moments"]) < TOLERANCE
    decoded = file[f"{name}/decoded"]
    assert ((vae.decode(z) - decoded).square().mean() / decoded.square().mean()).sqrt() < TOLERANCE
    vae.double()
    assert relative(vae.moments(image.double()), file[f"{name}/moments"]) < TOLERANCE
    assert relative(vae.decode(z.double()), decoded) < TOLERANCE


def test_the_factor_is_the_ratio_of_sizes() -> None:
    assert [config.factor for config in TINY_VAES.values()] == [8, 4]


@torch.no_grad()
def test_encoding_is_the_scaled_mean_or_a_sample_around_it() -> None:
    vae, image = tiny_vae("vae-f8-tiny"), normal("image", (1, 3, 16, 16)).clamp(-1, 1)
    mean, logvar = vae.moments(image).chunk(2, dim=1)
    assert torch.equal(vae.encode(image), mean)
    noise = normal("noise", mean.shape)
    assert torch.allclose(vae.encode(image, noise), mean + (logvar / 2).exp() * noise)


@torch.no_grad()
def test_the_scale_is_undone_by_decoding() -> None:
    from dataclasses import replace

    from ldm.networks.vae import VAE

    plain = tiny_vae("vae-f8-tiny")
    scaled = VAE(replace(plain.config, scale=0.25)).eval()
    scaled.load_state_dict(plain.state_dict())
    image = normal("image", (1, 3, 16, 16)).clamp(-1, 1)
    assert torch.equal(scaled.encode(image), plain.encode(image) * 0.25)
    assert torch.allclose(scaled.decode(scaled.encode(image)), plain.decode(plain.encode(image)), atol=1e-5)
