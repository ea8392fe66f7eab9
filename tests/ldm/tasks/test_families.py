"""The tasks of the families beyond plain text to image, on tiny models: what each network is told, and what comes out."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.models.seeded import normal
from ldm.conditioning.cond import Sizes, size_embedding
from ldm.conditioning.prompts import Embedding
from ldm.errors import ArgumentError
from ldm.images import from_pil
from ldm.model import LatentDiffusion
from ldm.tasks import depth2img, hires, img2img, inpaint, interpolate, outpaint, txt2img, upscale, variations
from samplers import seeded
from tests.made.families import build, tiny


@cache
def model(family: str) -> LatentDiffusion:
    return build(tiny(family))


def photo(width: int = 32, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def half_white(width: int = 32, height: int = 32) -> Image.Image:
    """A mask: the right half is repainted."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """(x, t, context, y) of every network call."""
    from ldm.networks.unet import UNet

    seen: list[tuple[Tensor, ...]] = []
    forward = UNet.forward
    monkeypatch.setattr(
        UNet,
        "forward",
        lambda self, x, t, context, y=None: (seen.append((x, t, context, y)), forward(self, x, t, context, y))[1],
    )
    return seen


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents are shown as they are: decoding large pictures takes most of the time, and is another test's subject."""
    monkeypatch.setattr(
        "ldm.limits.precision.decode",
        lambda model, latent, tile=None: F.interpolate(latent[:, :3], scale_factor=model.config.vae.factor).clamp(
            -1, 1
        ),
    )


# --- SDXL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sdxl-base", "ssd-1b"])
def test_sdxl_is_told_both_towers_the_pooled_text_and_six_sizes(family: str, calls) -> None:
    sizes = Sizes(original=(300, 200), crop=(5, 6), target=(1000, 900))
    txt2img(model(family), "a cat", seeds=[1], steps=1, negative="rain", sizes=sizes)
    x, _, context, y = calls[0]
    assert (len(x), context.shape[2]) == (2, 144)
    pooled = model(family).text[1](torch.tensor([[49406, 320, 2368, 49407] + [0] * 73]))[1]
    assert torch.allclose(y[1:, :48], pooled, atol=1e-6)
    assert torch.equal(y[:, 48:], size_embedding(torch.tensor([[300, 200, 5, 6, 1000, 900]] * 2)))


def test_sizes_are_those_of_the_picture_unless_given(calls) -> None:
    txt2img(model("sdxl-base"), "a", seeds=[1], steps=1, height=40, width=24)
    assert torch.equal(calls[0][3][:, 48:], size_embedding(torch.tensor([[40, 24, 0, 0, 40, 24]] * 2)))


def test_without_a_negative_prompt_sdxl_steers_away_from_zeros_that_still_have_a_size(calls) -> None:
    txt2img(model("sdxl-base"), "a", seeds=[1], steps=1)
    _, _, context, y = calls[0]
    assert not context[0].any()
    assert not y[0, :48].any()
    assert y[0, 48:].any()
    txt2img(model("sdxl-base"), "a", seeds=[1], steps=1, negative="")
    assert calls[1][2][0].any()


def test_the_refiner_is_told_how_beautiful_its_picture_and_its_opposite_are(calls) -> None:
    img2img(model("sdxl-refiner"), photo(), "a", seeds=[1], steps=2, strength=0.5)
    numbers = torch.tensor([[32, 32, 0, 0, 2.5], [32, 32, 0, 0, 6.0]])
    assert torch.equal(calls[0][3][:, 48:], size_embedding(numbers))
    assert calls[0][2][0].any(), "the refiner hears the empty prompt"


def test_base_and_refiner_share_one_schedule(calls) -> None:
    base, refiner = model("sdxl-base"), model("sdxl-refiner")
    txt2img(base, "a", seeds=[1], steps=10, refiner=refiner, refine_from=0.8, grid="trailing")
    widths, times = [c[2].shape[2] for c in calls], [c[1][0].item() for c in calls]
    assert widths == [144] * 8 + [80] * 2
    assert times == sorted(times, reverse=True)
    assert times[7] >= 200 > times[8]


def test_the_refiner_can_start_anew_from_the_finished_latent(calls) -> None:
    txt2img(model("sdxl-base"), "a", seeds=[1], steps=4, refiner=model("sdxl-refiner"), refine_strength=0.5)
    assert [c[2].shape[2] for c in calls] == [144] * 4 + [80] * 2


