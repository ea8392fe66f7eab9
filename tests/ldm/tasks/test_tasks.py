"""Text-to-image and image-to-image on a tiny model: what every option does, and what is promised about seeds and batches."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm import LatentDiffusion, guided
from ldm.conditioning.tokenizer import TruncationWarning
from ldm.errors import ArgumentError, NonFinite
from ldm.images import from_pil, to_pil
from ldm.limits.precision import decode
from ldm.tasks import img2img, txt2img
from ldm.tasks.job import Job, Sampling
from samplers import GRIDS, SAMPLERS, Schedule, Step, cfg, dpmpp_2m, finish, karras, seeded, start
from tests.made.families import build


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    return build()


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def levels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def watched(model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch size of every network call from now on."""
    sizes: list[int] = []
    forward = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda x, *rest: (sizes.append(len(x)), forward(x, *rest))[1])
    return sizes


# --- text to image --------------------------------------------------------------------------------------------------


def test_txt2img_is_the_ten_lines_of_the_readme(model):
    cond, uncond = (model.condition([prompt], size=(32, 40)) for prompt in ("a lighthouse", "rain"))
    denoise = guided(model, [uncond, cond], cfg(6.0))
    sigmas = karras(model.schedule, steps=4)
    noise = seeded([7])
    x = start(noise(model.latent_shape(1, 32, 40)), sigmas)
    x = finish(dpmpp_2m(denoise, x, sigmas, noise=noise), sigmas)
    (by_hand,) = to_pil(model.vae.decode(x))
    (image,) = txt2img(model, "a lighthouse", seeds=[7], negative="rain", height=32, width=40, steps=4, cfg=6.0)
    assert image.size == (40, 32)
    assert np.array_equal(image, by_hand)


