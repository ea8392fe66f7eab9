"""Text to image: every option, every family, and what is promised about seeds and batches."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.models.seeded import normal
from ldm import guided
from ldm.conditioning.cond import Sizes, size_embedding
from ldm.conditioning.prompts import Embedding
from ldm.conditioning.tokenizer import TruncationWarning
from ldm.errors import ArgumentError
from ldm.images import to_pil
from ldm.tasks import hires, img2img, txt2img
from ldm.tasks.job import Sampling
from samplers import GRIDS, SAMPLERS, Schedule, Step, cfg, dpmpp_2m, finish, karras, seeded, start
from tests.made.families import batch_sizes, borrowed
from tests.made.pictures import levels, levels_of, photo_of


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
    # The noise is bit-equal; sums in another order inside the network move a value across a rounding edge here and
    # there.
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
    sizes = batch_sizes(model, monkeypatch)
    plain = levels(txt2img(model, "a cat", seeds=[1], steps=3, cfg=1, negative="a dog"))
    assert sizes == [1, 1, 1]
    assert np.array_equal(plain, levels(txt2img(model, "a cat", seeds=[1], steps=3, cfg=1.0, negative="a bird")))
    none = levels(txt2img(model, "a cat", seeds=[1], steps=3, cfg=0, negative="a dog"))
    assert sizes == [1] * 9
    assert np.array_equal(none, levels(txt2img(model, "a dog", seeds=[1], steps=3, cfg=1)))
    txt2img(model, "a cat", seeds=[1], steps=3, cfg=2)
    assert sizes == [1] * 12 + [2] * 3


def test_guidance_within_an_interval_saves_passes_outside_it(model, monkeypatch):
    sizes = batch_sizes(model, monkeypatch)
    txt2img(model, "a", seeds=[1], steps=6, interval=(0.1, 5.0))
    inside = [0.1 < sigma <= 5.0 for sigma in karras(model.schedule, 6)[:-1]]
    assert 0 < sum(inside) < 6
    assert sizes == [2 if guided else 1 for guided in inside]


@pytest.mark.parametrize(
    "changed",
    [
        {"negative": "a dog"}, {"sampler": "heun"}, {"grid": "exponential"}, {"steps": 4}, {"cfg": 3.0},
        {"rescale": 0.7}, {"interval": (1.0, 5.0)}, {"clip_skip": 2}, {"sampler": "euler_ancestral", "eta": 0.5},
        {"cfg": -3.0},
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


def test_every_network_call_is_reported_where_a_step_takes_two(model):
    steps: list[Step] = []
    txt2img(model, "a", seeds=[1], steps=3, sampler="heun", on_step=steps.append)
    assert [(step.index, step.total) for step in steps] == [(i, 5) for i in range(5)]
    sigmas = karras(model.schedule, 3)
    assert [step.sigma for step in steps] == [sigmas[0], sigmas[1], sigmas[1], sigmas[2], sigmas[2]]


def test_a_sampler_and_a_grid_of_ones_own_need_no_second_table(model, monkeypatch):
    def mine(denoise, x, sigmas, *, eta=0.5, noise=None):
        return SAMPLERS["ddim"](denoise, x, sigmas, eta=eta, noise=noise)

    def coarse(schedule, steps):
        return karras(schedule, steps)[::2]

    monkeypatch.setitem(SAMPLERS, "mine", mine)
    monkeypatch.setitem(GRIDS, "coarse", coarse)
    assert Sampling(sampler="mine").grid_name(Schedule()) == "karras"
    assert Sampling(sampler="mine").grid_name(Schedule(zero_snr=True)) == "trailing"
    seen: list[Step] = []
    (picture,) = txt2img(model, "a", seeds=[1], steps=4, sampler="mine", grid="coarse", eta=0.0, on_step=seen.append)
    assert [(step.total, step.sigma) for step in seen] == [(2, sigma) for sigma in karras(model.schedule, 4)[:-1:2]]
    monkeypatch.setitem(GRIDS, "karras", coarse)
    assert picture == txt2img(model, "a", seeds=[1], steps=4, sampler="euler")[0]


def test_a_prompt_that_is_cut_is_reported(model):
    with pytest.warns(TruncationWarning, match="dropped from 'word' on"):
        txt2img(model, "word " * 76, seeds=[0], steps=1, truncate=True)


def test_a_long_prompt_is_read_in_pieces_and_changes_no_other_picture(model):
    long = "word " * 76 + "lighthouse"
    pair = levels(txt2img(model, [long, "rain"], seeds=[1, 2], steps=2))
    alone = [levels(txt2img(model, prompt, seeds=[seed], steps=2)) for prompt, seed in ((long, 1), ("rain", 2))]
    assert np.array_equal(pair, np.concatenate(alone))
    assert not np.array_equal(alone[0], levels(txt2img(model, "word " * 76, seeds=[1], steps=2)))


@pytest.mark.parametrize("family", ["sdxl-base", "ssd-1b"])
def test_sdxl_is_told_both_towers_the_pooled_text_and_six_sizes(family: str, calls) -> None:
    sizes = Sizes(original=(300, 200), crop=(5, 6), target=(1000, 900))
    txt2img(borrowed(family), "a cat", seeds=[1], steps=1, negative="rain", sizes=sizes)
    x, _, context, y = calls[0]
    assert (len(x), context.shape[2]) == (2, 144)
    pooled = borrowed(family).text[1](torch.tensor([[49406, 320, 2368, 49407] + [0] * 73]))[1]
    assert torch.allclose(y[1:, :48], pooled, atol=1e-6)
    assert torch.equal(y[:, 48:], size_embedding(torch.tensor([[300, 200, 5, 6, 1000, 900]] * 2)))


def test_sizes_are_those_of_the_picture_unless_given(calls) -> None:
    txt2img(borrowed("sdxl-base"), "a", seeds=[1], steps=1, height=40, width=24)
    assert torch.equal(calls[0][3][:, 48:], size_embedding(torch.tensor([[40, 24, 0, 0, 40, 24]] * 2)))


def test_without_a_negative_prompt_sdxl_steers_away_from_zeros_that_still_have_a_size(calls) -> None:
    txt2img(borrowed("sdxl-base"), "a", seeds=[1], steps=1)
    _, _, context, y = calls[0]
    assert not context[0].any()
    assert not y[0, :48].any()
    assert y[0, 48:].any()
    txt2img(borrowed("sdxl-base"), "a", seeds=[1], steps=1, negative="")
    assert calls[1][2][0].any()


def test_the_refiner_is_told_how_beautiful_its_picture_and_its_opposite_are(calls) -> None:
    img2img(borrowed("sdxl-refiner"), photo_of(), "a", seeds=[1], steps=2, strength=0.5)
    numbers = torch.tensor([[32, 32, 0, 0, 2.5], [32, 32, 0, 0, 6.0]])
    assert torch.equal(calls[0][3][:, 48:], size_embedding(numbers))
    assert calls[0][2][0].any(), "the refiner hears the empty prompt"


def test_base_and_refiner_share_one_schedule(calls) -> None:
    base, refiner = borrowed("sdxl-base"), borrowed("sdxl-refiner")
    txt2img(base, "a", seeds=[1], steps=10, refiner=refiner, refine_from=0.8, grid="trailing")
    widths, times = [c[2].shape[2] for c in calls], [c[1][0].item() for c in calls]
    assert widths == [144] * 8 + [80] * 2
    assert times == sorted(times, reverse=True)
    assert times[7] >= 200 > times[8]


def test_the_refiner_can_start_anew_from_the_finished_latent(calls) -> None:
    txt2img(borrowed("sdxl-base"), "a", seeds=[1], steps=4, refiner=borrowed("sdxl-refiner"), refine_strength=0.5)
    assert [c[2].shape[2] for c in calls] == [144] * 4 + [80] * 2


def test_a_learnt_word_of_sdxl_is_read_by_the_refiner_too(calls) -> None:
    base, refiner = borrowed("sdxl-base"), borrowed("sdxl-refiner")
    word = Embedding("thing", {64: normal("small", (2, 64)), 80: normal("large", (2, 80))})
    told = txt2img(base, "thing", seeds=[1], steps=4, refiner=refiner, refine_strength=0.5, embeddings=(word,))
    plain = txt2img(base, "thing", seeds=[1], steps=4, refiner=refiner, refine_strength=0.5)
    assert not torch.equal(calls[4][2], calls[10][2]), "the refiner hears the learnt word"
    assert not np.array_equal(levels_of(told[0]), levels_of(plain[0]))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_leaves_a_model_nothing_to_do_is_refused(share: float) -> None:
    with pytest.raises(ArgumentError, match=r"refine_from: .* leaves all 4 steps to one model"):
        txt2img(borrowed("sdxl-base"), "a", seeds=[1], steps=4, refiner=borrowed("sdxl-refiner"), refine_from=share)


def test_a_refiner_of_other_latents_is_refused() -> None:
    with pytest.raises(ArgumentError, match="a model of family sdxl-refiner cannot go on with the latents of sd1"):
        txt2img(borrowed("sd1"), "a", seeds=[1], refiner=borrowed("sdxl-refiner"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sizes(original=(0, 5)), r"original: \(0, 5\); give two whole numbers"),
        (lambda: Sizes(crop=(-1, 5)), "crop"),
        (lambda: Sizes(target=(5,)), "target"),
        (lambda: Sizes(aesthetic=float("nan")), "aesthetic: nan"),
        (lambda: Sizes(negative_aesthetic="high"), "negative_aesthetic: 'high'"),
        (lambda: txt2img(borrowed("sd1"), "a", seeds=[1], sizes=Sizes()), "takes no sizes"),
        (lambda: borrowed("sd1").condition(["a"], (32, 32), noise_level=3), "takes no noise level"),
        (lambda: borrowed("sd-image-variations").condition(["a"], (32, 32)), "takes an image instead of text"),
    ],
)
def test_what_a_family_is_not_told_is_refused(make, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize("enlarge", ["latent", "pixel"])
def test_hires_draws_small_then_redraws_large(enlarge: str, calls) -> None:
    (image,) = hires(borrowed("sd1"), "a", seeds=[1], steps=4, scale=1.5, enlarge=enlarge, strength=0.5)
    assert image.size == (48, 48)
    assert [tuple(c[0].shape[2:]) for c in calls] == [(4, 4)] * 4 + [(6, 6)] * 2


def test_hires_needs_a_scale_and_a_strength(calls) -> None:
    for options, message in (
        ({"scale": 0.5}, "scale: 0.5"),
        ({"strength": 0}, "strength: 0 would only enlarge"),
        ({"enlarge": "magic"}, "enlarge: 'magic' is unknown"),
    ):
        with pytest.raises(ArgumentError, match=message):
            hires(borrowed("sd1"), "a", seeds=[1], **options)
    assert not calls
