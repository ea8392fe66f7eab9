"""What a network learns: the targets, weights and inputs of the losses, against the papers' formulas written out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import weights
from ldm.changes.surgery import widen
from ldm.errors import ArgumentError
from ldm.model import LatentDiffusion
from ldm.train import losses
from ldm.train.data.batch import Batch
from ldm.train.draws import Draws
from ldm.train.recipe import Objective
from ldm.train.tasks import Autoencoding, Diffusion
from samplers import Schedule
from tests.made.families import build, tiny
from tests.made.pictures import batch_of

ALPHAS = torch.tensor(Schedule().alphas_cumprod)


@pytest.fixture(scope="module")
def shipped() -> LatentDiffusion:
    return weights.load()


def plain_loss(model: LatentDiffusion, batch: Batch, draws: Draws) -> Tensor:
    """Ho et al. 2020, eq. 14, written out."""
    t = draws.integers("timestep", 1000)
    x0 = model.vae.encode(batch.image, draws.normal("posterior", (4, 8, 8)))
    noise = draws.normal("noise", (4, 8, 8))
    a = ALPHAS.float()[t][:, None, None, None]
    out = model.unet(
        a.sqrt() * x0 + (1 - a).sqrt() * noise, t, model.condition(batch.captions, batch.size, chunks=1).context
    )
    return (out - noise).square().mean(dim=(1, 2, 3))


def test_the_loss_and_its_gradient_are_those_of_the_plain_formula(shipped: LatentDiffusion) -> None:
    model = weights.load()
    model.unet.requires_grad_(True)
    batch, draws = batch_of(), Draws(0, [0, 1])
    task = Diffusion(model, Objective())
    ours = task(batch, draws)
    plain = plain_loss(model, batch, draws)
    assert torch.allclose(ours.each, plain, rtol=1e-6)
    found = torch.autograd.grad(ours.each.mean(), list(model.unet.parameters()))
    wanted = torch.autograd.grad(plain.mean(), list(model.unet.parameters()))
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6 * wanted[0].abs().max().item())


def test_every_option_of_the_objective_changes_what_it_says(shipped: LatentDiffusion) -> None:
    batch, draws = batch_of(), Draws(0, [0, 1])

    def prepared(**options):
        return Diffusion(shipped, Objective(**options)).prepare(batch, draws)

    plain = prepared()
    offset = prepared(noise_offset=0.1)
    shift = offset.target - plain.target
    assert torch.allclose(shift, shift[..., :1, :1].expand_as(shift), atol=1e-6), "one number per channel"
    assert torch.allclose(shift[..., 0, 0], 0.1 * draws.normal("offset", (4, 1, 1))[..., 0, 0], atol=1e-6)
    perturbed = prepared(input_perturbation=0.1)
    assert torch.equal(perturbed.target, plain.target)
    a = ALPHAS.float()[plain.t][:, None, None, None]
    assert torch.allclose(
        perturbed.x - plain.x, (1 - a).sqrt() * 0.1 * draws.normal("perturbation", (4, 8, 8)), atol=1e-5
    ), "Ning et al. 2023, algorithm 1"
    assert torch.allclose(prepared(min_snr=5.0).weight, losses.snr_weight("eps", ALPHAS.float()[plain.t], 0.0, 5.0))
    assert torch.allclose(
        prepared(least_snr=0.2).weight, losses.snr_weight("eps", ALPHAS.float()[plain.t], 0.2, torch.inf)
    )
    dropped = prepared(caption_dropout=1.0)
    assert torch.equal(dropped.context, shipped.condition(["", ""], (64, 64)).context)
    assert torch.equal(plain.context, shipped.condition(list(batch.captions), (64, 64), chunks=1).context)


def test_cached_latents_and_text_give_the_loss_of_what_they_were_made_from(shipped: LatentDiffusion) -> None:
    batch, draws = batch_of(), Draws(0, [0, 1])
    moments = shipped.vae.moments(batch.image)
    context = shipped.condition(list(batch.captions), (64, 64), chunks=1).context
    cached = replace(batch, image=None, moments=moments, context=context)
    for objective in (Objective(), Objective(caption_dropout=0.5)):
        task = Diffusion(shipped, objective)
        assert torch.equal(task(batch, draws).each, task(cached, draws).each)


def test_the_prior_pictures_weigh_what_they_are_given(shipped: LatentDiffusion) -> None:
    batch, draws = batch_of(), Draws(0, [0, 1])
    task = Diffusion(shipped, Objective())
    weighted = task(replace(batch, weight=torch.tensor([1.0, 0.25])), draws)
    assert torch.allclose(weighted.each, task(batch, draws).each * torch.tensor([1.0, 0.25]))


@pytest.mark.parametrize(
    "family", ["sd1", "sd1-inpainting", "sd-image-variations", "sd2-base", "sd2-v", "sd2-depth", "sdxl-base", "ssd-1b"]
)
def test_every_family_is_told_what_its_task_tells_it(family: str) -> None:
    model = build(tiny(family))
    batch, draws = batch_of(1, 64), Draws(0, [5])
    asked = Diffusion(model, Objective(whole_hole=0.0)).prepare(batch, draws)
    assert asked.x.shape == (1, model.config.unet.in_channels, 8, 8)
    assert asked.target.shape == (1, 4, 8, 8)
    if family == "sd1-inpainting":
        assert set(asked.x[:, 4].unique().tolist()) <= {0.0, 1.0}, "the mask follows the latent"
    if family == "sd2-depth":
        assert asked.x[:, 4].min() >= -1
        assert asked.x[:, 4].max() <= 1
    if family in ("sdxl-base", "ssd-1b"):
        assert torch.equal(asked.y, model.condition(list(batch.captions), (64, 64), sizes=batch.sizes[0], chunks=1).y)
        assert not Diffusion(model, Objective(caption_dropout=1.0)).prepare(batch, draws).context.any(), (
            "SDXL hears zeros where nothing is said"
        )
    if family == "sd-image-variations":
        assert asked.context.shape[1] == 1
        assert not Diffusion(model, Objective(caption_dropout=1.0)).prepare(batch, draws).context.any()
    assert torch.isfinite(model.unet(asked.x, asked.t, asked.context, asked.y)).all()


def test_a_hole_that_is_everything_hides_the_whole_picture() -> None:
    model = build(tiny("sd1-inpainting"))
    batch, draws = batch_of(1, 64), Draws(0, [5])
    asked = Diffusion(model, Objective(whole_hole=1.0)).prepare(batch, draws)
    grey = model.vae.encode(torch.zeros_like(batch.image), draws.normal("masked posterior", (4, 8, 8)))
    assert asked.x[:, 4].eq(1).all()
    assert torch.equal(asked.x[:, 5:], grey)


def test_a_depth_model_takes_the_map_that_lies_beside_the_picture() -> None:
    model = build(tiny("sd2-depth"))
    depth = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    asked = Diffusion(model, Objective()).prepare(batch_of(1, 64, depth=depth), Draws(0, [0]))
    assert asked.x[0, 4, 0].diff().gt(0).all()
    model.depth = None
    with pytest.raises(ArgumentError, match="put depth maps into depth/"):
        Diffusion(model, Objective()).prepare(batch_of(1, 64), Draws(0, [0]))


def test_the_upscaler_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"family x4-upscaler: its inputs .* are not trained here"):
        Diffusion(build(tiny("x4-upscaler")), Objective())


def test_what_is_concatenated_has_the_order_of_the_config() -> None:
    model = widen(build(tiny("sd1")), ("masked_image",))
    batch, draws = batch_of(1, 64), Draws(0, [5])
    asked = Diffusion(model, Objective(whole_hole=1.0)).prepare(batch, draws)
    assert asked.x.shape[1] == 8
    grey = model.vae.encode(torch.zeros_like(batch.image), draws.normal("masked posterior", (4, 8, 8)))
    assert torch.equal(asked.x[:, 4:], grey)


def test_at_given_timesteps_the_loss_is_the_plain_one_whatever_is_minimised(shipped: LatentDiffusion) -> None:
    batch, draws, t = batch_of(), Draws(0, [0, 1]), torch.tensor([300, 900])
    odd = Objective(min_snr=5.0, noise_offset=0.1, input_perturbation=0.1, caption_dropout=1.0)
    assert torch.equal(
        Diffusion(shipped, odd).at(batch, draws, t).each, Diffusion(shipped, Objective()).at(batch, draws, t).each
    )


def test_a_task_that_needs_pictures_says_so_where_only_latents_were_kept() -> None:
    batch = replace(batch_of(), image=None, moments=torch.zeros(2, 8, 8, 8))
    with pytest.raises(
        ArgumentError, match=r"needs pictures, and the batch has only their latents; set data\.cache_latents to false"
    ):
        Autoencoding(build(tiny("sd1")).vae, 1e-6)(batch, Draws(0, (0, 1)))
