"""The VAE in strips against the VAE in one piece: the same pictures, without seams."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import weights
from benchmarks.models.golden import TINY_VAES, fill, relative, tiny_vae
from benchmarks.models.seeded import normal
from ldm.config import VAEConfig
from ldm.limits import tiles
from ldm.model import LatentDiffusion
from ldm.networks.vae import VAE

# twice the 1e-5 of test_vae.py, which is one order of summation against another, and the sums of a norm in parts
TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def shipped() -> LatentDiffusion:
    return weights.load()


@pytest.fixture(scope="module")
def scene(shipped: LatentDiffusion) -> tuple[Tensor, Tensor]:
    """Latents of a picture with plain areas, where seams show, and edges: [1, c, 24, 20]; and what the VAE makes of
    them in one piece."""
    factor = shipped.config.vae.factor
    y, x = torch.meshgrid(torch.linspace(-1, 1, 24 * factor), torch.linspace(-1, 1, 20 * factor), indexing="ij")
    disc = torch.where(x**2 + y**2 < 0.4, 0.8, -0.3)
    image = torch.stack([disc, 0.7 * y, torch.full_like(x, 0.2)])[None]
    with torch.no_grad():
        latent = shipped.vae.encode(image)
        return latent, shipped.vae.decode(latent)


def levels(image: Tensor) -> Tensor:
    """What is stored: 0 to 255."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round()


def psnr(a: Tensor, b: Tensor) -> float:
    """Of stored pictures, in dB."""
    return 20 * math.log10(255) - 10 * math.log10(max((levels(a) - levels(b)).square().mean().item(), 1e-12))


@pytest.mark.parametrize("name", TINY_VAES)
@pytest.mark.parametrize("rows", [1, 3, 16], ids=["of one cell", "that do not divide the height", "two"])
@torch.no_grad()
def test_strips_give_what_the_whole_gives(name: str, rows: int) -> None:
    vae = tiny_vae(name)
    factor = vae.config.factor
    tile = math.isqrt(rows * factor * 9 * factor) + 1
    latent, image = normal("z", (2, 4, 17, 9)), normal("image", (2, 3, 17 * factor, 9 * factor)).clamp(-1, 1)
    assert relative(tiles.decode(vae, latent, tile), vae.decode(latent)) < TOLERANCE
    assert relative(tiles.moments(vae, image, tile), vae.moments(image)) < TOLERANCE


@torch.no_grad()
def test_no_seam_is_seen_in_pictures_of_the_model_that_ships(
    shipped: LatentDiffusion, scene: tuple[Tensor, Tensor]
) -> None:
    latent, whole = scene
    tiled = tiles.decode(shipped.vae, latent, 48)
    assert psnr(tiled, whole) >= 60  # FAULTS.md, D7, asks for 45
    assert (levels(tiled) - levels(whole)).abs().max() <= 1


@torch.no_grad()
def test_encoding_in_strips_gives_the_same_latents(shipped: LatentDiffusion, scene: tuple[Tensor, Tensor]) -> None:
    _, image = scene
    assert relative(tiles.moments(shipped.vae, image, 48), shipped.vae.moments(image)) < TOLERANCE


@torch.no_grad()
def test_norms_that_look_at_one_strip_only_would_be_seen(
    shipped: LatentDiffusion, scene: tuple[Tensor, Tensor]
) -> None:
    latent, whole = scene
    alone = torch.cat([shipped.vae.decode(part) for part in latent.split(8, dim=2)], dim=2)
    assert (levels(alone) - levels(whole)).abs().max() > 2


@torch.no_grad()
def test_half_precision_in_strips_is_as_exact_as_in_one_piece() -> None:
    vae = fill(VAE(VAEConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1)), lambda key: key)
    latent = 0.2 * normal("z", (1, 4, 12, 8))
    exact, half = vae.decode(latent), vae.to(torch.bfloat16)
    plain, tiled = half.decode(latent.bfloat16()), tiles.decode(half, latent.bfloat16(), 8)
    assert tiled.dtype == torch.bfloat16
    assert (tiled - exact).square().mean() < 1.5 * (
        plain - exact
    ).square().mean()  # roundings of one size in the same places


@torch.no_grad()
def test_strips_rest_where_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, latent = tiny_vae("vae-f8-tiny"), normal("z", (1, 4, 8, 8))
    places = []
    cut = tiles.Strips.of
    monkeypatch.setattr(tiles.Strips, "of", lambda x, height, rest: places.append(rest) or cut(x, height, rest))
    rest = torch.device("cpu")
    assert relative(tiles.decode(vae, latent, 32, rest), vae.decode(latent)) < TOLERANCE
    assert places == [rest]


def held(strips: tiles.Strips) -> int:
    """Bytes kept alive, which those of a view are too."""
    return sum(part.untyped_storage().nbytes() for part in strips.rows)


@torch.no_grad()
def test_used_strips_are_given_up() -> None:
    strips = tiles.Strips.of(normal("x", (1, 2, 12, 4)), 4, None)
    made = strips.through(lambda x: 2 * x, halo=1)
    assert held(strips) == 0
    assert torch.equal(made.whole(), 2 * normal("x", (1, 2, 12, 4)))
    left = made.through(lambda x: x, leave=lambda x: x + 1)
    assert torch.equal(made.whole(), left.whole() + 1)
    a, b = made.whole(), left.whole()
    assert torch.equal(made.plus(left).whole(), a + b)
    assert held(made) == held(left) == 0


def test_a_layer_at_full_size_is_never_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vae: VAE = tiny_vae("vae-f8-tiny")
    seen = []
    for block in vae.decoder.up[0].block:
        block.conv1.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2]))
    with torch.no_grad():
        tiles.decode(vae, normal("z", (1, 4, 12, 8)), 32)
    assert max(seen) <= 16 + 2  # 32 * 32 pixels of rows 64 pixels wide, and one more on either side
    assert len(seen) == 6 * len(vae.decoder.up[0].block)