def test_a_learnt_word_of_sdxl_is_read_by_the_refiner_too(calls) -> None:
    base, refiner = model("sdxl-base"), model("sdxl-refiner")
    word = Embedding("thing", {64: normal("small", (2, 64)), 80: normal("large", (2, 80))})
    told = txt2img(base, "thing", seeds=[1], steps=4, refiner=refiner, refine_strength=0.5, embeddings=(word,))
    plain = txt2img(base, "thing", seeds=[1], steps=4, refiner=refiner, refine_strength=0.5)
    assert not torch.equal(calls[4][2], calls[10][2]), "the refiner hears the learnt word"
    assert not np.array_equal(levels(told[0]), levels(plain[0]))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_leaves_a_model_nothing_to_do_is_refused(share: float) -> None:
    with pytest.raises(ArgumentError, match=r"refine_from: .* leaves all 4 steps to one model"):
        txt2img(model("sdxl-base"), "a", seeds=[1], steps=4, refiner=model("sdxl-refiner"), refine_from=share)


def test_a_refiner_of_other_latents_is_refused() -> None:
    with pytest.raises(ArgumentError, match="a model of family sdxl-refiner cannot go on with the latents of sd1"):
        txt2img(model("sd1"), "a", seeds=[1], refiner=model("sdxl-refiner"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sizes(original=(0, 5)), r"original: \(0, 5\); give two whole numbers"),
        (lambda: Sizes(crop=(-1, 5)), "crop"),
        (lambda: Sizes(target=(5,)), "target"),
        (lambda: Sizes(aesthetic=float("nan")), "aesthetic: nan"),
        (lambda: Sizes(negative_aesthetic="high"), "negative_aesthetic: 'high'"),
        (lambda: txt2img(model("sd1"), "a", seeds=[1], sizes=Sizes()), "is told no sizes"),
        (lambda: model("sd1").condition(["a"], (32, 32), noise_level=3), "is told no noise level"),
        (lambda: model("sd-image-variations").condition(["a"], (32, 32)), "is told an image instead of text"),
    ],
)
def test_what_a_family_is_not_told_is_refused(make, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


# --- inpainting and outpainting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1-inpainting", "sd2-inpainting", "sdxl-inpainting"])
def test_an_inpainting_model_sees_latent_mask_and_the_picture_with_a_grey_hole(family: str, calls) -> None:
    m, init = model(family), photo()
    inpaint(m, init, half_white(), "a", seeds=[7], steps=2)
    x = calls[0][0]
    noise = seeded([7])
    first = noise((1, 4, 4, 4))
    image, hole = from_pil(init), torch.zeros(1, 1, 32, 32)
    hole[..., 16:] = 1
    masked = m.vae.encode(image * (1 - hole), noise((1, 4, 4, 4)))
    assert x.shape[1] == 9
    assert torch.allclose(x[0, :4], first[0], atol=1e-5), "unit variance at the first step"
    assert torch.equal(x[0, 4], torch.tensor([0.0, 0, 1, 1]).expand(4, 4))
    assert torch.allclose(x[0, 5:], masked[0], atol=1e-6)
    assert torch.equal(x[0, 4:], x[1, 4:]), "both conditions are told the same"


@pytest.mark.parametrize("family", ["sd1", "sd1-inpainting", "sdxl-base"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_every_pixel_outside_the_mask_stays(family: str, strength: float) -> None:
    init = photo(45, 37)  # a size that no latent has
    (image,) = inpaint(model(family), init, half_white(45, 37), "a", seeds=[1], steps=2, strength=strength)
    assert image.size == (45, 37)
    assert np.array_equal(levels(image)[:, :22], levels(init)[:, :22])
    assert np.abs(levels(image)[:, 22:] - levels(init)[:, 22:]).mean() > 5


def test_feathering_fades_in_inside_the_mask_alone() -> None:
    hard, soft = (inpaint(model("sd1"), photo(), half_white(), "a", seeds=[1], steps=2, feather=f)[0] for f in (0, 4))
    assert np.array_equal(levels(soft)[:, :16], levels(photo())[:, :16])
    assert np.array_equal(levels(soft)[:, 21:], levels(hard)[:, 21:])
    assert not np.array_equal(levels(soft)[:, 16:20], levels(hard)[:, 16:20])


def test_a_size_asked_for_scales_picture_and_mask(calls) -> None:
    (image,) = inpaint(model("sd1"), photo(64, 64), half_white(64, 64), "a", seeds=[1], steps=1, width=40, height=40)
    assert image.size == (40, 40)
    assert calls[0][0].shape[2:] == (5, 5)


def test_outpainting_keeps_the_picture_and_adds_its_surroundings() -> None:
    init = photo()
    (image,) = outpaint(model("sd1"), init, {"left": 8, "bottom": 11}, "a", seeds=[1], steps=2)
    assert image.size == (40, 43)
    assert np.array_equal(levels(image)[:32, 8:], levels(init))
    assert levels(image)[:, :8].std() > 1


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        ({}, "nothing to add"),
        ({"left": 0}, "nothing to add"),
        ({"up": 8}, "'up' is no side; there are left, right, top, bottom"),
        ({"top": -1}, "top=-1"),
        ({"top": 1.5}, r"top=1\.5"),
    ],
)
def test_an_extension_that_makes_no_sense_is_refused(extend: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        outpaint(model("sd1"), photo(), extend, "a", seeds=[1])


def test_inpainting_needs_something_to_paint_and_a_model_that_reads_text() -> None:
    with pytest.raises(ArgumentError, match="nothing to paint"):
        inpaint(model("sd1"), photo(), Image.new("L", (32, 32)), "a", seeds=[1])
    with pytest.raises(ArgumentError, match="strength: 0 would paint nothing"):
        inpaint(model("sd1"), photo(), half_white(), "a", seeds=[1], strength=0)
    with pytest.raises(ArgumentError, match="use upscale"):
        inpaint(model("x4-upscaler"), photo(), half_white(), "a", seeds=[1])


# --- depth, upscaling, variations -------------------------------------------------------------------------------------


def test_a_depth_model_sees_the_depth_that_is_given(calls) -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    depth2img(model("sd2-depth"), photo(), "a", seeds=[1], depth=ramp, steps=2, strength=0.5)
    near = calls[0][0][:, 4]
    assert near.shape == (2, 4, 4)
    assert (near[:, :, 1:] > near[:, :, :-1]).all(), "light is near"
    assert near.amin() == pytest.approx(-1, abs=1e-3)
    assert near.amax() == pytest.approx(1, abs=2e-3)


def test_depth_comes_from_the_models_own_network_otherwise(calls) -> None:
    depth2img(model("sd2-depth"), photo(), "a", seeds=[1], steps=2, strength=0.5)
    depth2img(model("sd2-depth"), photo(), "a", seeds=[2], steps=2, strength=0.5)
    assert torch.equal(calls[0][0][:, 4], calls[1][0][:, 4])
    assert calls[0][0][:, 4].std() > 0.01


def test_a_depth_map_of_another_shape_or_a_model_without_depth_is_refused() -> None:
    with pytest.raises(ArgumentError, match="depth: it is 32x16 and the picture 32x32"):
        depth2img(model("sd2-depth"), photo(), "a", seeds=[1], depth=photo(32, 16))
    with pytest.raises(ArgumentError, match="is not told depth"):
        depth2img(model("sd1"), photo(), "a", seeds=[1])


def test_the_upscaler_sees_the_small_picture_noised_to_its_level(shown, calls) -> None:
    m, init = model("x4-upscaler"), photo(64, 64)
    (image,) = upscale(m, init, "a", seeds=[7], steps=1, noise_level=100)
    x, _, _, y = calls[0]
    noise = seeded([7])
    noise((1, 4, 64, 64))
    alpha = m.schedule.alphas_cumprod[100]
    low = math.sqrt(alpha) * from_pil(init) + math.sqrt(1 - alpha) * noise((1, 3, 64, 64))
    assert image.size == (256, 256)
    assert torch.allclose(x[:, 4:], low.expand(2, -1, -1, -1), atol=1e-6)
    assert y.tolist() == [100, 100]


def test_an_odd_picture_is_continued_for_the_upscaler_and_cut_again(shown, calls) -> None:
    (image,) = upscale(model("x4-upscaler"), photo(50, 30), "a", seeds=[1], steps=1)
    assert image.size == (200, 120)
    assert calls[0][0].shape[2:] == (64, 64)


def test_windows_are_blended_without_changing_what_does_not_look_around(shown, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that sees one cell at a time gives the same with windows as without."""
    from ldm.networks.unet import UNet

    sides = []
    monkeypatch.setattr(
        UNet,
        "forward",
        lambda self, x, t, context, y=None: (sides.append(tuple(x.shape[2:])), torch.tanh(x[:, :4] + x[:, 4:5]))[1],
    )
    m, init = model("x4-upscaler"), photo(192, 128)
    whole, tiled = (upscale(m, init, "a", seeds=[1], steps=2, window=window)[0] for window in (0, 64))
    assert np.abs(levels(whole) - levels(tiled)).max() <= 1
    assert sides == [(128, 192)] * 2 + [(64, 64)] * 2 * 3 * 5


def test_a_large_picture_is_seen_through_windows(shown, calls) -> None:
    upscale(model("x4-upscaler"), photo(128, 64), "a", seeds=[1], steps=1, window=64)
    assert [tuple(c[0].shape[2:]) for c in calls] == [(64, 64)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_level": 351}, "noise_level: 351; give a whole number from 0 to 350"),
        ({"noise_level": 1.5}, "noise_level"),
        ({"window": 8}, "window: 8"),
    ],
)
def test_an_upscaling_option_out_of_range_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        upscale(model("x4-upscaler"), photo(), "a", seeds=[1], **options)
    with pytest.raises(ArgumentError, match="is no upscaler"):
        upscale(model("sd1"), photo(), "a", seeds=[1])


@pytest.mark.parametrize("preprocessing", ["card", "original"])
def test_variations_are_told_one_token_and_steer_away_from_zeros(preprocessing: str, calls) -> None:
    m = model("sd-image-variations")
    variations(m, photo(60, 40), seeds=[1], steps=1, preprocessing=preprocessing)
    context = calls[0][2]
    assert context.shape == (2, 1, 48)
    assert not context[0].any()
    from ldm.networks.vision import preprocess

    assert torch.allclose(context[1:, 0], m.vision(preprocess(from_pil(photo(60, 40)), preprocessing, 28)), atol=1e-6)


def test_variations_need_a_model_that_looks_and_no_words() -> None:
    with pytest.raises(ArgumentError, match="is told text, not a picture"):
        variations(model("sd1"), photo(), seeds=[1])
    with pytest.raises(ArgumentError, match="negative: image variations have no negative prompt"):
        variations(model("sd-image-variations"), photo(), seeds=[1], negative="rain")
    with pytest.raises(ArgumentError, match="preprocessing: 'cards' is unknown; card"):
        variations(model("sd-image-variations"), photo(), seeds=[1], preprocessing="cards")
    with pytest.raises(ArgumentError, match="use variations"):
        txt2img(model("sd-image-variations"), "a", seeds=[1])


# --- larger, and in between -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enlarge", ["latent", "pixel"])
def test_hires_draws_small_then_redraws_large(enlarge: str, calls) -> None:
    (image,) = hires(model("sd1"), "a", seeds=[1], steps=4, scale=1.5, enlarge=enlarge, strength=0.5)
    assert image.size == (48, 48)
    assert [tuple(c[0].shape[2:]) for c in calls] == [(4, 4)] * 4 + [(6, 6)] * 2


def test_hires_needs_a_scale_and_a_strength(calls) -> None:
    for options, message in (
        ({"scale": 0.5}, "scale: 0.5"),
        ({"strength": 0}, "strength: 0 would only enlarge"),
        ({"enlarge": "magic"}, "enlarge: 'magic' is unknown"),
    ):
        with pytest.raises(ArgumentError, match=message):
            hires(model("sd1"), "a", seeds=[1], **options)
    assert not calls


def test_the_way_between_two_prompts_begins_and_ends_as_they_do() -> None:
    frames = interpolate(model("sd1"), ["a cat", "a dog"], seeds=[3], frames=4, steps=2, sampler="euler_ancestral")
    assert len(frames) == 4
    for frame, prompt in ((frames[0], "a cat"), (frames[-1], "a dog")):
        (end,) = txt2img(model("sd1"), prompt, seeds=[3], steps=2, sampler="euler_ancestral")
        assert np.abs(levels(frame) - levels(end)).max() <= 1
    steps = [np.abs(levels(a) - levels(b)).mean() for a, b in itertools.pairwise(frames)]
    assert min(steps) > 0


def test_the_way_between_two_seeds_keeps_the_noise_at_its_length() -> None:
    from ldm.tasks.interpolate import slerp

    a, b = normal("a", (1, 4096)), normal("b", (1, 4096))
    for t in (0.25, 0.5):
        assert slerp(a, b, t).norm().item() == pytest.approx(torch.lerp(a.norm(), b.norm(), t).item(), rel=1e-5)
    assert torch.allclose(slerp(a, a, 0.3), a)
    assert not slerp(torch.zeros_like(a), torch.zeros_like(a), 0.3).any(), "zeros have no direction"
    frames = interpolate(model("sdxl-base"), "a", seeds=[1, 2, 3], frames=5, steps=1, batch=2)
    for k, seed in ((0, 1), (2, 2), (4, 3)):
        assert np.abs(levels(frames[k]) - levels(txt2img(model("sdxl-base"), "a", seeds=[seed], steps=1)[0])).max() <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": [1]}, "1 with 1 seeds"),
        ({"seeds": [1, 2, 3], "prompts": ["a", "b"]}, "2 with 3 seeds"),
        ({"seeds": [1, 2], "frames": 1}, "frames: 1"),
    ],
)
def test_a_way_needs_two_stations_and_two_frames(given: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        interpolate(model("sd1"), given.pop("prompts", "a"), **given)