def test_the_same_call_gives_the_same_pixels_and_another_seed_or_prompt_others(model):
    def make(prompt: str, seed: int) -> np.ndarray:
        return levels(txt2img(model, prompt, seeds=[seed], steps=2))

    assert np.array_equal(make("a cat", 1), make("a cat", 1))
    assert not np.array_equal(make("a cat", 1), make("a cat", 2))
    assert not np.array_equal(make("a cat", 1), make("a dog", 1))


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm", "euler_ancestral", "dpmpp_sde", "dpmpp_3m_sde"])
def test_an_image_does_not_depend_on_its_batch(sampler, model):
    prompts, seeds = ["a cat", "a dog", "a cat"], [5, 6, 7]
    together = txt2img(model, prompts, seeds=seeds, steps=4, sampler=sampler)
    in_twos = txt2img(model, prompts, seeds=seeds, steps=4, sampler=sampler, batch=2)
    alone = [
        txt2img(model, prompt, seeds=[seed], steps=4, sampler=sampler)[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    # The noise is bit-equal; sums in another order inside the network move a value across a rounding edge here and there.
    assert np.abs(levels(together) - levels(alone)).max() <= 1
    assert np.abs(levels(in_twos) - levels(alone)).max() <= 1
    assert np.mean(levels(together) != levels(alone)) < 0.05


def test_the_noise_of_an_image_is_the_same_to_the_bit_in_every_batch(model):
    first: list[Tensor] = []

    def keep(step: Step) -> None:
        if step.index == 0:
            first.append(step.x)

    txt2img(model, "a", seeds=[5, 6, 7], steps=1, on_step=keep)
    txt2img(model, "a", seeds=[7], steps=1, on_step=keep)
    assert torch.equal(first[0][2:], first[1])


def test_nothing_outside_has_an_effect_or_is_changed(model):
    def state() -> tuple:
        return (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # noqa: NPY002
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
        )

    torch.manual_seed(1)
    before = state()
    one = levels(txt2img(model, "a", seeds=[3], steps=2, sampler="euler_ancestral"))
    assert state() == before
    torch.manual_seed(2)
    assert np.array_equal(one, levels(txt2img(model, "a", seeds=[3], steps=2, sampler="euler_ancestral")))


def test_the_size_is_the_models_own_unless_given(model):
    assert txt2img(model, "a", seeds=[0], steps=1)[0].size == (32, 32)
    assert txt2img(model, "a", seeds=[0], steps=1, width=72)[0].size == (72, 32)
    assert txt2img(model, "a", seeds=[0], steps=1, height=16, width=16)[0].size == (16, 16)


@pytest.mark.parametrize("size", [(100, 64), (64, 12), (0, 64), (-8, 64), (64, 4)])
def test_a_size_that_no_latent_has_is_refused(size, model, photo):
    with pytest.raises(ArgumentError, match="multiples of 8"):
        txt2img(model, "a", seeds=[0], width=size[0], height=size[1])
    with pytest.raises(ArgumentError, match="multiples of 8"):
        img2img(model, photo, "a", seeds=[0], width=size[0], height=size[1])


def test_guidance_of_exactly_one_or_zero_makes_one_pass(model, monkeypatch):
    sizes = watched(model, monkeypatch)
    plain = levels(txt2img(model, "a cat", seeds=[1], steps=3, cfg=1, negative="a dog"))
    assert sizes == [1, 1, 1]
    assert np.array_equal(plain, levels(txt2img(model, "a cat", seeds=[1], steps=3, cfg=1.0, negative="a bird")))
    none = levels(txt2img(model, "a cat", seeds=[1], steps=3, cfg=0, negative="a dog"))
    assert sizes == [1] * 9
    assert np.array_equal(none, levels(txt2img(model, "a dog", seeds=[1], steps=3, cfg=1)))
    txt2img(model, "a cat", seeds=[1], steps=3, cfg=2)
    assert sizes == [1] * 12 + [2] * 3


def test_guidance_within_an_interval_saves_passes_outside_it(model, monkeypatch):
    sizes = watched(model, monkeypatch)
    txt2img(model, "a", seeds=[1], steps=6, interval=(0.1, 5.0))
    inside = [0.1 < sigma <= 5.0 for sigma in karras(model.schedule, 6)[:-1]]
    assert 0 < sum(inside) < 6
    assert sizes == [2 if guided else 1 for guided in inside]


@pytest.mark.parametrize(
    "changed",
    [
        {"negative": "a dog"}, {"sampler": "heun"}, {"grid": "exponential"}, {"steps": 4}, {"cfg": 3.0}, {"rescale": 0.7},
        {"interval": (1.0, 5.0)}, {"clip_skip": 2}, {"sampler": "euler_ancestral", "eta": 0.5}, {"cfg": -3.0},
    ],
)  # fmt: skip
def test_every_option_does_something(changed, model):
    plain = {"steps": 3, "sampler": "euler_ancestral"} if "eta" in changed else {"steps": 3}
    assert not np.array_equal(
        levels(txt2img(model, "a cat", seeds=[1], **plain)),
        levels(txt2img(model, "a cat", seeds=[1], **plain | changed)),
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_makes_a_picture_in_one_step_and_in_three(sampler, model):
    for steps in (1, 3):
        (image,) = txt2img(model, "a", seeds=[1], steps=steps, sampler=sampler, height=16, width=16)
        assert levels([image]).std() > 1


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_makes_a_picture(grid, model):
    assert levels(txt2img(model, "a", seeds=[1], steps=2, grid=grid, height=16, width=16)).std() > 1


def test_every_step_is_reported_in_float32_whatever_the_model_computes_in(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    steps: list[Step] = []
    (image,) = txt2img(half, "a", seeds=[1], steps=3, on_step=steps.append)
    assert [(step.index, step.total) for step in steps] == [(0, 3), (1, 3), (2, 3)]
    assert {tensor.dtype for step in steps for tensor in (step.x, step.x0)} == {torch.float32}
    assert levels([image]).std() > 1


def test_a_prompt_that_is_cut_is_reported(model):
    with pytest.warns(TruncationWarning, match="dropped from 'word' on"):
        txt2img(model, "word " * 76, seeds=[0], steps=1, truncate=True)


def test_a_long_prompt_is_read_in_pieces_and_changes_no_other_picture(model):
    long = "word " * 76 + "lighthouse"
    pair = levels(txt2img(model, [long, "rain"], seeds=[1, 2], steps=2))
    alone = [levels(txt2img(model, prompt, seeds=[seed], steps=2)) for prompt, seed in ((long, 1), ("rain", 2))]
    assert np.array_equal(pair, np.concatenate(alone))
    assert not np.array_equal(alone[0], levels(txt2img(model, "word " * 76, seeds=[1], steps=2)))


# --- image to image -------------------------------------------------------------------------------------------------


def test_img2img_starts_from_a_noised_sample_of_the_picture(model, photo):
    """The posterior's sample comes first from the picture's own noise, then the noise of the first level, as in the original code."""
    steps: list[Step] = []
    img2img(model, photo, "a", seeds=[7], strength=0.5, steps=6, on_step=steps.append)
    sigmas = karras(model.schedule, 6)[3:]
    noise = seeded([7])
    latent = model.vae.encode(from_pil(photo), noise((1, 4, 4, 4)))
    assert [step.sigma for step in steps] == sigmas[:-1]
    assert torch.equal(steps[0].x, latent + noise((1, 4, 4, 4)) * sigmas[0])


def test_strength_zero_takes_the_picture_through_the_vae_and_back(model, photo, monkeypatch):
    sizes = watched(model, monkeypatch)
    images = img2img(model, photo, "a", seeds=[1, 2], strength=0)
    (back,) = to_pil(model.vae.decode(model.vae.encode(from_pil(photo))))
    assert all(np.abs(levels([image]) - levels([back])).max() <= 1 for image in images)
    assert sizes == []


def test_more_strength_runs_more_steps_and_strays_further(model, photo, monkeypatch):
    sizes = watched(model, monkeypatch)
    base = levels(img2img(model, photo, "a", seeds=[1], strength=0))
    distances = []
    for strength, calls in ((0.1, 1), (0.5, 5), (1.0, 10)):
        sizes.clear()
        distances.append(
            np.abs(levels(img2img(model, photo, "a", seeds=[1], strength=strength, steps=10)) - base).mean()
        )
        assert len(sizes) == calls
    assert distances[0] < distances[1]
    assert distances[0] < distances[2]


def test_a_picture_made_from_another_does_not_depend_on_its_batch(model, photo):
    def make(seeds: list[int], batch: int | None = None) -> np.ndarray:
        return levels(img2img(model, photo, "a", seeds=seeds, steps=4, sampler="euler_ancestral", batch=batch))

    alone = np.concatenate([make([seed]) for seed in (5, 6, 7)])
    assert np.array_equal(make([5, 6, 7], batch=1), alone)
    assert np.abs(make([5, 6, 7]) - alone).max() <= 1


def test_the_size_of_the_first_picture_is_rounded_kept_or_followed(model, photo):
    def size(**given: int) -> tuple[int, int]:
        return img2img(model, photo.resize((50, 37)), "a", seeds=[1], strength=0, **given)[0].size

    assert size() == (48, 40)
    assert size(width=24) == (24, 16)
    assert size(width=16, height=32) == (16, 32)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1"])
def test_a_first_picture_of_any_mode_will_do(mode, model, photo):
    assert img2img(model, photo.convert(mode), "a", seeds=[1], strength=0.5, steps=2)[0].mode == "RGB"


def test_img2img_works_in_half_precision(model, photo):
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert levels(img2img(half, photo, "a", seeds=[1], steps=2)).std() > 1


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf"), "half", True, None])
def test_a_strength_outside_zero_to_one_is_refused(strength, model, photo):
    with pytest.raises(ArgumentError, match=r"strength: .*; give a number from 0 to 1"):
        img2img(model, photo, "a", seeds=[1], strength=strength)


def test_a_strength_too_small_for_a_step_is_an_error_that_names_the_least(model, photo):
    with pytest.raises(ArgumentError, match=r"strength: 0\.01 leaves none of 25 steps: give at least 0\.04"):
        img2img(model, photo, "a", seeds=[1], strength=0.01)


# --- faults ---------------------------------------------------------------------------------------------------------


def broken(change: Callable[[LatentDiffusion], None]) -> LatentDiffusion:
    model = build()
    change(model)
    return model


def test_a_network_that_gives_nan_is_an_error_that_names_the_noise_level_and_the_layer(photo):
    model = broken(lambda model: model.unet.out[2].bias.fill_(float("nan")))
    with pytest.raises(
        NonFinite, match=r"sigma 14\.61 in float32, first at out\.2; weights not finite: out\.2\.bias"
    ) as caught:
        txt2img(model, "a", seeds=[1], steps=3)
    assert caught.value.exit_code == 5
    with pytest.raises(NonFinite, match="UNet: NaN"):
        img2img(model, photo, "a", seeds=[1], steps=3)


def test_the_noise_level_named_is_the_one_where_it_happened(model, monkeypatch):
    forward, calls = model.unet.forward, []
    monkeypatch.setattr(
        model.unet,
        "forward",
        lambda x, *rest: (calls.append(0), forward(x, *rest) * (float("inf") if len(calls) == 3 else 1))[1],
    )
    with pytest.raises(NonFinite, match=r"sigma 1\.274 "):
        txt2img(model, "a", seeds=[1], steps=5)


def test_a_denoiser_that_is_no_network_is_watched_too():
    """Whatever is put around the model (windows, known regions, a function of one's own): its x0 is checked before every update."""
    job, calls = Job("a", seeds=[1], sampling=Sampling(steps=4)), []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return x * (float("inf") if len(calls) == 3 else 0)

    sigmas = job.sampling.sigmas(Schedule())
    with pytest.raises(NonFinite, match=r"step 3 of 4 .*: NaN or infinity"):
        job.solve(denoise, torch.ones(1, 4, 2, 2), sigmas, seeded([1]))


def test_a_vae_that_gives_nan_is_an_error_and_no_picture():
    model = broken(lambda model: model.vae.decoder.conv_out.bias.fill_(float("inf")))
    with pytest.raises(NonFinite, match=r"first at decoder\.conv_out"):
        txt2img(model, "a", seeds=[1], steps=1)
    with pytest.raises(NonFinite, match="latents: NaN or infinity in number 1 of 1"):
        decode(model, torch.full((1, 4, 2, 2), float("nan")))


@pytest.mark.parametrize("change", [{"concat": ("mask", "masked_image")}, {"text": ()}])
def test_a_model_for_another_task_is_refused(change, photo):
    other = build()
    other.config = replace(other.config, **change)
    for task in (lambda: txt2img(other, "a", seeds=[1]), lambda: img2img(other, photo, "a", seeds=[1])):
        with pytest.raises(ArgumentError, match="it is not for text alone"):
            task()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "dpmpp_2n"}, r"sampler: 'dpmpp_2n' is unknown; dpmpp_2m\? All: ddim "),
        ({"sampler": "zzz"}, r"sampler: 'zzz' is unknown\. All: "),
        ({"grid": "kerras"}, r"grid: 'kerras' is unknown; karras\?"),
        ({"steps": 0}, "steps: 0; give a whole number from 1 to 1000"),
        ({"steps": -1}, "steps: -1"),
        ({"steps": 2.5}, r"steps: 2\.5"),
        ({"steps": True}, "steps: True"),
        ({"steps": float("nan")}, "steps: nan"),
        ({"steps": 1001}, r"steps: 1001; give at most 1000 \(the model has 1000 training steps\)"),
        ({"steps": 3, "grid": "ddim_original"}, "steps: ddim_original has no 3 steps.*use 2 or 4"),
        ({"cfg": float("nan")}, "cfg: nan; give a number from -100 to 100"),
        ({"cfg": float("inf")}, "cfg: inf"),
        ({"cfg": 100.5}, r"cfg: 100\.5"),
        ({"cfg": -101}, "cfg: -101"),
        ({"cfg": "7"}, "cfg: '7'"),
        ({"rescale": 1.5}, r"rescale: 1\.5; give a number from 0 to 1"),
        ({"interval": (3, 1)}, r"interval: \(3, 1\); give two sigmas"),
        ({"interval": (-1, 1)}, "interval"),
        ({"interval": (float("nan"), 1)}, "interval"),
        ({"interval": (1, 2, 3)}, "interval"),
        ({"interval": ("a", "b")}, "interval"),
        ({"interval": 3}, "interval: 3"),
        ({"eta": 0.5}, "eta: sampler dpmpp_2m has none; leave it out, or use ddim, euler_ancestral"),
        ({"eta": -1, "sampler": "ddim"}, "eta: -1; give a number from 0 to 100"),
        ({"clip_skip": 0}, "clip_skip: 0"),
        ({"clip_skip": 4}, "this text tower gives layers 1 to 3"),
        ({"stepz": 3}, r"option: 'stepz' is unknown; steps\?"),
        ({"batch": 0}, "batch: 0"),
        ({"seeds": []}, "seeds: none given"),
        ({"seeds": [1, 2], "prompts": ["a"]}, "seeds: 2 for 1 prompts"),
        ({"seeds": [-1]}, "seed: -1"),
        ({"seeds": [2**64]}, "seed: 18446744073709551616; give at most 18446744073709551615"),
        ({"seeds": [1.0]}, r"seed: 1\.0"),
        ({"prompts": ["x" * 70_000]}, "prompt: 70000 bytes"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_remedy(options, message, model):
    given = {"prompts": "a", "seeds": [1]} | options
    with pytest.raises(ArgumentError, match=message) as caught:
        txt2img(model, **given)
    assert len(str(caught.value)) <= 200


def test_what_is_at_the_edge_is_honoured(model):
    for options in (
        {"cfg": 100},
        {"cfg": -100},
        {"interval": (0, float("inf"))},
        {"eta": 0, "sampler": "ddim"},
        {"rescale": 1},
        {"clip_skip": 3},
    ):
        assert len(txt2img(model, "", seeds=[2**64 - 1], steps=1, height=16, width=16, **options)) == 1
    assert Sampling(steps=1000).sigmas(model.schedule)[-1] == 0
    assert np.array_equal(
        levels(txt2img(model, "a", seeds=[2**33 + 5], steps=1)), levels(txt2img(model, "a", seeds=[5], steps=1))
    )
