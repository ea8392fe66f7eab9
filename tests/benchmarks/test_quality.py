"""The scorer: right about true renders, never satisfied with another scene."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from benchmarks import quality
from ldm import blocks
from ldm.blocks import COLORS, RELATIONS, SHAPES, Scene, Solid


def worn(picture: np.ndarray, seed: int, sigma: float = 1.0, noise: float = 4.0) -> np.ndarray:
    """The picture after about what an autoencoder does to it: a Gaussian blur, in pixels, and noise, in 1/255."""
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)), float)
    return np.clip(blurred + np.random.default_rng(seed).normal(0, noise, picture.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("held_out", [False, True])
def test_true_renders_are_right(held_out):
    scenes = [blocks.sample(10**6 + seed, held_out=held_out) for seed in range(70)]
    wrong = [blocks.canonical(scene) for scene in scenes if not quality.right(blocks.render(scene), scene)["all"]]
    assert not wrong


def test_blurred_and_noisy_renders_are_right():
    scenes = [blocks.sample(2 * 10**6 + seed, held_out=seed % 2 == 0) for seed in range(70)]
    wrong = [
        blocks.canonical(s) for k, s in enumerate(scenes) if not quality.right(worn(blocks.render(s), k), s)["all"]
    ]
    assert len(wrong) <= 1, wrong


def altered(scene: Scene, rng: np.random.Generator) -> dict[str, Scene]:
    """Scenes of two solids that differ from this one in one thing each."""
    a, b = scene.solids
    (relation,) = scene.relations
    return {
        "colours": replace(scene, solids=(replace(a, color=b.color), replace(b, color=a.color))),
        "colour": replace(scene, solids=(replace(a, color=next(c for c in COLORS if c not in (a.color, b.color))), b)),
        "first shape": replace(
            scene, solids=(replace(a, shape=str(rng.choice([s for s in SHAPES if s != a.shape]))), b)
        ),
        "second shape": replace(
            scene, solids=(a, replace(b, shape=str(rng.choice([s for s in SHAPES if s != b.shape]))))
        ),
        "relation": replace(scene, relations=(str(rng.choice([r for r in RELATIONS if r != relation])),)),
        "one missing": Scene((a,), (), scene.seed),
    }


def test_another_scene_is_wrong():
    rng = np.random.default_rng(0)
    for seed in range(15):
        scene = blocks.sample(seed, held_out=True)
        for what, other in altered(scene, rng).items():
            assert not quality.right(blocks.render(other), scene)["all"], f"{what}: {blocks.canonical(scene)}"


def test_one_solid_too_many_is_wrong():
    for shape in SHAPES:
        pair = (Solid("cube", "red"), Solid("sphere", "blue"))
        three = Scene((*pair, Solid(shape, "green")), ("on top of", "to the left of"))
        result = quality.right(blocks.render(three), Scene(pair, ("on top of",)))
        assert not result["colours"]
        assert quality.right(blocks.render(three), three)["all"]


def test_the_verdict_names_what_is_wrong():
    scene = Scene((Solid("cube", "red"), Solid("sphere", "blue")), ("on top of",))
    picture = blocks.render(scene)
    assert quality.right(picture, scene) == {"colours": True, "solids": True, "relation": True, "all": True}
    other = replace(scene, solids=(Solid("cone", "red"), Solid("sphere", "blue")))
    assert quality.right(picture, other) == {"colours": True, "solids": False, "relation": True, "all": False}
    other = replace(scene, relations=("behind",))
    assert quality.right(picture, other) == {"colours": True, "solids": True, "relation": False, "all": False}


def test_half_a_cone_and_half_a_sphere_are_neither():
    for seed in range(4):
        halves = [blocks.render(Scene((Solid(shape, "green"),), (), seed)) for shape in ("cone", "sphere")]
        green = (halves[1].max(-1).astype(int) - halves[1].min(-1) > 40).any(0).nonzero()[0]
        middle = int(green.mean())
        (found,) = quality.read(np.concatenate((halves[0][:, :middle], halves[1][:, middle:]), 1)).solids
        assert found.shape is None


def test_noise_and_emptiness_hold_no_solid():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    for picture in (noise, np.zeros_like(noise), np.full_like(noise, 190)):
        assert quality.read(picture).solids == ()


def test_the_model_is_asked_in_batches_and_gives_pictures():
    import torch

    from ldm import LatentDiffusion
    from ldm.train.shipped import BLOCKS

    model = LatentDiffusion(BLOCKS).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    settings = {"sampler": "dpmpp_2m", "grid": None, "steps": 1, "cfg": 2.0}
    pictures = quality.pictures_of(model, ["a red cube", "a blue cone", "a pink cube"], range(3), settings, batch=2)
    assert [(picture.shape, picture.dtype) for picture in pictures] == [((128, 128, 3), np.uint8)] * 3


def test_the_command_writes_figures_and_sheets(tmp_path, monkeypatch, capsys):
    """With a stand-in for the model that draws every scene but the first one truly."""
    scenes = {blocks.canonical(scene): scene for scene in [*blocks.held_out_scenes(5), quality.SHOWCASE]}
    first = next(iter(scenes))

    def pictures_of(model, prompts, seeds, settings, batch):
        return [
            np.zeros((128, 128, 3), np.uint8) if prompt == first else blocks.render(scenes[prompt])
            for prompt in prompts
        ]

    import torch

    import weights

    model = SimpleNamespace(
        vae=SimpleNamespace(encode=lambda image: image, decode=lambda z: z),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    monkeypatch.setattr(weights, "load", lambda *_, **__: model)
    monkeypatch.setattr(quality, "pictures_of", pictures_of)
    quality.main(["--n", "5", "--showcase", "2", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "quality.json").read_text())
    assert figures["right"] == {"colours": 0.8, "solids": 0.8, "relation": 0.8, "all": 0.8}
    assert figures["showcase"]["right"]["all"] == 1.0
    assert figures["vae"]["psnr_db_mean"] > 100  # lossless
    assert len(figures["pictures"]) == 5
    assert '"right"' in capsys.readouterr().out
    for name in ("quality.png", "showcase.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 256
