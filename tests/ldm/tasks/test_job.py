"""What all tasks share: options that are refused with the remedy, and networks that give NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm import LatentDiffusion
from ldm.errors import ArgumentError, NonFinite
from ldm.limits.precision import decode
from ldm.tasks import img2img, txt2img
from ldm.tasks.job import Job, Sampling
from samplers import Schedule, seeded
from tests.made.families import build
from tests.made.pictures import levels


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
    """Whatever is put around the model (windows, known regions, a function of one's own): its x0 is checked before
    every update."""
    job, calls = Job("a", seeds=[1], sampling=Sampling(steps=4)), []

    def denoise(x: Tensor, sigma: float) -> Tensor:
        calls.append(sigma)
        return x * (float("inf") if len(calls) == 3 else 0)

    sigmas = job.sampling.sigmas(Schedule())
    with pytest.raises(NonFinite, match=r"step 3 of 4 .*: NaN or infinity"):
        job.solve(denoise, torch.ones(1, 4, 2, 2), sigmas, seeded([1]))
    calls.clear()  # the third network call belongs to the second step of Heun's
    with pytest.raises(NonFinite, match=r"step 2 of 4 .*: NaN or infinity"):
        replace(job, sampling=Sampling(steps=4, sampler="heun")).solve(
            denoise, torch.ones(1, 4, 2, 2), sigmas, seeded([1])
        )


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
